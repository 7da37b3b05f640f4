"""A rollout worker: one engine, many episodes at once on one asyncio loop.

Invariants
- It runs nothing before it holds verified weights of at least the version its lease asks for (pitfalls I5).
- Weights are swapped only when no unit of the rollout lock is running; an evaluation pins the version until it ends.
- A lease ends in a group, an exception that says why, or cancellation; nothing is kept between leases.
- What was played while the engine died is no result: `EngineClosed` is raised instead.
"""

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from conf.schema import EngineConfig, RolloutConfig, TrainConfig
from envs.outcome import EnvHost
from envs.task import Task
from policy.engine.local_engine import LocalEngine
from policy.engine.protocol import CachePolicy, Engine, EngineClosed
from policy.model.checkpoint_io import expected_tensors
from policy.model.device import claim_device
from policy.model.hf_model import load_policy_model
from policy.model.hybrid import HybridModel
from policy.sync.transport import PublishedSnapshot, arrived
from policy.vllm.engine import VllmEngine
from rollout.dialects.dialect import Dialect, make_dialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.episode import run_episode
from rollout.play.failpoint import Failpoint
from rollout.play.group import run_group
from rollout.play.swap_lock import RolloutLock
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.lease import Lease, NotReady, WorkerStatus
from rollout.serve.agent_process import AgentCrew
from rollout.serve.external_episode import run_external_episode

SCORE_GRACE_S = 30.0
"""How far an answer may lag behind the pool's own reward deadline."""
FREE_OF_SHARE = 0.92
"""Part of its share of a GPU that vLLM asks for, as it does of a whole one."""


class RolloutWorker:
    """Runs leases and evaluations on one engine."""

    def __init__(
        self,
        name: str,
        *,
        engine: Engine,
        dialect: Dialect,
        host: EnvHost,
        config: RolloutConfig,
        seed: int,
        score_timeout_s: float = 120.0,
        failpoint: Failpoint | None = None,
        agents: AgentCrew | None = None,
    ) -> None:
        """`score_timeout_s`: longest wait for the reward of an episode that a limit ended. `agents`: programs outside
        that lead the episodes in place of `run_episode`."""
        self.name = name
        self._engine = engine
        self._dialect = dialect
        self._host = host
        self._config = config
        self._seed = seed
        self._score_timeout_s = score_timeout_s
        self._failpoint = failpoint or Failpoint()
        self._agents = agents
        self._play: Callable[[EpisodeContext], Awaitable[Trajectory]] = (
            run_episode if agents is None else functools.partial(run_external_episode, desk=agents.desk)
        )
        self._lock = RolloutLock(config.lock)
        self._version_changed = asyncio.Condition()
        self._pinned = asyncio.Event()  # set = free to swap
        self._pinned.set()
        self._groups = 0
        self._episodes = 0

    async def load_weights(self, published: PublishedSnapshot) -> int:
        """Wait for the lock, verify, swap. Raises `WeightSyncError` and keeps the old version where they differ."""
        snapshot = arrived(published)
        await asyncio.wait_for(self._pinned.wait(), self._config.episode_deadline_s * 2)
        async with self._lock.swap():
            self._failpoint.hit("swap")
            cache_policy: CachePolicy = "keep" if self._config.cache_policy == "keep" else "recompute"
            await self._engine.load_weights(snapshot, cache_policy=cache_policy)
        async with self._version_changed:
            self._version_changed.notify_all()
        return self._engine.policy_version

    async def _wait_for_version(self, version: int, deadline_s: float) -> None:
        async def reached() -> None:
            async with self._version_changed:
                await self._version_changed.wait_for(lambda: self._engine.policy_version >= version)

        try:
            await asyncio.wait_for(reached(), deadline_s)
        except TimeoutError:
            raise NotReady(
                f"worker {self.name} serves policy version {self._engine.policy_version}, the lease asks for "
                f">= {version}; it did not arrive in {deadline_s:.0f} s"
            ) from None

    def _context(self, task: Task, *, group_id: str, temperature: float, salt: str = "") -> EpisodeContext:
        settings = EpisodeSettings(
            temperature=temperature,
            max_turn_tokens=self._config.max_turn_tokens,
            max_turns=self._config.max_turns,
            max_model_tokens=self._engine.capabilities.max_model_tokens,
            deadline_s=self._config.episode_deadline_s,
            score_timeout_s=self._score_timeout_s,
            seed=self._seed,
            salt=salt,
        )
        return EpisodeContext(
            task=task,
            group_id=group_id,
            worker=self.name,
            host=self._host,
            engine=self._engine,
            dialect=self._dialect,
            settings=settings,
            lock=self._lock,
            failpoint=self._failpoint.hit,
        )

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        """Sample the G trajectories of a lease. The members of a group meet the same problem with other seeds."""
        await self._wait_for_version(lease.min_version, lease.deadline_s)
        await self._start_agents()
        self._groups += 1
        self._episodes += self._config.group_size
        try:
            context = self._context(lease.task, group_id=lease.group_id, temperature=self._config.temperature)
            group = await run_group(
                replace(context, attempt=lease.attempt), group_size=self._config.group_size, play=self._play
            )
        finally:
            self._groups -= 1
            self._episodes -= self._config.group_size
        self._check_engine()
        self._failpoint.hit("commit")
        return group

    async def pin(self, version: int) -> None:
        """Keep serving `version` until the evaluation that follows has ended. Raises `NotReady` on another version."""
        if self._engine.policy_version != version:
            raise NotReady(f"worker {self.name} serves version {self._engine.policy_version}, not {version}")
        self._pinned.clear()

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]:
        """One trajectory for each task, all tokens from the pinned version. Releases the pin whatever happens."""
        self._pinned.clear()
        gate = asyncio.Semaphore(self.evaluation_width)

        async def one(task: Task) -> Trajectory:
            context = self._context(task, group_id=f"{label}/{task.task_id}", temperature=temperature, salt=label)
            async with gate:
                # the pin already keeps swaps away, and no failpoint counts evaluations
                return await self._play(replace(context, lock=RolloutLock("none"), failpoint=Failpoint().hit))

        try:
            await self._start_agents()
            played = list(await asyncio.gather(*(one(task) for task in tasks)))
            self._check_engine()
            return played
        finally:
            self._pinned.set()

    evaluation_width = 256
    """Episodes of an evaluation in flight at once."""

    def _check_engine(self) -> None:
        """Episodes that an engine's end cut short look like failures of their own: nothing may be learnt of them."""
        if self._engine.died:
            raise EngineClosed(f"the engine of {self.name} died; what it was playing does not count")

    async def status(self) -> WorkerStatus:
        """Raises `EngineClosed` where nothing can be served any more."""
        self._check_engine()
        return WorkerStatus(
            name=self.name,
            policy_version=self._engine.policy_version,
            groups=self._groups,
            episodes=self._episodes,
            engine=self._engine.stats(),
            pid=os.getpid(),
        )

    async def restart(self) -> None:
        """A worker in this process has nothing to restart."""

    async def _start_agents(self) -> None:
        if self._agents is not None:
            await self._agents.start()

    async def close(self) -> None:
        if self._agents is not None:
            await self._agents.close()
        await self._engine.close()


