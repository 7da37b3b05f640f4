"""The parts of a run as Ray actors, each inside its share of one placement group."""

import asyncio
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.checks import secret_values
from conf.schema import TrainConfig
from envs.outcome import EnvHost
from rl.cluster.inprocess import pool_limits
from rl.cluster.placement import PlacementError, Plan, plan
from rl.cluster.protocol import ClusterError, LearnerClient
from rl.cluster.ray_start import start_ray
from rl.cluster.reservation import check_nodes, reserve
from rollout.schedule.lease import WorkerClient

if TYPE_CHECKING:
    from envs.pool.actors import PoolClient


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Files by their whole path: processes on other nodes have another working directory."""
    policy = config.policy
    init = str(Path(policy.init).resolve()) if Path(policy.init).exists() else policy.init
    path = str(Path(policy.path).resolve()) if policy.path else ""
    return replace(config, policy=replace(policy, init=init, path=path))


class RayCluster:
    """The parts as Ray actors. Made by `await RayCluster.start(config, folder)`."""

    learner: LearnerClient
    workers: Sequence[WorkerClient]
    host: EnvHost
    _pools: list[Any]
    _connection: "PoolClient | None" = None
    _weights: Path | None = None

    @staticmethod
    async def start(config: TrainConfig, folder: Path) -> "RayCluster":
        """Reserve the resources, start every actor inside and wait until each answers.

        Raises `PlacementError` where the nodes cannot hold the run, `ClusterError` naming the part that did not answer.
        """
        config = with_absolute_paths(config)
        await asyncio.to_thread(start_ray, config, folder.name)
        self = RayCluster()
        try:
            await self._start(config, folder)
        except BaseException as error:  # interrupted too: no actor may stay behind
            await self.close()
            if isinstance(error, RuntimeError) and not isinstance(error, PlacementError):
                raise ClusterError(f"the run could not start: {error}") from error
            raise
        return self

    async def _start(self, config: TrainConfig, folder: Path) -> None:
        from rl.cluster.actors import LearnerActor, RayLearner
        from rollout.actors import RayWorkerClient, RolloutWorkerActor, answer, connect

        deadline_s, logs = config.cluster.start_timeout_s, str((folder / "logs").resolve())
        self._weights = folder / "weights" if config.engine.vllm.transport == "files" else None
        self._remove_weights()  # of a life that was killed
        wanted = plan(config)
        # the driver's working directory reaches actors, so that environments beside it import there too
        runtime_env = {"env_vars": {"PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}}
        group = await asyncio.to_thread(reserve, wanted, folder.name, deadline_s=deadline_s)
        await asyncio.to_thread(check_nodes, config, group, logs, runtime_env=runtime_env, deadline_s=deadline_s)
        place = _placer(wanted, group, runtime_env)
        learner = place(LearnerActor, "learner", max_restarts=0).remote(config, logs)
        names = [f"pool-{i}" for i in range(config.rollout.env_pools)]
        self._pools = _start_pools(config, names, place, logs)
        actors = [
            place(
                RolloutWorkerActor,
                f"worker-{i}",
                groups={"control": 4},
                max_restarts=-1,
                max_concurrency=10_000,
            ).remote(config, f"worker-{i}", names, logs)
            for i in range(config.rollout.workers)
        ]
        self.host = self._connection = connect(names, config.env)
        self.learner = RayLearner(learner, deadline_s=config.learner.step_timeout_s)
        self.workers = [
            RayWorkerClient(f"worker-{i}", actor, episode_deadline_s=config.rollout.episode_deadline_s)
            for i, actor in enumerate(actors)
        ]
        await answer(learner.ready.remote(), who="the learner", deadline_s=deadline_s)
        for i, actor in enumerate(actors):
            await answer(actor.status.remote(), who=f"worker-{i}", deadline_s=deadline_s)

    async def close(self) -> None:
        """Stop Ray with everything in it. Safe to call twice."""
        import ray

        if self._connection is not None:  # its poll would meet a pool that is gone
            await self._connection.aclose()
        await asyncio.to_thread(ray.shutdown)
        self._remove_weights()

    def _remove_weights(self) -> None:
        """Files of versions, of no use to anyone once the engines are gone."""
        if self._weights is not None:
            shutil.rmtree(self._weights, ignore_errors=True)


def _placer(wanted: Plan, group: Any, runtime_env: dict[str, Any]) -> Callable[..., Any]:
    """(class, part, options of Ray's) -> the actor class, bound to its share of the group. Restarts stay inside it."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    remote: Any = ray.remote  # its overloads know functions better than classes

    def place(actor: type, part: str, *, groups: dict[str, int] | None = None, **options: Any) -> Any:
        share = wanted.shares[part]
        return remote(concurrency_groups=groups or {})(actor).options(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=share.bundle),
            max_task_retries=0,
            runtime_env=runtime_env,
            **options,
        )

    return place


def _start_pools(config: TrainConfig, names: Sequence[str], place: Callable[..., Any], logs: str) -> list[Any]:
    """Their handles, to be kept: a named actor ends with its last one."""
    from envs.pool.actors import EnvPoolActor

    return [
        place(EnvPoolActor, name, name=name, max_restarts=-1, max_concurrency=1000).remote(
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
