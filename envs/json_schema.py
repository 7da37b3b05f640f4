"""A policy's arguments by a JSON schema that was written elsewhere, such as by an MCP server."""

import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from envs.errors import BadArguments, MalformedEnvironment

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

_SHOWN_NAME_CHARS = 32
_SHOWN_CHARS = 200
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
    "minLength": "of length at least",
    "maxLength": "of length at most",
    "pattern": "matching",
    "minItems": "of at least so many items:",
    "maxItems": "of at most so many items:",
}
"""Keyword of JSON schema -> how its bound is said."""


def parser_of(tool_name: str, schema: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What converts and checks arguments: the `parse` of a tool. Raises MalformedEnvironment for an invalid schema."""
    from jsonschema import SchemaError

    try:
        return functools.partial(parse, _validator(json.dumps(schema)))
    except SchemaError as error:
        raise MalformedEnvironment(f"tool {tool_name}: invalid schema: {error.message[:_SHOWN_CHARS]}") from None


@functools.lru_cache(maxsize=1024)  # checking a schema takes milliseconds, and every episode lists the same tools
def _validator(schema_json: str) -> "Draft202012Validator":
    from jsonschema import Draft202012Validator
    from referencing import Registry

    schema = json.loads(schema_json)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema, registry=Registry())  # an empty registry: no reference is ever downloaded


def parse(validator: "Draft202012Validator", arguments: dict[str, Any]) -> dict[str, Any]:
    """Convert arguments that do not fit, as untyped dialects send them, or raise BadArguments.

    Text is read as JSON and a number as text where the schema wants that: "7" -> 7, 75001 -> "75001". What fits stays.
    """
    try:
        errors = list(validator.iter_errors(arguments))
        if errors:
            wrong = {error.path[0] for error in errors if error.path}
            arguments = {name: _converted(value) if name in wrong else value for name, value in arguments.items()}
            if not validator.is_valid(arguments):
                raise BadArguments(_complaint(errors[0], arguments))
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # as it will travel
    except (UnicodeEncodeError, RecursionError, OverflowError):
        raise BadArguments("arguments are no plain JSON") from None
    except ValueError as error:
        raise error if isinstance(error, BadArguments) else BadArguments("arguments are no plain JSON") from None
    return arguments


def _converted(value: Any) -> Any:
    if isinstance(value, str):
        return read_json(value)
    return json.dumps(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def read_json(value: Any) -> Any:
    """Text as the JSON it holds; whatever else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def wanted(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """What a value must be, in words that a policy can learn from; "" where the schema does not say. At most 200 chars.

    Example: wanted({"enum": ["a", "b"]}, {}) -> 'one of "a", "b"'; wanted({"type": "integer", "maximum": 5}, {}) ->
    "integer at most 5"
    """
    if reference := schema.get("$ref"):
        return wanted(definitions.get(str(reference).rpartition("/")[2], {}), {})
    if "const" in schema:
        return json.dumps(schema["const"], ensure_ascii=False)[:_SHOWN_CHARS]
    if "enum" in schema:
        return f"one of {', '.join(json.dumps(value, ensure_ascii=False) for value in schema['enum'])}"[:_SHOWN_CHARS]
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        texts = [wanted(choice, definitions) for choice in choices]
        return " or ".join(texts)[:_SHOWN_CHARS] if all(texts) else ""
    kind = schema.get("type")
    bounds = [f"{words} {schema[name]}" for name, words in BOUNDS.items() if name in schema]
    if "minimum" in schema and "maximum" in schema:  # short: a policy pays for each word
        bounds = [f"{schema['minimum']} to {schema['maximum']}"]
    return f"{kind} {' and '.join(bounds)}".strip()[:_SHOWN_CHARS] if isinstance(kind, str) else ""


def _complaint(error: "ValidationError", arguments: dict[str, Any]) -> str:
    """A short stable text: the policy reads it."""
    schema: Any = error.schema
    properties = schema.get("properties", {}) if not error.path else {}
    if error.path:
        name = str(error.path[0])[:_SHOWN_NAME_CHARS]
        text = wanted(schema, {}) if len(error.path) == 1 else ""
        return f"{name} must be {text}" if text else f"bad {name}"
    if error.validator == "required":
        return f"missing {next(name for name in schema['required'] if name not in arguments)[:_SHOWN_NAME_CHARS]}"
    if error.validator == "additionalProperties":
        return f"no argument {next(iter(arguments.keys() - properties.keys()), '')[:_SHOWN_NAME_CHARS]}"
    return "bad arguments"
