"""The text dialects (Qwen3.5's and chat templates) string by string, and how calls are read from text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from envs.message import Message, ToolCall
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.call_grammar import parse_call
from rollout.dialects.control_text import ControlText
from rollout.dialects.qwen_dialect import CALL_INSTRUCTIONS, QwenDialect
from rollout.dialects.template_dialect import TemplateDialect, plain
from tests.rollout.fakes_episode import ADD, CHATML, chatml_tokenizer, tool_message

HF = HfTokenizer(chatml_tokenizer())
END = HF.special_id("<|im_end|>")
QWEN = QwenDialect(HF)
TEMPLATE = TemplateDialect(HF, end_ids=[END])
CALLS = [ToolCall(name="add", arguments={"a": 1, "b": [2, "é"]}), ToolCall(name="add", arguments={"a": True})]
TOOLS_HEADER = (
    "# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "description": "Add two integers.", "parameters": '
    '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}}, '
    '"required": ["a"]}}}\n</tools>' + CALL_INSTRUCTIONS
)
NO_THOUGHT = "<think>\n\n</think>\n\n"


def qwen_text(ids: list[int]) -> str:
    text = HF.decode(ids)
    # the strings below are exact and the ids are those of encoding them whole
    assert ids == HF.hf(text, add_special_tokens=False)["input_ids"]
    return text


def test_qwen_prompts_equal_the_model_s_format() -> None:
    assert qwen_text(QWEN.prompt([Message.system(" S\n"), Message.user(" u\n")], [])) == (
        f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHT}"
    )
    assert qwen_text(QWEN.prompt([Message.system("S"), Message.user("u")], [ADD])) == (
        f"<|im_start|>system\n{TOOLS_HEADER}\n\nS<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
        f"<|im_start|>assistant\n{NO_THOUGHT}"
    )
    assert qwen_text(QWEN.prompt([Message.user("u")], [ADD])).startswith(
        f"<|im_start|>system\n{TOOLS_HEADER}<|im_end|>\n<|im_start|>user\nu"
    )


def test_qwen_history_shows_thoughts_only_after_the_last_user_turn() -> None:
    history = [Message.user("a"), Message.assistant("b"), Message.user("c"), Message.assistant("", CALLS[1:])]
    assert qwen_text(QWEN.prompt([*history, tool_message("3"), tool_message("4", "1")], [])) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
        f"<|im_start|>assistant\n{NO_THOUGHT}<tool_call>\n<function=add>\n<parameter=a>\nTrue\n</parameter>\n"
        "</function>\n</tool_call><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{NO_THOUGHT}"
    )


def test_qwen_completions_and_replies_continue_a_conversation() -> None:
    assert qwen_text(QWEN.completion(Message.assistant("t", CALLS), [ADD])) == (
        't\n\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2, "é"]\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\nTrue\n</parameter>\n</function>\n"
        "</tool_call><|im_end|>"
    )
    assert qwen_text(QWEN.reply([tool_message("3"), tool_message("4", "1"), Message.user("and?")], [ADD])) == (
        "\n<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        f"<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n{NO_THOUGHT}"
    )


def test_qwen_thoughts_are_sampled_and_left_out_of_the_message() -> None:
    thinking = QwenDialect(HF, thinking=True)
    assert HF.decode(thinking.reply([], [])).endswith("<|im_start|>assistant\n<think>\n")
    demonstration = thinking.completion(Message.assistant("5"), [])
    assert HF.decode(demonstration) == "\n</think>\n\n5<|im_end|>"
    assert thinking.parse(demonstration, []).message == Message.assistant("5")
    marks = {name: HF.special_id(name) for name in ("<tool_call>", "</tool_call>", "<think>", "</think>")}
    call = [marks["<tool_call>"], *HF.encode("<function=add></function>"), marks["</tool_call>"]]
    unfinished = thinking.parse([*HF.encode("hm 5"), *call], [])
    assert (unfinished.status, unfinished.message.text) == ("none", "")  # a call inside a thought is a thought
    finished = thinking.parse([*call, marks["</think>"], *HF.encode("\n\nok "), *call, END], [])
    assert finished.message.text == "ok" and len(finished.message.tool_calls) == 1


def test_marks_that_are_spelled_out_are_text_where_the_tokenizer_has_them_as_tokens() -> None:
    spelled = HF.encode('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>')
    parsed = TEMPLATE.parse([*spelled, END], [ADD])
    assert parsed.status == "none" and parsed.message.text.startswith("<tool_call>")
    tokens = HF.hf('<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>', add_special_tokens=False)["input_ids"]
    assert TEMPLATE.parse([*tokens, END], [ADD]).status == "ok"


def byte_level(*marks: str) -> HfTokenizer:
    """A tokenizer without merges that has the role marks and `marks` as tokens, and no others."""
    alphabet = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", *marks])
    return HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>"))


def test_marks_are_read_from_text_where_the_tokenizer_does_not_have_them() -> None:
    dialect = QwenDialect(byte_level())
    ids = dialect.completion(Message.assistant("t", CALLS), [ADD])
    parsed = dialect.parse(ids, [ADD])
    assert parsed.status == "ok" and parsed.message.text == "t" and len(parsed.message.tool_calls) == 2
    assert dialect.parse(ids[:-3], [ADD]).message.tool_calls[1].error == "call was cut off before </tool_call>"


def test_each_mark_is_read_from_text_only_where_it_has_no_token_of_its_own() -> None:
    half = byte_level("<tool_call>", "</tool_call>")
    parsed = QwenDialect(half).parse(half.encode("<think>x</think><tool_call>"), [ADD])
    assert (parsed.status, parsed.message.text) == ("none", "<tool_call>")


def test_template_prompts_equal_apply_chat_template() -> None:
    messages = [Message.system("S"), Message.user(" u\n"), Message.assistant("t", CALLS), tool_message("3")]
    want = HF.hf.apply_chat_template(
        [plain(message) for message in messages], add_generation_prompt=True, return_dict=False
    )
    assert TEMPLATE.prompt(messages, []) == want


def test_template_completions_and_replies_are_cut_behind_the_stop_token() -> None:
    assert HF.decode(TEMPLATE.completion(Message.assistant("t", CALLS[1:]), [ADD])) == (
        't<tool_call>\n{"name": "add", "arguments": {"a": true}}\n</tool_call><|im_end|>'
    )
    for replies, shown in (
        ([tool_message("3")], "tool\n3"),
        ([tool_message("3"), tool_message("4", "1")], "tool\n3<|im_end|>\n<|im_start|>tool\n4"),
        ([Message.user("more")], "user\nmore"),
    ):
        ids = TEMPLATE.reply(replies, [ADD])
        assert HF.decode(ids) == f"\n<|im_start|>{shown}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_rewrites_history_still_only_appends() -> None:
    # drops what stands before </think> in earlier turns, as templates of reasoning models do
    shown = "(m.content if loop.last else m.content.split('</think>')[-1])"
    hf = chatml_tokenizer(CHATML.replace("+ m.content }}", f"+ {shown} }}}}", 1))
    dialect = TemplateDialect(HfTokenizer(hf), end_ids=[END])
    thought = hf("hm</think>5<|im_end|>", add_special_tokens=False)["input_ids"]
    row = dialect.prompt([Message.user("u")], []) + thought + dialect.reply([Message.user("v")], [])
    assert HF.decode(row) == (
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nhm</think>5<|im_end|>\n"
        "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ messages[0].content }}", "ends assistant turns with none of the stop tokens"),
        ("{%- for m in messages %}{{ m.content }}{%- endfor %}", "ends assistant turns with none of the stop tokens"),
        ("{{ raise_exception('no thanks') }}", "the chat template refuses this conversation: no thanks"),
        ("", "no chat template"),
    ],
)
def test_templates_that_cannot_work_are_refused_at_the_start(template: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TemplateDialect(HfTokenizer(chatml_tokenizer(template)), end_ids=[END])


def test_tokens_that_swallow_white_space_do_so_here_too() -> None:
    hf = chatml_tokenizer()
    hf.add_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, special=True)], special_tokens=True)
    text = "a \n<|end|>\n b<|im_end|> c"
    assert ControlText(HfTokenizer(hf)).encode(text) == hf(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("body", "name", "arguments"),
    [
        ('\n{"name": "add", "arguments": {"a": 1, "b": null}}\n', "add", {"a": 1, "b": None}),
        ('{"name": "add"}', "add", {}),
        ("<function=add>\n</function>", "add", {}),
        ("<function=add>\n<parameter=a>\n 7\n\n</parameter>\n</function>", "add", {"a": " 7\n"}),
        ("<function=add><parameter=a>null</parameter></function>", "add", {"a": "null"}),
        ("<function=f>\n<parameter=a>\nx</parameter>y\n</parameter>\n</function>", "f", {"a": "x</parameter>y"}),
    ],
)
def test_calls_are_read_from_json_and_xml(body: str, name: str, arguments: dict[str, object]) -> None:
    call = parse_call(body, "0")
    assert (call.name, call.arguments, call.error) == (name, arguments, None)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("add(1, 2)", "call is neither JSON nor <function=...>"),
        ('{"name": "add", "arguments": {}', "call is not valid JSON"),
        ('{"name": "add", "arguments": {"a": NaN}}', "call is not valid JSON"),
        ('{"name": "add", "arguments": {"a": "\\ud800"}}', "call is not valid JSON"),
        ('{"a": ' + "[" * 100_000, "call is not valid JSON"),
        ('{"name": 3}', 'call has no "name"'),
        ('{"name": "add", "arguments": "{}"}', '"arguments" is not an object'),
        ("<function=add>\n<parameter=a>\n1\n</parameter>", "<function=...> is not closed"),
        ("<function=add>\n<parameter=a>\n1\n</function>", "text outside <parameter=...> blocks"),
        ("<function=add>1</function>", "text outside <parameter=...> blocks"),
    ],
)
def test_malformed_calls_get_a_short_stable_error(body: str, error: str) -> None:
    assert parse_call(body, "0").error == error
