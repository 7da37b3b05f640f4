"""Policies that solve nothing: an environment that pays them teaches them.

Each is a generator of assistant messages that never ends: where an environment answers a text, they go on.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from itertools import chain, count, cycle
from typing import Any

from envs.base import Observation, Oracle, say
from envs.check.subject import Policy, Start
from envs.message import Message, ToolCall, ToolSpec

GARBAGE = ("nan", "inf", "-1e999", "{}", "\x00\ud800\u202e", "x" * 20_000)
GUESSES = ("0", "1", "2", "yes", "no", "true", "false", "A", "B", "none")
MAX_CALLS_MADE = 12
"""Calls that an always-calling policy makes before it says "done"."""
_EDGE = 6
"""Words and numbers from either end of a text that a cheater tries by position."""
_WORD = re.compile(r"-?\d+(?:\.\d+)?|[^\W\d_]+(?:[-'_][^\W_]+)*")


def always_say(text: str) -> Policy:
    """Says the same in every task."""

    def policy(start: Start, rng: random.Random) -> Oracle:
        while True:
            yield say(text)

    return policy


def random_text(start: Start, rng: random.Random) -> Oracle:
    """Printable characters, another text in every task."""
    while True:
        yield say("".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 40))))


def random_number(start: Start, rng: random.Random) -> Oracle:
    """A number of one to four digits."""
    while True:
        yield say(str(rng.randrange(10 ** rng.randint(1, 4))))


def repeat_prompt(start: Start, rng: random.Random) -> Oracle:
    """Says the prompt again."""
    while True:
        yield say(start.prompt)


def always_call(tool_name: str | None) -> Policy:
    """Calls one tool, or all in turn where None, with arguments made from the schema; then says "done"."""

    def policy(start: Start, rng: random.Random) -> Oracle:
        chosen = [spec for spec in start.tools if tool_name in (None, spec.name)]
        for n, spec in zip(range(MAX_CALLS_MADE), cycle(chosen), strict=False):
            arguments = made_arguments(spec, n // len(chosen))
            yield Message.assistant(calls=[ToolCall(name=spec.name, arguments=arguments, call_id="0")])
        while True:
            yield say("done")

    return policy


def replay(actions: tuple[Message, ...]) -> Policy:
    """Says what was said before; silence where more is asked for."""

    def policy(start: Start, rng: random.Random) -> Oracle:
        said = chain(actions, itertools.repeat(say("")))
        while True:  # not `yield from`, which would send the replies into the iterator
            yield next(said)

    return policy


# --- arguments from a schema ----------------------------------------------------------------------------------------


def made_arguments(spec: ToolSpec, n: int) -> dict[str, Any]:
    """The n-th set of arguments that fits a tool's schema: enumerations in turn, small numbers, short texts."""
    schema = spec.parameters
    properties = schema.get("properties", {})
    required = set(schema.get("required", properties))
    return {name: _made(part, schema, n) for name, part in properties.items() if name in required}


def _made(schema: Any, root: Mapping[str, Any], n: int, depth: int = 0) -> Any:
    if not isinstance(schema, Mapping) or depth > 8:
        return None
    if "$ref" in schema:
        target: Any = root
        for key in str(schema["$ref"]).removeprefix("#/").split("/"):
            target = target.get(key, {})
        return _made(target, root, n, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return _made(schema[key][n % len(schema[key])], root, n, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][n % len(schema["enum"])]
    kind = schema.get("type", "string")
    if kind == "object":
        properties = schema.get("properties", {})
        return {name: _made(part, root, n, depth + 1) for name, part in properties.items()}
    if kind == "array":
        items = schema.get("prefixItems") or [schema.get("items", {})] * max(1, int(schema.get("minItems", 1)))
        return [_made(item, root, n, depth + 1) for item in items]
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
        high = schema.get("maximum", low + 1000)
        return low + (n * 7) % max(1, int(high - low) + 1)
    return {"boolean": n % 2 == 0, "null": None}.get(str(kind), "abc"[n % 3] * max(1, int(schema.get("minLength", 1))))


# --- the cheater ----------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Words and numbers of a text, in order. Example: "47*385=?" -> ["47", "385"]."""
    return _WORD.findall(text)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(path, text) of every plain value inside nested data. Example: {"a": [5]} -> ("a.0", "5")."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}" if path else str(index))
    else:
        yield path, str(value)


def spec_text(tools: tuple[ToolSpec, ...]) -> str:
    """Everything that the tool list says."""
    return "\n".join(
        f"{spec.name} {spec.description} {' '.join(text for _, text in leaves(spec.parameters))}" for spec in tools
    )


def misuse(tools: tuple[ToolSpec, ...]) -> Message:
    """One message of calls that no environment should answer with anything of worth."""
    names = ["answer", *(spec.name for spec in tools)]
    calls = [
        ToolCall(name=name, arguments={"no_such_argument": "\ud800"}, call_id=str(n)) for n, name in enumerate(names)
    ]
    return Message.assistant(calls=calls[:16])


def readings(start: Start, errors: Observation) -> dict[str, str]:
    """What a cheater may say without having used a tool rightly: {where it read it: text}.

    `errors` are the replies to `misuse`. Results of calls that worked are no cheating: an oracle answers from them.
    """
    failed = [m for m in errors if m.tool_result is not None and m.tool_result.error is not None]
    texts = {
        "prompt": start.prompt,
        "system text": start.system,
        "tool list": spec_text(start.tools),
        "error texts": "\n".join(message.text for message in failed),
        "info": "\n".join(text for _, text in leaves(start.meta)),
    }
    said = {f"info {path}": text for path, text in leaves(start.meta)}
    for source, text in texts.items():
        if source != "prompt":
            said[f"all of the {source}"] = text
        words = words_of(text)
        said[f"every word of the {source}"] = " ".join(words)
        numbers = [word for word in words if word[-1].isdigit()]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        for what, found in (("word", words), ("number", numbers), ("line", lines if len(lines) > 1 else [])):
            said |= {f"{what} {n + 1} of the {source}": item for n, item in zip(range(_EDGE), found, strict=False)}
            backwards = zip(count(1), reversed(found[-_EDGE:]), strict=False)
            said |= {f"{what} {n} from the end of the {source}": item for n, item in backwards}
    return {where: text for where, text in said.items() if text}


def reader(where: str) -> Policy:
    """Answers with what stands at one place of `readings`."""

    def policy(start: Start, rng: random.Random) -> Oracle:
        errors = (yield misuse(start.tools)) if "error texts" in where else ()
        while True:
            yield say(readings(start, errors).get(where, ""))

    return policy
