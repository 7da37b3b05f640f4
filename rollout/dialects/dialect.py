"""Messages to tokens and back: what a dialect must do, and which one a policy speaks.

Token-in-token-out: the first prompt is rendered once; afterwards a conversation only grows by sampled ids and by
`reply` ids. History is never decoded and encoded again: the ids would differ from those that were sampled. Text from an
environment can never become a control token, in any dialect.

Images stay data: a dialect that accepts them writes one placeholder for each, in the order of the conversation, and
`Trajectory.images` holds them in that order. How many tokens a placeholder stands for is a vision processor's to say.
"""

from collections.abc import Sequence
from typing import Protocol

from conf.schema import PolicyConfig
from envs.message import Message, ToolSpec
from policy.model.tokenizer import Tokenizer
from rollout.dialects.parsed_turn import ParsedTurn

VISION_POLICIES: frozenset[str] = frozenset()
"""Values of `policy.kind` whose model sees images. None so far: placeholders are written, no model reads them."""


class Dialect(Protocol):
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

    def check_tools(self) -> None:
        """Raises `ValueError`, with the text that differs, where calls or results do not come back as they went in."""
        ...

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        """The given ids behind which a turn is a call of the tool `name`, of any where it is "". Raises `ValueError`
        where this dialect cannot begin a turn so."""
        ...

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        """Sampled ids as a message. Never raises: a bad or truncated call becomes a `ToolCall` with `error`."""
        ...


def sees_images(config: PolicyConfig) -> bool:
    """Whether the policy's model can be shown images."""
    return config.kind in VISION_POLICIES


def make_dialect(config: PolicyConfig) -> Dialect:
    """The dialect that `config.dialect` names. Raises `ValueError` for an unknown dialect or a missing folder."""
    # imported late: the tiny dialect must not pay for transformers
    if config.dialect == "tiny":
        from rollout.dialects.tiny_dialect import TinyDialect

        return TinyDialect()
    if config.dialect == "qwen3_5":
        from rollout.dialects.qwen_dialect import QwenDialect

        return QwenDialect.load(config.path, accepts_images=sees_images(config), thinking=config.thinking)
    if config.dialect == "chat_template":
        from rollout.dialects.template_dialect import TemplateDialect

        return TemplateDialect.load(config.path, thinking=config.thinking)
    raise ValueError(f"unknown policy.dialect {config.dialect!r}; choose tiny, qwen3_5 or chat_template")
