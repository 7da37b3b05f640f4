"""Does a conversation come back as it went in? Asked of a dialect when it is made, before any process starts.

What a template writes another way than the parser reads it would be found out late or never: a call scored as an
answer, a result that the policy is never shown.
"""

from collections.abc import Sequence
from typing import Protocol

from envs.message import Message, ToolCall, ToolResult, ToolSpec
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.parsed_turn import ParsedTurn

ANSWER = "The answer is 42."
RESULT = "result-7351"
PROBE = ToolSpec(
    name="lookup",
    description="Find a thing.",
    parameters={"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]},
)
ONE = (ToolCall(name="lookup", arguments={"q": "red box"}, call_id="0"),)
TWO = (*ONE, ToolCall(name="lookup", arguments={"q": "blue"}, call_id="1"))


class Spoken(Protocol):
    """The part of a dialect that is asked here."""

    tokenizer: HfTokenizer

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]: ...
    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]: ...
    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]: ...
    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn: ...


def text_problem(dialect: Spoken) -> str:
    """What differs of a conversation without tools; "" where nothing does."""
    try:
        return _said(dialect, Message.assistant(ANSWER), ()) or _shown(dialect, Message.user(RESULT), ())
    except ValueError as error:
        return str(error)


def tool_problem(dialect: Spoken, *, names_tools: bool = True) -> str:
    """What differs of calls and their results; "" where nothing does. Two calls in a turn may be refused."""
    tools = (PROBE,)
    try:
        for message in (Message.assistant("", ONE), Message.assistant("Let me look.", ONE)):
            said = _said(dialect, message, tools, text_may_go=bool(message.text))
            if said:
                return said
        told = _shown(dialect, Message.tool(ToolResult(call_id="0", name="lookup", content=RESULT)), tools)
        if told:
            return told
        if names_tools and "lookup" not in dialect.tokenizer.decode(dialect.prompt([Message.user("?")], tools)):
            return "the prompt does not name the tool 'lookup'"
    except ValueError as error:
        return str(error)
    try:
        ids = dialect.completion(Message.assistant("", TWO), tools)
    except ValueError:
        return ""  # one call a turn
    return _difference(dialect.parse(ids, tools), Message.assistant("", TWO), dialect.tokenizer.decode(ids))


def _said(dialect: Spoken, message: Message, tools: Sequence[ToolSpec], *, text_may_go: bool = False) -> str:
    ids = dialect.completion(message, tools)
    return _difference(dialect.parse(ids, tools), message, dialect.tokenizer.decode(ids), text_may_go=text_may_go)


def _shown(dialect: Spoken, message: Message, tools: Sequence[ToolSpec]) -> str:
    text = dialect.tokenizer.decode(dialect.reply([message], tools))
    return "" if RESULT in text else f"a {message.role} message {RESULT!r} is shown as {text!r}"


def _difference(parsed: ParsedTurn, message: Message, text: str, *, text_may_go: bool = False) -> str:
    """`text_may_go`: many templates show no text beside a call."""
    read = [
        (call.name, {key: str(value) for key, value in call.arguments.items()}) for call in parsed.message.tool_calls
    ]
    meant = [(call.name, dict(call.arguments)) for call in message.tool_calls]
    texts = (message.text, "") if text_may_go else (message.text,)
    if read == meant and parsed.message.text in texts and parsed.status != "malformed":
        return ""
    found = f"text {parsed.message.text!r} and calls {[name for name, _ in read]}"
    return f"the turn {text!r} is read as {found}, not as text {message.text!r} and calls {[name for name, _ in meant]}"
