"""One group: G episodes of the same task at once, told apart by their sampling seeds only."""

import asyncio
import time
from collections.abc import Awaitable, Callable

from envs.outcome import EnvHost
from envs.task import Task
from policy.engine.protocol import Engine
from rollout.dialects.dialect import Renderer
from rollout.play.episode import EpisodeSettings, run_episode
from rollout.play.swap_lock import RolloutLock
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup


async def run_group(
    *,
    task: Task,
    group_id: str,
    group_size: int,
    host: EnvHost,
    engine: Engine,
    renderer: Renderer,
    settings: EpisodeSettings,
    lock: RolloutLock,
    attempt: int = 0,
    max_retries: int = 2,
    worker: str = "",
    failpoint: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.monotonic,
    play_episode: Callable[..., Awaitable[Trajectory]] = run_episode,
) -> TrajectoryGroup:
    """Run `group_size` members together; each ends in a trajectory, in member order.

    A member that the machinery failed (INFRA_ERROR) is played again up to `max_retries` times, under a fresh key, so
    that a group is not thrown away for one lost episode (pitfalls A7). An environment's own error is its result.
    `play_episode` takes the arguments of `run_episode`: an agent outside may lead the episodes.
    """

    async def play(member: int) -> Trajectory:
        for retry in range(max_retries + 1):
            trajectory = await play_episode(
                task=task,
                member=member,
                group_id=group_id,
                host=host,
                engine=engine,
                renderer=renderer,
                settings=settings,
                lock=lock,
                attempt=attempt,
                retry=retry,
                worker=worker,
                failpoint=failpoint,
                clock=clock,
            )
            if trajectory.stop_reason != StopReason.INFRA_ERROR:
                break
        return trajectory

    async with lock.group(), asyncio.TaskGroup() as members:
        tasks = [members.create_task(play(member)) for member in range(group_size)]
    return TrajectoryGroup(
        group_id=group_id, task=task, attempt=attempt, trajectories=tuple(task.result() for task in tasks)
    )
