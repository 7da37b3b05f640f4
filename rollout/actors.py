"""Ray at the edge of rollouts: thin actors around `RolloutWorker`, and clients that give every wait a deadline."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError, WorkerCrashedError

from conf.schema import EnvConfig, TrainConfig
from envs.pool.actors import PoolClient
from envs.task import Task
from rollout.play.failpoint import Failpoint
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.lease import Lease, WorkerLost, WorkerStatus

if TYPE_CHECKING:
    from policy.sync.transport import PublishedSnapshot

T = TypeVar("T")
LOST = (RayActorError, WorkerCrashedError, GetTimeoutError)


def log_to_file(folder: str, process: str) -> None:
    """Send this process's log records to its own file in the run folder."""
    path = Path(folder) / f"{process}.log"
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


async def answer(call: Awaitable[T], *, who: str, deadline_s: float) -> T:
    """Await a Ray call. A dead or silent actor becomes `WorkerLost`, an exception of its code is raised as itself."""
    try:
        return await asyncio.wait_for(call, deadline_s)
    except TimeoutError:
        raise WorkerLost(f"{who} did not answer in {deadline_s:.0f} s", worker=who) from None
    except LOST as error:
        raise WorkerLost(f"{who}: {type(error).__name__}: {error}", worker=who) from error
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, Exception) else error) from error


def count_life(path: Path) -> int:
    """How many processes of this actor there were before: one line each in a file, which outlives them."""
    with path.open("a+") as file:
        file.write(f"{os.getpid()}\n")
        file.seek(0)
        return len(file.readlines()) - 1


def connect(pools: Sequence[str], env: EnvConfig) -> PoolClient:
    """A client of its own for this process, over all pools, by name: a handle would tie restarts to its owner."""
    return PoolClient(
        *(ray.get_actor(name) for name in pools),
        reset_timeout_s=env.reset_timeout_s,
        step_timeout_s=env.step_timeout_s,
        reward_timeout_s=env.reward_timeout_s,
    )


class RolloutWorkerActor:
    """A `RolloutWorker` in a process of its own. Made by `rl.cluster.protocol`.

    It lives as long as its engine: where that died this process ends too, and Ray starts another.
    """

    def __init__(self, config: TrainConfig, name: str, pools: Sequence[str], log_folder: str) -> None:
        import torch

        from rollout.worker import build_worker

        log_to_file(log_folder, name)
        torch.set_num_threads(config.engine.threads)
        failpoint = Failpoint(config.run.debug_failpoint, life=count_life(Path(log_folder) / f"{name}.lives"))
        self._worker = build_worker(config, name, connect(pools, config.env), failpoint)

    async def _or_end(self, call: Awaitable[T]) -> T:
        from policy.engine.protocol import EngineClosed

        try:
            return await call
        except EngineClosed:
            logging.exception("the engine died: this process ends, another begins")
            logging.shutdown()
            os._exit(1)

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        return await self._or_end(self._worker.run_lease(lease))

    async def load_weights(self, snapshot: "PublishedSnapshot") -> int:
        return await self._or_end(self._worker.load_weights(snapshot))

    async def pin(self, version: int) -> None:
        await self._worker.pin(version)

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]:
        return await self._or_end(self._worker.evaluate(tasks, temperature, label))

    async def status(self) -> WorkerStatus:
        return await self._or_end(self._worker.status())

    async def close(self) -> None:
        await self._worker.close()


class RayWorkerClient:
    """A `WorkerClient` over an actor. `load_weights` takes an object reference: weights never pass the driver."""

    def __init__(self, name: str, actor: Any, *, episode_deadline_s: float) -> None:
        self.name = name
        self._actor = actor
        self._deadline_s = episode_deadline_s

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        return await answer(self._actor.run_lease.remote(lease), who=self.name, deadline_s=lease.deadline_s)

    async def load_weights(self, snapshot: object) -> int:
        call = self._actor.load_weights.remote(snapshot)
        return await answer(call, who=self.name, deadline_s=3 * self._deadline_s)

    async def pin(self, version: int) -> None:
        await answer(self._actor.pin.remote(version), who=self.name, deadline_s=30)

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]:
        call = self._actor.evaluate.remote(list(tasks), temperature, label)
        return await answer(call, who=self.name, deadline_s=10 * self._deadline_s)

    async def status(self) -> WorkerStatus:
        # another concurrency group, hence another thread: answered while the worker's loop is busy
        return await answer(
            self._actor.status.options(concurrency_group="control").remote(), who=self.name, deadline_s=20
        )

    async def restart(self) -> None:
        """Kill the process; Ray starts another with the same arguments."""
        ray.kill(self._actor, no_restart=False)

    async def close(self) -> None:
        ray.kill(self._actor, no_restart=True)
