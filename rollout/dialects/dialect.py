"""Messages to tokens and back: what a dialect must do, and which one a policy speaks.

Token-in-token-out: the first prompt is rendered once; afterwards a conversation only grows by sampled ids and by
`reply` ids. History is never decoded and encoded again (pitfalls A6). Text from an environment can never become a
control token, in any dialect.

Images stay data: a dialect that accepts them writes one placeholder for each, in the order of the conversation, and
`Trajectory.images` holds them in that order. How many tokens a placeholder stands for is a vision processor's to say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from conf.schema import PolicyConfig
from envs.message import ImagePart, Message, ToolCall, ToolSpec
from policy.model.tokenizer import Tokenizer

ParseStatus = Literal["none", "ok", "malformed"]

VISION_POLICIES: frozenset[str] = frozenset()
"""Values of `policy.kind` whose model sees images. None so far: placeholders are written, no model reads them."""


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


class Renderer(Protocol):
    """One dialect. The invariant: prompt + completion + reply + completion + reply ... is what the policy sees."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a turn."""
        ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Control tokens that a policy may never sample: padding, role marks, media placeholders."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def accepts_images(self) -> bool:
        """Messages may hold images; else every method raises `ValueError` for one that does."""
        ...

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """The whole first prompt, generation header included. Raises `ValueError` for what cannot be rendered."""
        ...

    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        """What follows a completion that ended with a stop token: new messages and the next generation header."""
        ...

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        """An assistant message as a policy would sample it, stop token included."""
        ...

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        """The given ids behind which a turn is a call of the tool `name`, of any where it is "". Raises `ValueError`
        where this dialect cannot begin a turn so."""
        ...

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        """Sampled ids as a message. Never raises: a bad or truncated call becomes a `ToolCall` with `error`."""
        ...


def text_of(message: Message, dialect: str) -> str:
    """The text of a message. Raises `ValueError` where it holds an image."""
    if any(isinstance(part, ImagePart) for part in message.content):
        raise ValueError(f"dialect {dialect!r} renders text only, but a {message.role} message holds an image")
    return message.text


def sees_images(config: PolicyConfig) -> bool:
    """Whether the policy's model can be shown images."""
    return config.kind in VISION_POLICIES


def make_renderer(config: PolicyConfig) -> Renderer:
    """The renderer that `config.dialect` names. Raises `ValueError` for an unknown dialect or a missing folder."""
    # imported late: the tiny dialect must not pay for transformers
    if config.dialect == "tiny":
        from rollout.dialects.tiny_dialect import TinyRenderer

        return TinyRenderer()
    if config.dialect == "qwen3_5":
        from rollout.dialects.qwen_dialect import QwenRenderer

        return QwenRenderer.load(config.path, accepts_images=sees_images(config))
    if config.dialect == "chat_template":
        from rollout.dialects.template_dialect import TemplateRenderer

        return TemplateRenderer.load(config.path)
    raise ValueError(f"unknown policy.dialect {config.dialect!r}; choose tiny, qwen3_5 or chat_template")
