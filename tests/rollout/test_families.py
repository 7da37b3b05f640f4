"""Chat templates in the shapes of the model families: each round-trips, or is refused by name in under a second."""

import time
from pathlib import Path

import pytest

from envs.message import Message, ToolCall, ToolResult
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.round_trip import PROBE, RESULT
from rollout.dialects.template_dialect import TemplateDialect
from tests.rollout.fakes_episode import chatml_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "mistral_json": "</s>", "gemma": "<end_of_turn>"}
CALL = Message.assistant("", [ToolCall(name="lookup", arguments={"q": "red box"}, call_id="0")])


def dialect_of(family: str, *, thinking: bool = False) -> TemplateDialect:
    hf = chatml_tokenizer((TEMPLATES / f"{family}.jinja").read_text())
    hf.add_tokens([ENDS[family]], special_tokens=True) if family in ENDS else None
    tokenizer = HfTokenizer(hf)
    end = tokenizer.special_id(ENDS.get(family, "<|im_end|>"))
    started = time.monotonic()
    dialect = TemplateDialect(tokenizer, end_ids=[end], thinking=thinking)
    assert time.monotonic() - started < 1
    return dialect


@pytest.mark.parametrize(
    ("family", "thinking"),
    [
        ("qwen3_5", False),
        ("qwen3_5", True),
        ("qwen3", False),
        ("qwen3", True),
        ("llama3", False),
        ("mistral_json", False),
        ("smollm2", False),
        ("named_results", False),
    ],
)
def test_a_conversation_with_tools_comes_back_as_it_went_in(family: str, thinking: bool) -> None:  # faults D
    dialect = dialect_of(family, thinking=thinking)
    dialect.check_tools()
    parsed = dialect.parse(dialect.completion(CALL, [PROBE]), [PROBE])
    assert [(call.name, call.arguments) for call in parsed.message.tool_calls] == [("lookup", {"q": "red box"})]
    result = Message.tool(ToolResult(call_id="0", name="lookup", content=RESULT))
    assert dialect.tokenizer.decode(dialect.reply([result], [PROBE])).count(RESULT) == 1


@pytest.mark.parametrize("family", ["mistral", "gemma", "deepseek", "glm"])
def test_what_does_not_come_back_is_refused_for_tools_with_the_text_that_differs(family: str) -> None:  # faults D
    dialect = dialect_of(family)
    assert dialect.parse(dialect.completion(Message.assistant("42"), []), []).message.text == "42"
    why = r"this chat template cannot be trained with tools: .*(is read as|refuses|in another way)"
    with pytest.raises(ValueError, match=why):
        dialect.check_tools()


@pytest.mark.parametrize("family", ["qwen3_5"])
def test_an_unfinished_thought_is_no_text_and_no_call(family: str) -> None:  # faults D1
    dialect = dialect_of(family, thinking=True)
    assert dialect.tokenizer.decode(dialect.prompt([Message.user("?")], [PROBE])).endswith("<think>\n")
    drafted = dialect.tokenizer.hf("maybe <tool_call>\n<function=lookup>\n</function>\n</tool_call>")["input_ids"]
    parsed = dialect.parse(drafted, [PROBE])
    assert (parsed.message.text, parsed.message.tool_calls, parsed.status) == ("", (), "none")


def test_call_ids_have_nine_letters_and_digits_in_calls_and_results() -> None:  # faults D2
    dialect = dialect_of("mistral_json")
    result = Message.tool(ToolResult(call_id="0", name="lookup", content=RESULT))
    assert RESULT in dialect.tokenizer.decode(dialect.reply([result], [PROBE]))


def test_a_result_whose_header_names_the_tool_is_still_shown() -> None:  # faults D3
    dialect = dialect_of("named_results")
    result = Message.tool(ToolResult(call_id="0", name="lookup", content=RESULT))
    shown = dialect.tokenizer.decode(dialect.reply([result], [PROBE]))
    assert shown == f"\n<|im_start|>tool name=lookup\n{RESULT}<|im_end|>\n<|im_start|>assistant\n"


def test_a_bare_json_call_is_a_call_and_json_that_names_no_arguments_is_text() -> None:  # faults D4
    dialect = dialect_of("llama3")
    said = dialect.tokenizer.encode('{"name": "lookup", "parameters": {"q": "x"}}')
    (call,) = dialect.parse([*said, *dialect.stop_token_ids], [PROBE]).message.tool_calls
    assert (call.name, call.arguments, call.error) == ("lookup", {"q": "x"}, None)
    assert dialect.parse(said, []).message.tool_calls == (), "without tools it is an answer"
    assert dialect.parse(dialect.tokenizer.encode('{"name": "lookup"}'), [PROBE]).message.tool_calls == ()


def test_tools_that_a_template_ignores_stand_in_the_system_message_with_an_example_of_a_call() -> None:  # faults J5
    dialect = dialect_of("smollm2")
    text = dialect.tokenizer.decode(dialect.prompt([Message.system("Be brief."), Message.user("?")], [PROBE]))
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and '"name": "lookup"' in text
    assert '<tool_call>\n{"name": "function_name", "arguments": {"argument": "value"}}\n</tool_call>' in text
