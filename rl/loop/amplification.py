"""Whether RL has something to amplify in a policy: sampled several times on a task, is it right sometimes?

A group of equal rewards has no advantage, so a policy that is never right, or always, teaches itself nothing.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conf.schema import TrainConfig
from envs.tasks.task_source import held_out_tasks
from policy.sync.snapshot import PolicySnapshot
from rl.cluster.inprocess import build_pool
from rl.loop.tasks import evaluation_levels, task_entries
from rl.monitor.evaluation import is_success, wilson
from rollout.record.trajectory import Trajectory
from rollout.worker import build_worker

TASKS = 24
SAMPLES = 8
"""Episodes of each task."""
SOLVED = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledSuccess:
    """What a policy does with some held-out tasks, each played several times."""

    tasks: int
    """With a reward of at least one episode."""
    episodes: int
    """With a reward."""
    errors: int
    """Episodes that failed; never counted as wrong answers."""
    right: int
    mixed: int
    """Tasks whose episodes earned different rewards: what a group learns from."""

    @property
    def sentence(self) -> str:
        """Success with its interval, then what RL can do with it."""
        if not self.episodes:
            return f"sampled success is unknown: all {self.errors} episodes failed; see shoal env check ID"
        low, high = wilson(self.right, self.episodes)
        failed = f", {self.errors} failed" if self.errors else ""
        found = (
            f"sampled success {self.right / self.episodes:.3f} (95% {low:.3f} to {high:.3f}, {self.episodes} episodes "
            f"of {self.tasks} held-out tasks{failed})"
        )
        return f"{found}: {self._outlook()}"

    def _outlook(self) -> str:
        if self.right >= SOLVED * self.episodes:
            return "nearly solved, so RL has little to amplify; raise env.level"
        if not self.mixed and not self.right:
            return "RL has nothing to amplify, for no episode is right; more sft.steps, or a lower env.level"
        if not self.mixed:
            return "RL has nothing to amplify, for each task is solved always or never; choose another env.level"
        return f"RL can amplify it, for {self.mixed} of the {self.tasks} tasks earn now more, now less"


def sampled_success(groups: Sequence[Sequence[Trajectory]]) -> SampledSuccess:
    """`groups`: the episodes of each task."""
    scored = [[t for t in group if t.reward is not None] for group in groups]
    return SampledSuccess(
        tasks=sum(bool(group) for group in scored),
        episodes=sum(map(len, scored)),
        errors=sum(map(len, groups)) - sum(map(len, scored)),
        right=sum(is_success(t) for group in scored for t in group),
        mixed=sum(len({t.reward for t in group}) > 1 for group in scored),
    )


async def sample(config: TrainConfig, snapshot: PolicySnapshot) -> SampledSuccess:
    """Play held-out tasks with these weights in this process: local engine, temperature of training."""
    host = build_pool(config)
    worker = build_worker(replace(config, engine=replace(config.engine, kind="local")), "sample", host)
    try:
        await worker.load_weights(snapshot)
        tasks = await held_out_tasks(
            task_entries(config),
            host,
            count=TASKS,
            seed=config.evaluation.seed,
            levels=evaluation_levels(config),
        )
        chosen, temperature = list(tasks.values()), config.rollout.temperature
        played = await asyncio.gather(*(worker.evaluate(chosen, temperature, f"sample/{i}") for i in range(SAMPLES)))
        return sampled_success(list(zip(*played, strict=True)))
    finally:
        await worker.close()
