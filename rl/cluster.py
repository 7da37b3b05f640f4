"""Where the parts of a run live: one process, or Ray actors. The rest of `rl` sees the same clients either way."""

import asyncio
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.checks import secret_values
from conf.schema import TrainConfig
from envs.outcome import EnvHost
from rollout.lease import Lease, WorkerClient, WorkerStatus
from rollout.trajectory import Trajectory, TrajectoryGroup

if TYPE_CHECKING:
    from envs.actors import PoolClient
    from envs.pool_limits import PoolLimits
    from envs.task import Task
    from rl.report import LearnerReport
    from rollout.worker import RolloutWorker


OBJECT_STORE_BYTES = 256 << 20
"""Shared memory for weights and groups on one machine; what does not fit goes to disk."""


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
        from rl.learner_service import InProcessLearner
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
    from envs.pool import EnvPool
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
    from envs.pool_limits import PoolLimits

    return PoolLimits(
        max_running=config.env.max_running,
        steps_per_second={name: pace / config.rollout.env_pools for name, pace in config.env.steps_per_second.items()},
        recycle_mib=config.env.recycle_mib,
        recycle_episodes=config.env.recycle_episodes,
    )


def start_ray(config: TrainConfig, namespace: str) -> None:
    """Start a private Ray (or join the one named), dashboard off, token auth on, nothing sent anywhere.

    `address="local"` because a bare init would join any cluster that happens to run on this machine. The token lives in
    this process and its children only: Ray listens on every interface, and its own token file is readable by others.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a run wherever anything else is busy
    if config.cluster.address == "local" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if "ray" not in sys.modules:  # read once, when Ray is imported; later on init turns it on itself
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    options: dict[str, Any] = {}
    if config.cluster.address == "local":
        cores = config.cluster.num_cpus or (config.rollout.workers + config.rollout.env_pools + 2)
        options = {"num_cpus": cores, "object_store_memory": OBJECT_STORE_BYTES}
    with _without_variables(config.env.secrets):
        ray.init(
            address=config.cluster.address,
            namespace=namespace,  # names of actors are the run's own
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **options,
        )


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """Processes that start meanwhile do not get these variables: a private Ray hands its own on to every actor."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class RayCluster:
    """The parts as Ray actors. Made by `await RayCluster.start(config, folder)`."""

    learner: LearnerClient
    workers: Sequence[WorkerClient]
    host: EnvHost
    _pools: list[Any]
    _connection: "PoolClient | None" = None

    @staticmethod
    async def start(config: TrainConfig, folder: Path) -> "RayCluster":
        """Start every actor and wait until each answers. Raises `ClusterError` naming the part that did not."""
        await asyncio.to_thread(start_ray, config, folder.name)
        import ray

        from envs.actors import EnvPoolActor
        from rl.actors import LearnerActor, RayLearner
        from rollout.actors import RayWorkerClient, RolloutWorkerActor, answer, connect

        self = RayCluster()
        logs = str((folder / "logs").resolve())
        # the driver's working directory reaches actors, so that environments beside it import there too
        runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}}
        common: dict[str, Any] = {"max_task_retries": 0, "runtime_env": runtime_env}
        remote: Any = ray.remote  # its overloads know functions better than classes
        learner = remote(LearnerActor).options(num_cpus=1, max_restarts=0, **common).remote(config, logs)
        names = [f"pool-{i}" for i in range(config.rollout.env_pools)]
        self._pools = [  # kept: a named actor ends with its last handle
            remote(EnvPoolActor)
            .options(name=name, num_cpus=0.5, max_restarts=-1, max_concurrency=1000, **common)
            .remote(
                config.env.reset_timeout_s,
                config.env.step_timeout_s,
                config.env.reward_timeout_s,
                logs,
                name,
                pool_limits(config),
                secret_values(config.env.secrets),
            )
            for name in names
        ]
        actors = [
            remote(concurrency_groups={"control": 4})(RolloutWorkerActor)
            .options(num_cpus=1, max_restarts=-1, max_concurrency=10_000, **common)
            .remote(config, f"worker-{i}", names, logs)
            for i in range(config.rollout.workers)
        ]
        self.host = self._connection = connect(names, config.env)
        self.learner = RayLearner(learner, deadline_s=config.learner.step_timeout_s)
        self.workers = [
            RayWorkerClient(f"worker-{i}", actor, episode_deadline_s=config.rollout.episode_deadline_s)
            for i, actor in enumerate(actors)
        ]
        deadline_s = config.cluster.start_timeout_s
        try:
            await answer(learner.ready.remote(), who="the learner", deadline_s=deadline_s)
            for i, actor in enumerate(actors):
                await answer(actor.status.remote(), who=f"worker-{i}", deadline_s=deadline_s)
        except BaseException as error:  # interrupted too: no actor may stay behind
            await self.close()
            if isinstance(error, RuntimeError):
                raise ClusterError(f"the run could not start: {error}") from error
            raise
        return self

    async def close(self) -> None:
        """Stop Ray with everything in it. Safe to call twice."""
        import ray

        if self._connection is not None:  # its poll would meet a pool that is gone
            await self._connection.aclose()
        await asyncio.to_thread(ray.shutdown)


async def start_cluster(config: TrainConfig, folder: Path) -> Cluster:
    """The cluster the config names."""
    if config.cluster.kind == "inprocess":
        return InProcessCluster(config)
    return await RayCluster.start(config, folder)
