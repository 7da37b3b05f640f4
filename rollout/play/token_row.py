"""One row of tokens of an episode and the turns in it. Our own episodes have one; an agent that rewrites its history
begins another."""

from dataclasses import dataclass, field, replace

from envs.message import Message
from policy.engine.protocol import Completion
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import Turn


@dataclass(kw_only=True, slots=True)
class TokenRow:
    """Example: row.take(completion, message, parse_status="none", sample_s=0.1); row.reply((result,), env_s=0.2)."""

    temperature: float
    """Sampling temperature of all its sampled tokens."""
    prompt: tuple[Message, ...] = ()
    """The messages before its first turn."""
    record: TokenRecord = field(default_factory=TokenRecord)
    """The tokens so far."""
    turns: list[Turn] = field(default_factory=list)
    """The completions in `record`, in order."""

    def take(self, completion: Completion, message: Message, *, parse_status: str, sample_s: float) -> None:
        """Add a sampled turn. Raises `EngineError` for one that cannot be trained on."""
        start = len(self.record)
        self.record.append_sampled(completion)
        self.turns.append(
            Turn(
                start=start,
                end=len(self.record),
                message=message,
                finish_reason=completion.finish_reason,
                parse_status=parse_status,
                sample_s=sample_s,
            )
        )

    def reply(self, messages: tuple[Message, ...], *, env_s: float = 0.0) -> None:
        """Note what the last turn was answered. The tokens follow with the next turn."""
        self.turns[-1] = replace(self.turns[-1], reply=messages, env_s=env_s)
