"""The compact dialect of the tiny models: every mark is one token, and tools have no header.

    <system>text<user>text<assistant>text<call>name<arg>value<arg>value<end><result>text<assistant>text<end>

Arguments are positional, in the order of the tool schema's properties, and stay strings: the environment coerces them.
"""

import json
from collections.abc import Sequence
from itertools import islice, takewhile

from envs.message import Message, ToolCall, ToolSpec
from policy.model.tokenizer import ByteTokenizer
from rollout.dialects.parsed_turn import ParsedTurn, text_of

ROLE_MARKS = {"system": "<system>", "user": "<user>", "assistant": "<assistant>", "tool": "<result>"}


class TinyDialect:
    """Example: reply([Message.tool(...5...)]) -> [<result>, 53, <assistant>]."""

    accepts_images = False

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        special = self.tokenizer.special_id
        self._end, self._call, self._arg = special("<end>"), special("<call>"), special("<arg>")
        self._roles = {role: special(mark) for role, mark in ROLE_MARKS.items()}
        sampled = {self._end, self._call, self._arg}
        self.stop_token_ids: tuple[int, ...] = (self._end,)
        self.banned_token_ids: tuple[int, ...] = tuple(
            i for i in self.tokenizer.control_ids.values() if i not in sampled
        )
        self.vocab_size = self.tokenizer.vocab_size

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        ids: list[int] = []
        for message in messages:
            ids.append(self._roles[message.role])
            if message.role == "assistant":
                ids += self.completion(message, tools)
            else:
                ids += self.tokenizer.encode(text_of(message, "tiny"))
        return [*ids, self._roles["assistant"]]

    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        return self.prompt(messages, tools)

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        ids = self.tokenizer.encode(text_of(message, "tiny"))
        for call in message.tool_calls:
            ids += [self._call, *self.tokenizer.encode(call.name)]
            for value in positional(call, tools):
                ids += [self._arg, *self.tokenizer.encode(value)]
        return [*ids, self._end]

    def check_tools(self) -> None:
        """Calls and results come back by construction; tests draw them."""

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        return [self._call, *self.tokenizer.encode(name)]

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        turn = list(takewhile(lambda i: i != self._end, map(int, token_ids)))
        text, *segments = split(turn, self._call)
        calls = [self._parse_call(str(n), segment, tools) for n, segment in enumerate(segments)]
        if calls and len(turn) == len(token_ids):
            calls[-1] = ToolCall(name=calls[-1].name, call_id=calls[-1].call_id, error="call was cut off before <end>")
        if self._arg in text:
            calls.append(ToolCall(name="", call_id=str(len(calls)), error="<arg> outside a call"))
        return ParsedTurn.of(self.tokenizer.decode(text), calls)

    def _parse_call(self, call_id: str, segment: list[int], tools: Sequence[ToolSpec]) -> ToolCall:
        name, *values = (self.tokenizer.decode(part) for part in split(segment, self._arg))
        if not name:
            return ToolCall(name="", call_id=call_id, error="call without a tool name")
        properties = _properties(name, tools)
        if properties is None:  # the environment answers unknown tools; positions are all that is known
            return ToolCall(name=name, arguments={str(n): v for n, v in enumerate(values)}, call_id=call_id)
        if len(values) > len(properties):
            error = f"too many arguments: {name} takes {len(properties)}, got {len(values)}"
            return ToolCall(name=name, call_id=call_id, error=error)
        return ToolCall(name=name, arguments=dict(zip(properties, values, strict=False)), call_id=call_id)


def positional(call: ToolCall, tools: Sequence[ToolSpec]) -> list[str]:
    """Values of a call in schema order, gaps filled with the schema's defaults.

    Raises `ValueError` where the schema has no such tool or parameter, or a gap has no default.
    """
    properties = _properties(call.name, tools)
    if properties is None:
        raise ValueError(f"call of unknown tool {call.name!r}; there are {[tool.name for tool in tools]}")
    if stray := call.arguments.keys() - properties.keys():
        raise ValueError(f"{call.name} has no parameter {min(stray)!r}; it takes {list(properties)}")
    values: list[str] = []
    num_given = max((n for n, name in enumerate(properties, 1) if name in call.arguments), default=0)
    for name, schema in islice(properties.items(), num_given):
        if name not in call.arguments and "default" not in schema:
            raise ValueError(f"{call.name} needs a value for {name!r}: arguments are positional")
        values.append(as_text(call.arguments.get(name, schema.get("default"))))
    return values


def as_text(value: object) -> str:
    """A JSON value as an argument's text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def split(ids: list[int], mark: int) -> list[list[int]]:
    """Split at every `mark`; like str.split, at least one part comes back."""
    parts: list[list[int]] = [[]]
    for i in ids:
        if i == mark:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


def _properties(name: str, tools: Sequence[ToolSpec]) -> dict[str, dict] | None:
    return next((tool.parameters.get("properties", {}) for tool in tools if tool.name == name), None)
