"""The record of an episode: tokens and what was known when each was sampled.

Letters: L tokens of a trajectory, G trajectories of a group, M sparse layers, k experts per token.
Tokens are the record (pitfalls I1, I2): arrays are only ever appended to, `loss_mask` is 1 exactly on sampled tokens,
and nothing is decoded and encoded again on the way to the learner.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from envs.message import ImagePart, Message
from envs.task import Task


class StopReason(StrEnum):
    """Why a trajectory ended. Exactly one per trajectory."""

    TERMINATED = "terminated"
    """The environment ended the episode."""
    TRUNCATED_TURNS = "truncated_turns"
    """The environment's turn limit was reached."""
    TRUNCATED_TOKENS = "truncated_tokens"
    """A turn or the conversation reached its token limit before the policy ended its turn."""
    DEADLINE = "deadline"
    """The episode's deadline passed; what was sampled is kept and scored as it stands."""
    ENV_ERROR = "env_error"
    """The environment's own code raised or returned garbage: reward is None, never trained on."""
    INFRA_ERROR = "infra_error"
    """A pool, engine or machine failed: reward is None, the episode is retried."""
    CANCELLED = "cancelled"
    """The run was stopped: reward is None."""

    @property
    def is_error(self) -> bool:
        return self in (StopReason.ENV_ERROR, StopReason.INFRA_ERROR, StopReason.CANCELLED)

    @property
    def is_truncated(self) -> bool:
        return self in (StopReason.TRUNCATED_TURNS, StopReason.TRUNCATED_TOKENS, StopReason.DEADLINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeError:
    """A failure kept as data."""

    kind: str
    """"env" | "infra" | "policy"."""
    where: str
    """"reset" | "step" | "reward" | "close" | "sample" | "render"."""
    message: str
    traceback: str = ""
    """The author's traceback where an environment failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One completion inside a trajectory and what the environment answered.

    Example: token_ids[start:end] of the trajectory are exactly the sampled tokens of this turn.
    """

    start: int
    end: int
    message: Message
    """The completion as parsed."""
    reply: tuple[Message, ...] = ()
    finish_reason: str = "stop"
    parse_status: str = "none"
    """"none" (no call) | "ok" | "malformed"."""
    sample_s: float = 0.0
    env_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """The recorded tokens of one episode.

    Example: prompt [7, 8], sampled [9, 2], tool reply [5], sampled [6, 2] ->
    token_ids [7,8,9,2,5,6,2], loss_mask [0,0,1,1,0,1,1], policy_versions [-1,-1,3,3,-1,4,4].
    """

    trajectory_id: str
    """"<group_id>/<member>"."""
    group_id: str
    task: Task
    member: int
    """0..G-1 inside the group."""
    token_ids: np.ndarray
    """(L,) int32."""
    loss_mask: np.ndarray
    """(L,) uint8: 1 exactly on sampled tokens."""
    rollout_logprobs: np.ndarray
    """(L,) float32: 0 where loss_mask is 0."""
    policy_versions: np.ndarray
    """(L,) int32: -1 where loss_mask is 0."""
    turns: tuple[Turn, ...]
    prompt: tuple[Message, ...] = ()
    reward: float | None
    """Sum of the parts; None where the episode failed. None never becomes 0."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    stop_reason: StopReason
    error: EpisodeError | None = None
    temperature: float = 1.0
    """Sampling temperature of every sampled token."""
    routed_experts: np.ndarray | None = None
    """(L, M, k) int16; -1 where no route is known."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts from the environment for metrics: {"needs_tool": False, "num_tool_calls": 1, ...}."""
    problem_digest: str = ""
    """sha256 of the problem's content; equal digests mean equal problems."""
    attempt: int = 0
    worker: str = ""
    engine: str = ""
    """Kind of engine that sampled it: "local" | "vllm"."""
    seconds: float = 0.0
    """Wall time of the episode."""
    env_seconds: float = 0.0
    """Of it, time waiting for the environment."""

    @property
    def num_turns(self) -> int:
        return len(self.turns)

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """Images in the order they were shown: the k-th belongs to the k-th image placeholder of `token_ids`.

        Those of a last reply that no turn followed have no placeholder.
        """
        messages = [*self.prompt, *(message for turn in self.turns for message in turn.reply)]
        return tuple(part for message in messages for part in message.content if isinstance(part, ImagePart))

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def min_policy_version(self) -> int:
        """Oldest version that sampled one of its tokens; -1 if none was sampled."""
        sampled = self.policy_versions[self.loss_mask == 1]
        return int(sampled.min()) if sampled.size else -1

    @property
    def max_policy_version(self) -> int:
        sampled = self.policy_versions[self.loss_mask == 1]
        return int(sampled.max()) if sampled.size else -1

    @property
    def is_trainable(self) -> bool:
        """Has a reward and at least one sampled token."""
        return self.reward is not None and not self.stop_reason.is_error and bool(self.loss_mask.any())


@dataclass(frozen=True, kw_only=True, slots=True)
class TrajectoryGroup:
    """G trajectories of one task: the unit of leasing, accounting and advantage."""

    group_id: str
    """"<task_id>"; unique within a run."""
    task: Task
    attempt: int
    """Of the lease that produced it."""
    trajectories: tuple[Trajectory, ...]

    @property
    def rewards(self) -> list[float | None]:
        return [t.reward if t.is_trainable else None for t in self.trajectories]

    @property
    def min_policy_version(self) -> int:
        versions = [t.min_policy_version for t in self.trajectories if t.loss_mask.any()]
        return min(versions) if versions else -1

    @property
    def is_degenerate(self) -> bool:
        """All valid rewards equal: no learning signal."""
        valid = [r for r in self.rewards if r is not None]
        return len(valid) < 2 or max(valid) - min(valid) <= 1e-6
