"""Where the parts of a run live: one process, or Ray actors. The rest of `rl` sees the same clients either way."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from envs.outcome import EnvHost
from rollout.record.trajectory import TrajectoryGroup
from rollout.schedule.lease import WorkerClient

if TYPE_CHECKING:
    from rl.algorithm.step_report import LearnerReport


class ClusterError(RuntimeError):
    """Raised when the actors of a run cannot be started."""


class LearnerClient(Protocol):
    """The learner as the controller sees it."""

    async def step(self, groups: Sequence[TrajectoryGroup]) -> "LearnerReport": ...

    async def snapshot(self) -> object:
        """A handle of the current weights that worker clients accept."""
        ...

    async def save(self, folder: str, step: int, state: dict[str, Any]) -> str:
        """Write a checkpoint of the learner and `state` (JSON). Returns its path."""
        ...

    async def restore(self, path: str) -> int:
        """Load a checkpoint's learner part. Returns the policy version."""
        ...

    async def close(self) -> None: ...


class Cluster(Protocol):
    """The started parts of a run."""

    learner: LearnerClient
    workers: Sequence[WorkerClient]
    host: EnvHost

    async def close(self) -> None: ...
