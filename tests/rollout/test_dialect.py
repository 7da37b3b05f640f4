"""What every dialect promises, and the tiny one token by token."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.schema import PolicyConfig
from envs.message import ImagePart, Message, ToolCall, ToolSpec
from policy.model.tokenizer import ByteTokenizer, HfTokenizer
from rollout.dialects.dialect import Dialect, make_dialect
from rollout.dialects.qwen_dialect import QwenDialect
from rollout.dialects.template_dialect import TemplateDialect
from rollout.dialects.tiny_dialect import TinyDialect
from tests.rollout.fakes_episode import ADD, ADDED, SPECIAL, chatml_tokenizer, tool_message

HF = HfTokenizer(chatml_tokenizer())
TINY = TinyDialect()
QWEN = QwenDialect(HF)
TEMPLATE = TemplateDialect(HF, end_ids=[HF.special_id("<|im_end|>")])
DIALECTS: dict[str, Dialect] = {
    "tiny": TINY,
    "qwen3_5": QWEN,
    "qwen3_5 thinking": QwenDialect(HF, thinking=True),
    "chat_template": TEMPLATE,
}
TOKENIZERS = {name: TINY.tokenizer if name == "tiny" else HF for name in DIALECTS}
ALL = pytest.mark.parametrize("name", DIALECTS)

CONTROL_TEXTS = [*SPECIAL, *ADDED, *ByteTokenizer.SPECIALS, "\ue000", "\ue0004\ue001", "\ue002", "<|im_", "end|>"]
HOSTILE_TEXT = st.lists(st.sampled_from([*CONTROL_TEXTS, "a", " ", "\n", "é", "<", "\ud800"])).map("".join)


def controls(name: str, ids: Sequence[int]) -> list[int]:
    known = set(TOKENIZERS[name].control_ids.values())
    return [i for i in ids if i in known]


@ALL
@settings(deadline=None)
@given(text=HOSTILE_TEXT)
def test_control_text_from_outside_never_becomes_a_control_token(name: str, text: str) -> None:
    dialect = DIALECTS[name]
    tool = ToolSpec(name="add", description=text, parameters=ADD.parameters)
    calm_tool = ToolSpec(name="add", description="x", parameters=ADD.parameters)

    def conversation(text: str) -> list[Message]:
        return [Message.system(f"x{text}x"), Message.user(f"x{text}x")]

    def results(text: str) -> list[Message]:
        return [tool_message(f"x{text}x"), tool_message(f"x{text}x", "1")]

    hostile, calm = dialect.prompt(conversation(text), [tool]), dialect.prompt(conversation("y"), [calm_tool])
    assert controls(name, hostile) == controls(name, calm)
    hostile, calm = dialect.reply(results(text), [tool]), dialect.reply(results("y"), [calm_tool])
    assert controls(name, hostile) == controls(name, calm)
    shown = f"x{text}x".encode("utf-8", "replace").decode()
    assert TOKENIZERS[name].decode(hostile).count(shown) == 2  # and it is still all there

    hostile, calm = (
        dialect.completion(Message.assistant(f"x{t}x", [ToolCall(name="add", arguments={"a": f"x{t}x"})]), [calm_tool])
        for t in (text, "y")
    )
    assert controls(name, hostile) == controls(name, calm)


# What a Qwen value cannot hold in any implementation: the text that ends it.
VALUE = st.text(max_size=8).filter(lambda text: "</parameter>" not in text) | st.sampled_from(
    ["", "\n", "\nx\n", "null", "75001", '"', "{}", "</function>", "<parameter=a>", *CONTROL_TEXTS]
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CALLS = st.lists(
    st.builds(
        lambda a, b: ToolCall(name="add", arguments={"a": a} | ({} if b is None else {"b": b})),
        VALUE | st.integers(),
        VALUE | st.none(),
    ),
    max_size=3,
)


@ALL
@settings(deadline=None)
@given(text=TEXT, calls=CALLS)
def test_what_a_completion_says_is_parsed_back(name: str, text: str, calls: list[ToolCall]) -> None:
    dialect = DIALECTS[name]
    ids = dialect.completion(Message.assistant(text, calls), [ADD])
    assert ids[-1] in dialect.stop_token_ids and not set(ids) & set(dialect.banned_token_ids)
    parsed = dialect.parse(ids, [ADD])
    assert parsed.status == ("ok" if calls else "none")
    assert parsed.message.text == (text if name == "tiny" else text.strip())
    typed = name == "chat_template"  # JSON keeps types, the others carry text

    def expected(value: object) -> object:
        shown = value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        return shown if typed else str(shown)

    assert [(call.name, call.call_id, call.error) for call in parsed.message.tool_calls] == [
        ("add", str(n), None) for n in range(len(calls))
    ]
    assert [call.arguments for call in parsed.message.tool_calls] == [
        {name: expected(value) for name, value in call.arguments.items()} for call in calls
    ]


@ALL
@settings(deadline=None)
@given(data=st.data())
def test_no_token_sequence_makes_parse_raise(name: str, data: st.DataObject) -> None:
    dialect = DIALECTS[name]
    marks = sorted(TOKENIZERS[name].control_ids.values())
    words = [TOKENIZERS[name].encode(t) for t in ('{"name": "add", ', '"arguments": ', "{}", "}", "<function=a>")]
    token = st.integers(-1, dialect.vocab_size + 2) | st.sampled_from(marks)
    chunks = data.draw(st.lists(token.map(lambda i: [i]) | st.sampled_from(words), max_size=12))
    parsed = dialect.parse([i for chunk in chunks for i in chunk], [ADD])
    assert parsed.status in ("none", "ok", "malformed")
    parsed.message.text.encode()  # text that could not be stored would fail here
    assert (parsed.status == "malformed") == any(call.error for call in parsed.message.tool_calls)


@ALL
def test_every_truncation_of_a_call_is_malformed_or_has_no_call(name: str) -> None:
    dialect = DIALECTS[name]
    ids = dialect.completion(Message.assistant("hi", [ToolCall(name="add", arguments={"a": "1", "b": "2"})]), [ADD])
    whole = dialect.parse(ids, [ADD]).message.tool_calls
    statuses = []
    for end in range(len(ids)):
        parsed = dialect.parse(ids[:end], [ADD])
        statuses.append(parsed.status)
        if parsed.status == "ok":  # only the stop token is missing
            assert parsed.message.tool_calls == whole and dialect != "tiny"
    assert statuses[-2] == "malformed" and statuses[0] == "none"


@ALL
def test_images_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="renders text only, but a user message holds an image"):
        DIALECTS[name].prompt([Message(role="user", content=(ImagePart(data=b""),))], [])


def test_the_tiny_dialect_token_by_token() -> None:
    s = TINY.tokenizer.special_id
    system, user, assistant, result = s("<system>"), s("<user>"), s("<assistant>"), s("<result>")
    call, arg, end = s("<call>"), s("<arg>"), s("<end>")
    assert (s("<pad>"), end, call, arg, TINY.vocab_size) == (256, 257, 262, 263, 272)
    assert TINY.prompt([Message.system("S"), Message.user("u")], [ADD]) == [system, 83, user, 117, assistant]
    spoken = Message.assistant("t", [ToolCall(name="add", arguments={"a": 7, "b": "-1"})])
    ids = [116, call, 97, 100, 100, arg, 55, arg, 45, 49, end]
    assert TINY.completion(spoken, [ADD]) == ids
    assert TINY.prompt([Message.user("u"), spoken], [ADD]) == [user, 117, assistant, *ids, assistant]
    assert TINY.reply([tool_message("6"), tool_message("8", "1")], [ADD]) == [result, 54, result, 56, assistant]
    assert TINY.stop_token_ids == (end,)
    assert set(TINY.banned_token_ids) == set(range(256, 272)) - {end, call, arg}


@pytest.mark.parametrize(
    ("spoken", "error"),
    [
        ("<call><end>", "call without a tool name"),
        ("<call>add<arg>1<arg>2<arg>3<end>", "too many arguments: add takes 2, got 3"),
        ("x<arg>1<end>", "<arg> outside a call"),
        ("<call>add<arg>1", "call was cut off before <end>"),
    ],
)
def test_malformed_tiny_calls_say_what_is_wrong(spoken: str, error: str) -> None:
    parsed = TINY.parse(marked(spoken), [ADD])
    assert parsed.status == "malformed" and parsed.message.tool_calls[-1].error == error


def marked(text: str) -> list[int]:
    """Ids of text in which the tiny marks are spelled out."""
    ids: list[int] = []
    while text:
        mark = next((m for m in ByteTokenizer.SPECIALS if text.startswith(m)), None)
        ids += [TINY.tokenizer.special_id(mark)] if mark else TINY.tokenizer.encode(text[0])
        text = text[len(mark) if mark else 1 :]
    return ids


def test_tiny_calls_of_unknown_tools_and_with_too_few_arguments_are_left_to_the_environment() -> None:
    parsed = TINY.parse(marked("<call>sub<arg>1<end>"), [ADD])
    assert parsed.status == "ok" and parsed.message.tool_calls[0].arguments == {"0": "1"}
    parsed = TINY.parse(marked("<call>add<end>junk"), [ADD])
    assert parsed.status == "ok" and parsed.message.tool_calls[0].arguments == {}


def test_tiny_demonstrations_fill_gaps_with_defaults_and_refuse_what_has_no_place() -> None:
    pair = ToolSpec(name="p", description="", parameters={"properties": {"a": {"default": None}, "b": {}, "c": {}}})
    assert TINY.completion(Message.assistant("", [ToolCall(name="p", arguments={"b": True})]), [pair]) == marked(
        "<call>p<arg>null<arg>true<end>"
    )
    for arguments, match in (({"c": 1}, "needs a value for 'b'"), ({"d": 1}, "has no parameter 'd'")):
        with pytest.raises(ValueError, match=match):
            TINY.completion(Message.assistant("", [ToolCall(name="p", arguments=arguments)]), [pair])
    with pytest.raises(ValueError, match="unknown tool 'q'"):
        TINY.completion(Message.assistant("", [ToolCall(name="q")]), [pair])


def test_make_dialect_knows_the_dialects_and_names_what_is_wrong(tmp_path: Path) -> None:
    assert isinstance(make_dialect(PolicyConfig()), TinyDialect)
    chatml_tokenizer().save_pretrained(tmp_path)
    stops = [HF.special_id("<|im_end|>"), HF.special_id("<|endoftext|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    for name, kind in (("qwen3_5", QwenDialect), ("chat_template", TemplateDialect)):
        dialect = make_dialect(PolicyConfig(kind="hf", path=str(tmp_path), dialect=name))
        assert isinstance(dialect, kind)
        assert dialect.stop_token_ids == tuple(stops)  # all of them, also the second one
        assert dialect.banned_token_ids == tuple(map(HF.special_id, ("<|im_start|>", "<|image_pad|>", *ADDED[2:4])))
    with pytest.raises(ValueError, match=r"unknown policy\.dialect 'qwen'; choose tiny, qwen3_5 or chat_template"):
        make_dialect(PolicyConfig(dialect="qwen"))
    with pytest.raises(ValueError, match="no tokenizer folder at"):
        make_dialect(PolicyConfig(dialect="qwen3_5", path=str(tmp_path / "nowhere")))
