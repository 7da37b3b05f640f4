"""What an environment host answers to a rollout worker. Failures are data: a host never raises for an environment."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from envs.message import Message, ToolSpec
from envs.task import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvFailure:
    """An environment that raised, hung or returned garbage. Its episode has reward None."""

    kind: str
    """"env" (the author's code) | "infra" (the host or the machine)."""
    where: str
    """"construct" | "reset" | "step" | "reward"."""
    message: str
    traceback: str = ""
    """The author's own traceback, without our frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResetOutcome:
    """The start of an episode."""

    messages: tuple[Message, ...] = ()
    tools: tuple[ToolSpec, ...] = ()
    max_turns: int = 8
    problem_digest: str = ""
    """sha256 of the environment's class and version, the prompt and the hidden state: equal digests mean equal
    problems, at whatever level they were drawn."""
    meta: dict[str, Any] = field(default_factory=dict)
    failure: EnvFailure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """The answer to one assistant message."""

    messages: tuple[Message, ...] = ()
    """New messages only."""
    reward: float | None = None
    """Set when the episode ended (terminated or truncated), None before."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    terminated: bool = False
    truncated: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts for metrics, cumulative: {"num_tool_calls": 2, "num_tool_errors": 0, "needs_tool": True, ...}."""
    seconds: float = 0.0
    failure: EnvFailure | None = None


class EnvHost(Protocol):
    """Hosts environments by key; `EnvPool` in this process, or a client of a pool actor. One key = one episode."""

    async def open(self, key: str, task: Task) -> ResetOutcome:
        """Make the task's environment and reset it."""
        ...

    async def step(self, key: str, message: Message) -> StepOutcome: ...

    async def finish(self, key: str) -> StepOutcome:
        """End a running episode from outside (token or turn limit, deadline) and score it as it stands."""
        ...

    async def close(self, key: str) -> None:
        """Forget the episode and free what it holds. Unknown keys are ignored."""
        ...

    async def digests(self, tasks: list[Task]) -> list[str]:
        """Problem digests of tasks, without opening episodes."""
        ...
