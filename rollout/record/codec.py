"""Messages, tasks and turns as JSON text and back, equal in every field.

JSON is strict: a float that is not finite becomes null. A foreign object in a free-form dictionary becomes its text, so
writing never fails on what an environment put there; lists stand for tuples in such dictionaries. An image is stored
beside the text and named in it by its sha256, so that equal images (frames that repeat, members of a group) are one.
"""

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from envs.message import ContentPart, ImagePart, Message, TextPart, ToolCall, ToolResult
from envs.task import Task
from rollout.record.trajectory import EpisodeError, Turn

Images = dict[str, bytes]
"""Encoded images by sha256; what is written adds to it."""
FindImage = Callable[[str], bytes]
"""An image by its sha256."""


def to_json(value: object) -> str:
    """Strict JSON text, ASCII only (text of a policy may hold lone surrogates, which no database takes)."""
    return json.dumps(plain(value), separators=(",", ":"), allow_nan=False)


MAX_DEPTH = 64


def plain(value: object, depth: int = 0) -> Any:
    """`value` made of dict, list, str, int, finite float, bool and None only; text below MAX_DEPTH (cycles)."""
    if depth > MAX_DEPTH:
        return str(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), depth + 1)
    return str(value)


def task_to_json(task: Task) -> str:
    return to_json(asdict(task))


def task_from_json(text: str) -> Task:
    return Task(**json.loads(text))


def messages_to_json(messages: tuple[Message, ...], images: Images) -> str:
    """The images of the messages are added to `images`; the text is of no use without them."""
    return to_json([_pack_message(message, images) for message in messages])


def messages_from_json(text: str, find_image: FindImage) -> tuple[Message, ...]:
    return tuple(_unpack_message(packed, find_image) for packed in json.loads(text))


def turns_to_json(turns: tuple[Turn, ...], images: Images) -> str:
    return to_json([_pack_turn(turn, images) for turn in turns])


def turns_from_json(text: str, find_image: FindImage) -> tuple[Turn, ...]:
    return tuple(_unpack_turn(packed, find_image) for packed in json.loads(text))


def error_to_json(error: EpisodeError | None) -> str | None:
    return None if error is None else to_json(asdict(error))


def error_from_json(text: str | None) -> EpisodeError | None:
    return None if text is None else EpisodeError(**json.loads(text))


def _pack_part(part: ContentPart, images: Images) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    sha256 = hashlib.sha256(part.data).hexdigest()
    images[sha256] = part.data
    return {"image_sha256": sha256, "media_type": part.media_type}


def _unpack_part(packed: dict[str, str], find_image: FindImage) -> ContentPart:
    if "text" in packed:
        return TextPart(text=packed["text"])
    # "image" is of layout 1, which wrote images into the text
    data = base64.b64decode(packed["image"]) if "image" in packed else find_image(packed["image_sha256"])
    return ImagePart(data=data, media_type=packed["media_type"])


def _pack_message(message: Message, images: Images) -> dict[str, Any]:
    return {
        "role": message.role,
        "content": [_pack_part(part, images) for part in message.content],
        "tool_calls": [asdict(call) for call in message.tool_calls],
        "tool_result": None if message.tool_result is None else asdict(message.tool_result),
    }


def _unpack_message(packed: dict[str, Any], find_image: FindImage) -> Message:
    result = packed["tool_result"]
    return Message(
        role=packed["role"],
        content=tuple(_unpack_part(part, find_image) for part in packed["content"]),
        tool_calls=tuple(ToolCall(**call) for call in packed["tool_calls"]),
        tool_result=None if result is None else ToolResult(**result | {"seconds": _number(result["seconds"])}),
    )


def _pack_turn(turn: Turn, images: Images) -> dict[str, Any]:
    return {
        "start": turn.start,
        "end": turn.end,
        "message": _pack_message(turn.message, images),
        "reply": [_pack_message(message, images) for message in turn.reply],
        "finish_reason": turn.finish_reason,
        "parse_status": turn.parse_status,
        "sample_s": turn.sample_s,
        "env_s": turn.env_s,
    }


def _unpack_turn(packed: dict[str, Any], find_image: FindImage) -> Turn:
    return Turn(
        start=packed["start"],
        end=packed["end"],
        message=_unpack_message(packed["message"], find_image),
        reply=tuple(_unpack_message(message, find_image) for message in packed["reply"]),
        finish_reason=packed["finish_reason"],
        parse_status=packed["parse_status"],
        sample_s=_number(packed["sample_s"]),
        env_s=_number(packed["env_s"]),
    )


def _number(value: float | None) -> float:
    """A stored float; null stands for one that was not finite."""
    return math.nan if value is None else value