def build_engine(config: TrainConfig) -> Engine:
    """The configured engine, without weights: it serves nothing before its first `load_weights`.

    Raises ValueError for a policy that the engine cannot compute.
    """
    model = load_policy_model(config.policy, seed=config.seed)
    if config.engine.kind == "vllm":
        if not isinstance(model, HybridModel):
            raise ValueError("engine.kind='vllm' computes Qwen3.5 models alone; use engine=local for other ones")
        claim_device(config.cluster.worker_gpus)  # for the limit of a share's memory; vLLM finds its device itself
        return VllmEngine(model.config, expected_tensors(model), vllm_settings(config))
    return LocalEngine(model.to(claim_device(config.cluster.worker_gpus)), config.engine)


def vllm_settings(config: TrainConfig) -> EngineConfig:
    """The engine's settings, and on a GPU that others share how much memory vLLM must find free before it starts.

    Its own default asks for 0.92 of a whole GPU, the rest being for what lies outside of any process's tensors.
    """
    share, own = config.cluster.worker_gpus, config.engine.vllm
    if not 0 < share < 1:
        return config.engine
    asked = {"gpu_memory_utilization": round(FREE_OF_SHARE * share, 4)}
    return replace(config.engine, vllm=replace(own, extra=asked | own.extra))


def build_worker(config: TrainConfig, name: str, host: EnvHost, failpoint: Failpoint | None = None) -> RolloutWorker:
    """A worker as the config describes it; the same in this process and in a Ray actor."""
    return RolloutWorker(
        name,
        engine=build_engine(config),
        dialect=make_dialect(config.policy),
        host=host,
        config=config.rollout,
        seed=config.seed,
        score_timeout_s=config.env.reward_timeout_s + SCORE_GRACE_S,
        failpoint=failpoint,
        agents=AgentCrew(config.agent.command, processes=config.agent.processes) if config.agent.command else None,
    )
