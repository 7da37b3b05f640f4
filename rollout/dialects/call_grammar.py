"""Assistant turns of the text dialects: `<think>`, `<tool_call>`, and what stands inside a call.

Ways to write a call that are read everywhere, between marks:
    {"name": "add", "arguments": {"a": 2}}                  (Hermes JSON; "parameters" in place of "arguments": Llama)
    <function=add>\\n<parameter=a>\\n2\\n</parameter>\\n</function>               (Qwen XML; values are untyped text)
Where a tokenizer has the marks as tokens only those tokens count: the same letters spelled out stay text, so that a
policy which repeats a hostile tool result calls nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from envs.message import ToolCall
from policy.model.tokenizer import Tokenizer
from rollout.dialects.parsed_turn import ParsedTurn

CALL, END_CALL, THINK, END_THINK = "<tool_call>", "</tool_call>", "<think>", "</think>"
MARKS = (CALL, END_CALL, THINK, END_THINK)
ARGUMENTS = ("arguments", "parameters")

FUNCTION = re.compile(r"<function=([^>\n]+)>(.*)</function>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|\Z))", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Mark:
    """One of MARKS as the policy sampled it, between runs of text."""

    name: str


def parse_turn(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    *,
    stop_token_ids: Sequence[int],
    starts_in_thought: bool = False,
    bare_calls: bool = False,
) -> ParsedTurn:
    """Sampled ids as a message; reasoning is left out of it and white space around its text is dropped.

    `bare_calls`: a turn that is one JSON object with a "name" and its arguments, without marks, is a call.
    """
    pieces = _after_thought(list(_pieces(tokenizer, token_ids, stop_token_ids)), starts_in_thought)
    text: list[str] = []
    calls: list[ToolCall] = []
    body: list[str] | None = None  # not None inside a call

    def malformed(error: str) -> ToolCall:
        return ToolCall(name="", call_id=str(len(calls)), error=error)

    for piece in pieces:
        if isinstance(piece, str):
            (text if body is None else body).append(piece)
        elif piece.name == CALL:
            if body is not None:
                calls.append(malformed(f"{CALL} inside a call"))
            body = []
        elif piece.name == END_CALL:
            stray = malformed(f"{END_CALL} without {CALL}")
            calls.append(stray if body is None else parse_call("".join(body), str(len(calls))))
            body = None
    if body is not None:
        calls.append(malformed(f"call was cut off before {END_CALL}"))
    said = "".join(text).strip()
    if bare_calls and not calls and said.startswith("{"):
        call = parse_call(said, "0")
        if call.error is None and _names_arguments(said):
            return ParsedTurn.of("", [call])
    return ParsedTurn.of(said, calls)


def _names_arguments(body: str) -> bool:
    return any(key in json.loads(body) for key in ARGUMENTS)


def _pieces(tokenizer: Tokenizer, token_ids: Sequence[int], stops: Sequence[int]) -> Iterator[str | Mark]:
    """Decoded text and marks, up to the first stop token. Other control tokens are dropped."""
    marks = {tokenizer.control_ids[name]: Mark(name) for name in MARKS if name in tokenizer.control_ids}
    control = frozenset(tokenizer.control_ids.values())
    spelled = [name for name in MARKS if name not in tokenizer.control_ids]
    seam = re.compile(f"({'|'.join(map(re.escape, spelled))})" if spelled else "(?!)")

    def text_pieces(run: list[int]) -> Iterator[str | Mark]:
        for piece in seam.split(tokenizer.decode(run)):
            yield Mark(piece) if piece in spelled else piece

    run: list[int] = []
    for i in map(int, token_ids):
        if i in stops:
            break
        if i not in control:
            run.append(i)
            continue
        yield from text_pieces(run)
        run = []
        if i in marks:
            yield marks[i]
    yield from text_pieces(run)


def _after_thought(pieces: list[str | Mark], starts_in_thought: bool) -> list[str | Mark]:
    """What follows the last </think>; nothing where a thought was opened and never closed."""
    ends = [n for n, piece in enumerate(pieces) if piece == Mark(END_THINK)]
    pieces = pieces[ends[-1] + 1 :] if ends else [] if starts_in_thought else pieces
    opened = next((n for n, piece in enumerate(pieces) if piece == Mark(THINK)), len(pieces))
    return pieces[:opened]


def parse_call(body: str, call_id: str) -> ToolCall:
    """The inside of one call."""
    body = body.strip()
    if body.startswith("<function="):
        return _parse_xml(body, call_id)
    if body.startswith("{"):
        return _parse_json(body, call_id)
    return ToolCall(name="", call_id=call_id, error="call is neither JSON nor <function=...>")


def _parse_json(body: str, call_id: str) -> ToolCall:
    try:
        call = json.loads(body, parse_constant=_refuse_constant)
        json.dumps(call, ensure_ascii=False).encode()  # "\ud800" is valid JSON but no text: nothing could store it
    except (ValueError, RecursionError):
        return ToolCall(name="", call_id=call_id, error="call is not valid JSON")
    name, arguments = call.get("name"), next((call[key] for key in ARGUMENTS if key in call), {})
    if not isinstance(name, str) or not name:
        return ToolCall(name="", call_id=call_id, error='call has no "name"')
    if not isinstance(arguments, dict):
        return ToolCall(name=name, call_id=call_id, error='"arguments" is not an object')
    return ToolCall(name=name, arguments=arguments, call_id=call_id)


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _parse_xml(body: str, call_id: str) -> ToolCall:
    function = FUNCTION.fullmatch(body)
    if function is None:
        return ToolCall(name="", call_id=call_id, error="<function=...> is not closed")
    name, inside = function.group(1).strip(), function.group(2)
    arguments = {m.group(1).strip(): m.group(2) for m in PARAMETER.finditer(inside)}
    if PARAMETER.sub("", inside).strip():
        return ToolCall(name=name, call_id=call_id, error="text outside <parameter=...> blocks")
    return ToolCall(name=name, arguments=arguments, call_id=call_id)


def xml_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Qwen writes it, marks included."""
    parameters = "".join(f"<parameter={key}>\n{_xml_value(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"{CALL}\n<function={name}>\n{parameters}</function>\n{END_CALL}"


def _xml_value(value: Any) -> str:
    # the model's own template writes Python's str() of scalars ("True"), and JSON of lists and objects
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)
