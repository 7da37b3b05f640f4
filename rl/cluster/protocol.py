"""Where the parts of a run live: one process, or Ray actors. The rest of `rl` sees the same clients either way."""

import asyncio
import logging
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.checks import secret_values
from conf.schema import TrainConfig
from envs.outcome import EnvHost
from rl.cluster.placement import NodeCapacity, PlacementError, Plan, amounts, check_fits, plan
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.lease import Lease, WorkerClient, WorkerStatus

if TYPE_CHECKING:
    from envs.pool.actors import PoolClient
    from envs.pool.pool_limits import PoolLimits
    from envs.task import Task
    from rl.algorithm.step_report import LearnerReport
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
        from rl.algorithm.learner_service import InProcessLearner
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


def start_ray(config: TrainConfig, namespace: str) -> None:
    """Start a private Ray (or join the one named), dashboard off, token auth on, nothing sent anywhere.

    `address="local"` because a bare init would join any cluster that happens to run on this machine. The token lives in
    this process and its children only: Ray listens on every interface, and its own token file is readable by others.
    """
    _check_address(config.cluster.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves a run wherever anything else is busy
    if config.cluster.address == "local" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if "ray" not in sys.modules:  # read once, when Ray is imported; later on init turns it on itself
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    options: dict[str, Any] = {}
    if config.cluster.address == "local":
        cores = config.cluster.num_cpus or ceil(plan(config).cpus) + 1
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


def _check_address(address: str) -> None:
    """Raise `ClusterError` where nothing listens at IP:port: Ray itself would keep asking for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "//" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        why = f"no Ray head answers there ({error}); `ray start --head` prints its address"
        raise ClusterError(f"cluster.address={address}: {why}") from None


@contextmanager
def _without_variables(names: Sequence[str]) -> Iterator[None]:
    """Processes that start meanwhile do not get these variables: a private Ray hands its own on to every actor."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def living_nodes() -> list[NodeCapacity]:
    """Of the cluster that this process joined, with all their resources."""
    import ray

    return [
        NodeCapacity(
            name=f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}",
            cpus=node["Resources"].get("CPU", 0.0),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def reserve(wanted: Plan, name: str, *, deadline_s: float) -> Any:
    """A placement group of the plan's bundles, all of them held.

    Raises `PlacementError`: at once where no cluster of these nodes could hold them, and at the deadline where others
    hold what is missing.
    """
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    check_fits(wanted, living_nodes())
    group = placement_group([b.resources for b in wanted.bundles], strategy=wanted.strategy, name=f"shoal-{name}")
    if group.wait(timeout_seconds=deadline_s):
        return group
    remove_placement_group(group)  # else it would take what it asked for as soon as that is free
    free = ray.available_resources()
    others = [other for other in placement_group_table().values() if other["state"] == "CREATED"]
    held = "; ".join(
        f"{other['name'] or 'a placement group without a name'}: "
        + amounts(*(sum(b.get(kind, 0.0) for b in other["bundles"].values()) for kind in ("CPU", "GPU")))
        for other in others
    )
    raise PlacementError(
        f"the cluster could hold the run but was busy for {deadline_s:.0f} s: asked {amounts(wanted.cpus, wanted.gpus)}"
        f" ({wanted.strategy}), free {amounts(free.get('CPU', 0.0), free.get('GPU', 0.0))}. Held by "
        f"{held or 'tasks or actors outside of placement groups'}. Wait for them, ask for less, or raise "
        "cluster.start_timeout_s"
    )


def node_problem(config: TrainConfig, logs: str) -> str:
    """What a part of the run would lack on the node where this runs; "" = nothing."""
    from policy.model.initial import initial_weights_file

    if not os.access(logs, os.W_OK):
        return f"the run folder {Path(logs).parent} is not there or cannot be written: put run.root on shared storage"
    if config.policy.path and not Path(config.policy.path, "config.json").is_file():
        return f"policy.path={config.policy.path} holds no config.json there: put it on shared storage"
    try:
        initial_weights_file(config.policy, config.env.name)
    except ValueError as error:
        return str(error)
    return ""


def check_nodes(config: TrainConfig, group: Any, logs: str, *, runtime_env: dict[str, Any], deadline_s: float) -> None:
    """Raise `PlacementError` where a node of the group, other than this one, lacks our package or the run's files."""
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    nodes = placement_group_table(group)["bundles_to_node_id"]
    bundle_of = {node: bundle for bundle, node in nodes.items()}
    bundle_of.pop(ray.get_runtime_context().get_node_id(), None)
    remote: Any = ray.remote
    for node, bundle in bundle_of.items():
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=int(bundle))
        look = remote(node_problem).options(
            num_cpus=0, max_retries=0, runtime_env=runtime_env, scheduling_strategy=place
        )
        try:
            problem = ray.get(look.remote(config, logs), timeout=deadline_s)
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            problem = f"it cannot run Shoal: {reason}. Install the same version of it on every node"
        if problem:
            raise PlacementError(f"node {node[:6]}: {problem} (docs/cluster.md)")


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
        from policy.sync.transport import weights_folder
        from rl.cluster.actors import LearnerActor, RayLearner
        from rollout.actors import RayWorkerClient, RolloutWorkerActor, answer, connect

        deadline_s, logs = config.cluster.start_timeout_s, str((folder / "logs").resolve())
        self._weights = weights_folder(config.engine.vllm.transport, folder)
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


async def start_cluster(config: TrainConfig, folder: Path) -> Cluster:
    """The cluster the config names."""
    if config.cluster.kind == "inprocess":
        return InProcessCluster(config)
    return await RayCluster.start(config, folder)
