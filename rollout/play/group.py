"""One group: G episodes of the same task at once, told apart by their sampling seeds only."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from rollout.play.context import EpisodeContext
from rollout.play.episode import run_episode
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup


async def run_group(
    context: EpisodeContext,
    *,
    group_size: int,
    max_retries: int = 2,
    play: Callable[[EpisodeContext], Awaitable[Trajectory]] = run_episode,
) -> TrajectoryGroup:
    """Run `group_size` members together; each ends in a trajectory, in member order.

    A member that the machinery failed (INFRA_ERROR) is played again up to `max_retries` times, under a fresh key, so
    that a group is not thrown away for one lost episode. An environment's own error is its result. `play` may let an
    agent outside lead the episodes.
    """

    async def play_member(member: int) -> Trajectory:
        for retry in range(max_retries + 1):
            trajectory = await play(replace(context, member=member, retry=retry))
            if trajectory.stop_reason != StopReason.INFRA_ERROR:
                break
        return trajectory

    async with context.lock.group(), asyncio.TaskGroup() as members:
        tasks = [members.create_task(play_member(member)) for member in range(group_size)]
    return TrajectoryGroup(
        group_id=context.group_id,
        task=context.task,
        attempt=context.attempt,
        trajectories=tuple(task.result() for task in tasks),
    )
