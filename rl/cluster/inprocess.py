"""Everything in this process: breakpoints work, nothing is pickled, the same classes run."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from conf.checks import secret_values
from conf.schema import TrainConfig
from envs.outcome import EnvHost
from rl.cluster.protocol import ClusterError, LearnerClient
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.lease import Lease, WorkerClient, WorkerStatus

if TYPE_CHECKING:
    from envs.pool.pool_limits import PoolLimits
    from envs.task import Task
    from rollout.worker import RolloutWorker


class InProcessWorker:
    """A `WorkerClient` over a worker in this process. Model steps run in the engine's thread."""

    def __init__(self, worker: "RolloutWorker") -> None:
        self.name = worker.name
        self._worker = worker

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        return await self._worker.run_lease(lease)

    async def load_weights(self, snapshot: Any) -> int:
        return await self._worker.load_weights(snapshot)

    async def pin(self, version: int) -> None:
        await self._worker.pin(version)

    async def evaluate(self, tasks: "Sequence[Task]", temperature: float, label: str) -> list[Trajectory]:
        return await self._worker.evaluate(tasks, temperature, label)

    async def status(self) -> WorkerStatus:
        return await self._worker.status()

    async def restart(self) -> None:
        raise ClusterError(f"worker {self.name} runs in this process and cannot be restarted")

    async def close(self) -> None:
        await self._worker.close()


class InProcessCluster:
    """Everything in this process: breakpoints work, nothing is pickled, the same classes run."""

    def __init__(
        self, config: TrainConfig, *, build: "Callable[[TrainConfig, str, EnvHost], RolloutWorker] | None" = None
    ) -> None:
        from rl.cluster.learner_service import InProcessLearner
        from rollout.worker import build_worker

        self.host = build_pool(config)
        self.learner: LearnerClient = InProcessLearner(config)
        make = build or build_worker
        self.workers: Sequence[WorkerClient] = [
            InProcessWorker(make(config, f"worker-{i}", self.host)) for i in range(config.rollout.workers)
        ]

    async def close(self) -> None:
        await asyncio.gather(*(worker.close() for worker in self.workers), self.learner.close())


def build_pool(config: TrainConfig) -> Any:
    """An `EnvPool` of this process, with the configured deadlines and secrets."""
    from envs.pool.pool import EnvPool
    from envs.redaction import expose

    expose(secret_values(config.env.secrets))
    return EnvPool(
        reset_timeout_s=config.env.reset_timeout_s,
        step_timeout_s=config.env.step_timeout_s,
        reward_timeout_s=config.env.reward_timeout_s,
        limits=pool_limits(config),
    )


def pool_limits(config: TrainConfig) -> "PoolLimits":
    """Limits of one pool of the run's; a pace is shared by all of them."""
    from envs.pool.pool_limits import PoolLimits

    return PoolLimits(
        max_running=config.env.max_running,
        steps_per_second={name: pace / config.rollout.env_pools for name, pace in config.env.steps_per_second.items()},
        recycle_mib=config.env.recycle_mib,
        recycle_episodes=config.env.recycle_episodes,
    )
