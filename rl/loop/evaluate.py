"""Held-out evaluation: fixed tasks, sampled as in training, every token from one policy version."""

import asyncio
from collections.abc import Sequence

from envs.task import Task
from rl.monitor.evaluation import Evaluation, summarise
from rollout.record.trajectory import Trajectory
from rollout.schedule.lease import NotReady, WorkerClient


async def evaluate(
    workers: Sequence[WorkerClient], tasks: Sequence[Task], *, version: int, step: int, temperature: float
) -> tuple[Evaluation, list[Trajectory]]:
    """Share the tasks among the workers that serve `version`, pinned until they are done.

    Raises `WorkerLost` or `NotReady` where none can be pinned or one fails later, but only after all have ended: a
    worker releases its pin at the end of its share, and another try would meet the episodes of this one.
    """
    answers = await asyncio.gather(*(worker.pin(version) for worker in workers), return_exceptions=True)
    pinned = [worker for worker, answer in zip(workers, answers, strict=True) if answer is None]
    if not pinned:
        _raise_first(answers)
        raise NotReady(f"no worker serves version {version}")
    shares = [list(tasks[i :: len(pinned)]) for i in range(len(pinned))]
    results = await asyncio.gather(
        *(worker.evaluate(share, temperature, f"eval/{step}") for worker, share in zip(pinned, shares, strict=True)),
        return_exceptions=True,
    )
    _raise_first(results)
    trajectories = [t for part in results if not isinstance(part, BaseException) for t in part]
    return summarise(trajectories, step=step, policy_version=version), trajectories


def _raise_first(answers: Sequence[object]) -> None:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
