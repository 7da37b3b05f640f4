"""What an environment and a policy say to each other.

Environments never see tokens and policies never see these objects: `rollout.dialects.dialect` joins them.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPart:
    """A run of text inside a message."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePart:
    """An encoded image inside a message. A dialect without vision refuses it by name."""

    data: bytes
    """The encoded file."""
    media_type: str = "image/png"


ContentPart = TextPart | ImagePart


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call a policy made, as parsed from its tokens.

    `error` holds a short stable text where the call was malformed (unknown grammar, not JSON ...). A malformed call
    is answered with that text as an observation and never raises.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    call_id: str = ""
    """Unique within its message, e.g. "0"; results carry it back."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolResult:
    """What came back from one call. Results are returned in call order, one per call, always."""

    call_id: str
    name: str
    content: str
    error: str | None = None
    """None for a success; else its kind: "unknown_tool", "bad_arguments", "malformed", "tool_error", "timeout"."""
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolSpec:
    """A tool as a model sees it."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of an object; the order of `properties` is the order of positional arguments in compact dialects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation.

    Example: Message.user("2 + 3?"), Message.assistant(calls=[ToolCall(name="add", arguments={"a": 2, "b": 3})]).
    """

    role: Role
    content: tuple[ContentPart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of an assistant message, in the order they were made."""
    tool_result: ToolResult | None = None
    """Set on messages of role "tool" only; `content` then holds the same text, and the images a tool returned."""

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content if isinstance(part, TextPart))

    @staticmethod
    def system(text: str) -> "Message":
        return Message(role="system", content=(TextPart(text=text),))

    @staticmethod
    def user(text: str) -> "Message":
        return Message(role="user", content=(TextPart(text=text),))

    @staticmethod
    def assistant(text: str = "", calls: "tuple[ToolCall, ...] | list[ToolCall]" = ()) -> "Message":
        return Message(role="assistant", content=(TextPart(text=text),) if text else (), tool_calls=tuple(calls))

    @staticmethod
    def tool(result: ToolResult, images: tuple[ImagePart, ...] = ()) -> "Message":
        return Message(role="tool", content=(TextPart(text=result.content), *images), tool_result=result)
