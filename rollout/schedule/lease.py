"""What the scheduler hands to a worker and what a worker looks like from outside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from envs.task import Task
from policy.engine.protocol import EngineStats
from rollout.record.trajectory import Trajectory, TrajectoryGroup


class NotReady(RuntimeError):
    """Raised when a worker does not hold the version a lease asks for within the lease's deadline."""


class WorkerLost(RuntimeError):
    """Raised by a worker client when the worker's process died or does not answer; its leases are given out again."""

    def __init__(self, message: str, *, worker: str = "") -> None:
        """`worker`: its name."""
        super().__init__(message)
        self.worker = worker


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to produce one group, once."""

    group_id: str
    task: Task
    attempt: int
    min_version: int
    """Oldest policy version that may sample it."""
    deadline_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStatus:
    """What a heartbeat answers."""

    name: str
    policy_version: int
    groups: int
    """Leases running."""
    episodes: int
    engine: EngineStats
    pid: int


class WorkerClient(Protocol):
    """A worker as the scheduler sees it: this class in one process, or a Ray actor behind the same methods."""

    name: str

    async def run_lease(self, lease: Lease) -> TrajectoryGroup: ...

    async def load_weights(self, snapshot: object) -> int: ...

    async def pin(self, version: int) -> None: ...

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]: ...

    async def status(self) -> WorkerStatus: ...

    async def restart(self) -> None: ...

    async def close(self) -> None: ...
