"""A completion as a message, and a message as text: what every dialect shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from envs.message import ImagePart, Message, ToolCall

ParseStatus = Literal["none", "ok", "malformed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedTurn:
    """A completion as a message.

    Example: ids of 'calc<call>add<arg>2<arg>3<end>' -> text "calc", one call add(a="2", b="3"), status "ok".
    """

    message: Message
    status: ParseStatus
    """"none": no call was tried. "malformed": at least one call has `error` set."""

    @staticmethod
    def of(text: str, calls: Sequence[ToolCall]) -> "ParsedTurn":
        status: ParseStatus = "none"
        if calls:
            status = "malformed" if any(call.error for call in calls) else "ok"
        return ParsedTurn(message=Message.assistant(text, tuple(calls)), status=status)


def text_of(message: Message, dialect: str) -> str:
    """The text of a message. Raises `ValueError` where it holds an image."""
    if any(isinstance(part, ImagePart) for part in message.content):
        raise ValueError(f"dialect {dialect!r} renders text only, but a {message.role} message holds an image")
    return message.text
