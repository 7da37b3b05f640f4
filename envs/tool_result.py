"""What a policy is shown of a tool's return value."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from envs.errors import MalformedEnvironment
from envs.message import ImagePart


def as_content(value: Any) -> tuple[str, tuple[ImagePart, ...]]:
    """Text as it is, images as images, the rest as compact JSON.

    JSON as pydantic writes it: models and dataclasses as objects, enums by value, dates in ISO 8601, bytes as text; of
    numpy and torch scalars and arrays the plain numbers; sets in order, but for those inside models and dataclasses.
    Raises MalformedEnvironment for an object without a JSON form: its memory address would differ in every replay. A
    list or tuple that holds an image is shown item by item, its texts one a line.

    Example: as_content({"when": date(2026, 12, 1)}) -> ('{"when":"2026-12-01"}', ())
    """
    if isinstance(value, str) and type(value) is str:
        return value, ()
    if isinstance(value, ImagePart):
        return "", (value,)
    if isinstance(value, list | tuple) and any(isinstance(item, ImagePart) for item in value):
        texts = [as_content(item)[0] for item in value if not isinstance(item, ImagePart)]
        return "\n".join(texts), tuple(item for item in value if isinstance(item, ImagePart))
    text = _json(value)
    return (json.loads(text) if text.startswith('"') and not isinstance(value, str) else text), ()


def _json(value: Any) -> str:
    try:
        return to_json(_in_order(value), fallback=_plain, inf_nan_mode="constants").decode()
    except PydanticSerializationError as error:
        raise MalformedEnvironment(f"a tool returned what has no JSON form: {error}") from None


def _plain(value: Any) -> Any:
    """Scalars and arrays of numpy and torch know their plain form; nothing else does."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise MalformedEnvironment(
        f"a tool returned a {type(value).__module__}.{type(value).__qualname__}, which has no JSON form: return text, "
        "plain data, a dataclass or a pydantic model"
    )


def _in_order(value: Any) -> Any:
    """Sets as sorted lists, whose own order differs between processes; texts that can be encoded."""
    if isinstance(value, set | frozenset):
        return sorted((_in_order(item) for item in value), key=lambda item: to_json(item, fallback=_plain))
    if isinstance(value, dict):
        return {name: _in_order(item) for name, item in value.items()}
    if isinstance(value, str) and type(value) is str:
        return value.encode("utf-8", "replace").decode()  # half a surrogate pair is no text: nothing could store it
    return [_in_order(item) for item in value] if isinstance(value, list | tuple) else value
