"""What an episode is given before it begins: its task, its names, the parts it plays with, its bounds."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from envs.outcome import EnvHost
from envs.task import Task
from policy.engine.protocol import Engine
from rollout.dialects.dialect import Dialect
from rollout.play.swap_lock import RolloutLock


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSettings:
    """How the episodes of a run are sampled and bounded."""

    temperature: float
    other_temperatures: bool = False
    """An agent may ask for another temperature. Not in training: the learner computes logprobs at `temperature`."""
    max_turn_tokens: int
    """Most tokens of one turn."""
    max_turns: int
    """Most turns; 0 = the environment's own limit. The smaller of both holds."""
    max_model_tokens: int
    """Most tokens of the whole conversation."""
    deadline_s: float
    """Past it an episode ends and is scored as it stands."""
    score_timeout_s: float = 120.0
    """Longest wait for the score of an episode that a limit ended; must exceed the host's own reward deadline."""
    seed: int
    """Of the run."""
    salt: str = ""
    """Tells apart uses of one run that may meet the same group id, such as evaluations."""

    def sampling_seed(self, group_id: str, member: int, turn: int) -> int:
        """The same for every attempt of a turn, and in every process: a retried episode samples the same tokens."""
        name = f"{self.seed}/{self.salt}/{group_id}/{member}/{turn}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeContext:
    """Everything an episode is given. A group plays copies of one context that differ in `member` and `retry`.

    Example: EpisodeContext(task=task, group_id="train/7", member=2, ...).key -> "train/7/2@0.0"
    """

    task: Task
    """The problem to solve."""
    group_id: str
    """Of the group this episode belongs to; unique within a run."""
    member: int = 0
    """0 to G-1 inside the group. It decides the sampling seeds."""
    attempt: int = 0
    """Of the lease: how many workers were given this group before."""
    retry: int = 0
    """Tries of this member inside the lease, from 0."""
    worker: str = ""
    """Name of the worker that plays it."""
    session: str = ""
    """A key that a server chose for its one session; empty = the key is made of the ids above."""
    host: EnvHost | None
    """Where the environments live. None: a session without a task, which only its agent can score."""
    engine: Engine
    """Samples the tokens."""
    dialect: Dialect
    """Writes messages as tokens and reads sampled tokens as messages."""
    settings: EpisodeSettings
    """Temperature, limits and seed."""
    lock: RolloutLock
    """Held by units that must see one policy version; a weight swap waits for it."""
    failpoint: Callable[[str], None] = lambda phase: None
    """Called with "reset", "sample" and "tool" on entering them: a test may end the process there."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, from any zero."""

    @property
    def key(self) -> str:
        """Names its environment and engine session. Every try has its own, so a late answer to an earlier try can
        never reach this one."""
        return self.session or f"{self.group_id}/{self.member}@{self.attempt}.{self.retry}"

    @property
    def trajectory_id(self) -> str:
        return f"{self.group_id}/{self.member}"

    def sampling_seed(self, turn: int) -> int:
        return self.settings.sampling_seed(self.group_id, self.member, turn)
