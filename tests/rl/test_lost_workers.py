"""Workers that die or come back empty-handed, seen by the fleet and by an evaluation. No process is needed for that."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import TrainConfig
from envs.outcome import EnvHost
from envs.task import Task
from policy.engine.protocol import Completion, EngineClosed, EngineStats, GenerationRequest
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from rl.cluster.inprocess import build_pool
from rl.loop.evaluate import evaluate
from rollout.dialects.dialect import make_dialect
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.fleet import MAX_RESTARTS, Fleet, FleetError, WorkerState
from rollout.schedule.lease import Lease, NotReady, WorkerLost, WorkerStatus
from rollout.worker import RolloutWorker
from tests.fakes import ScriptedEngine
from tests.rl.training import small_config, sometimes_right, train_in_process
from tests.rollout.trajectories import make_trajectory

TASKS = [Task(task_id=f"eval/x/{i}", env_id="X-v0", env_name="x", seed=i) for i in range(6)]


class FakeWorker:
    """A `WorkerClient` that answers at once and raises what a test puts into `faults` {call: exception}."""

    def __init__(self, name: str, **faults: Exception) -> None:
        self.name = name
        self.version = -1
        self.faults = faults
        self.log: list[str] = []

    def _enter(self, call: str) -> None:
        self.log.append(call)
        if call in self.faults:
            raise self.faults[call]

    async def load_weights(self, snapshot: Any) -> int:
        self._enter("load_weights")
        self.version = snapshot
        return snapshot

    async def pin(self, version: int) -> None:
        self._enter("pin")

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]:
        self._enter("evaluate")
        await asyncio.sleep(0.01)
        self.log.append("evaluated")
        return [replace(make_trajectory(version=3), task=task) for task in tasks]

    async def status(self) -> WorkerStatus:
        self._enter("status")
        engine = EngineStats()
        return WorkerStatus(name=self.name, policy_version=self.version, groups=0, episodes=0, engine=engine, pid=1)

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        raise WorkerLost(self.name)

    async def restart(self) -> None:
        self.log.append("restart")

    async def close(self) -> None:
        self.log.append("close")


def fleet_of(*workers: FakeWorker, pauses: list[float] | None = None) -> tuple[Fleet, list[str]]:
    """A fleet, and the kinds of events it tells. It does not pause; how long it would have goes into `pauses`."""
    events: list[str] = []

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(0)
        if pauses is not None:
            pauses.append(seconds)

    fleet = Fleet(
        workers,
        heartbeat_s=1.0,
        restart_timeout_s=1.0,
        on_event=lambda kind, **_: events.append(kind),
        on_span=lambda *_: None,
        sleep=sleep,
    )
    return fleet, events


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_a_worker_that_came_back_without_weights_serves_nothing_before_it_has_them() -> None:
    async def scene() -> None:
        worker = FakeWorker("w")
        fleet, events = fleet_of(worker)
        await fleet.push(3, 3)
        worker.version = -1  # a new process under the same name, which never failed a call
        await fleet.beat()
        member = await fleet.choose(3, deadline_s=5)
        assert (member.version, worker.version, events) == (3, 3, ["worker_lost", "worker_restarted"])

    run(scene())


def test_a_worker_that_an_evaluation_lost_is_not_chosen_before_it_is_back() -> None:
    async def scene() -> None:
        dead, good = FakeWorker("dead"), FakeWorker("good")
        fleet, events = fleet_of(dead, good)
        await fleet.push(3, 3)
        dead.faults["status"] = WorkerLost("restarting")
        await fleet.find_dead(WorkerLost("dead died", worker="dead"))
        assert [m.name for m in fleet.members if m.state == WorkerState.HEALTHY] == ["good"]
        assert events == ["worker_lost"]
        await fleet.close()

    run(scene())


def test_a_heartbeat_during_a_push_takes_no_worker_for_a_new_one() -> None:
    async def scene() -> None:
        worker = FakeWorker("w")
        fleet, events = fleet_of(worker)
        await fleet.push(3, 3)
        await asyncio.gather(fleet.beat(), fleet.push(4, 4), fleet.beat())
        await fleet.beat()
        assert (fleet.members[0].version, events) == (4, [])

    run(scene())


@pytest.mark.parametrize("fault", [WeightSyncError("'x' is missing"), WorkerLost("died"), TimeoutError("swap")])
def test_a_worker_that_never_takes_weights_again_is_retired_and_the_last_one_ends_the_run(fault: Exception) -> None:
    async def scene() -> None:
        worker, pauses = FakeWorker("w"), []
        fleet, events = fleet_of(worker, pauses=pauses)
        await fleet.push(3, 3)
        worker.faults["load_weights"] = fault
        await fleet.lost(fleet.members[0], "killed")
        with pytest.raises(FleetError, match=rf"every worker used up its restarts: w retired .*{fault}"):
            await fleet.choose(3, deadline_s=5)
        assert events == ["worker_lost", "worker_retired"] and fleet.num_restarts == MAX_RESTARTS
        assert len(pauses) == MAX_RESTARTS and pauses[0] < pauses[1] and sum(pauses) > 60  # time to heal

    run(scene())


def test_an_evaluation_goes_on_without_a_worker_that_cannot_be_pinned() -> None:
    async def scene() -> None:
        good, lost = FakeWorker("good"), FakeWorker("lost", pin=WorkerLost("died"))
        evaluation, trajectories = await evaluate([lost, good], TASKS, version=3, step=7, temperature=1.0)
        assert evaluation.n == len(trajectories) == 6
        assert {t.task.task_id for t in trajectories} == {task.task_id for task in TASKS}
        assert (good.log, lost.log) == (["pin", "evaluate", "evaluated"], ["pin"])

    run(scene())


def test_an_evaluation_that_loses_a_worker_fails_after_the_others_let_go_of_their_pins() -> None:
    async def scene() -> None:
        good, lost = FakeWorker("good"), FakeWorker("lost", evaluate=WorkerLost("died"))
        with pytest.raises(WorkerLost, match="died"):
            await evaluate([lost, good], TASKS, version=3, step=7, temperature=1.0)
        assert good.log[-1] == "evaluated"

    run(scene())


def test_an_evaluation_that_nobody_can_run_says_why() -> None:
    async def scene() -> None:
        with pytest.raises(WorkerLost, match="died"):
            await evaluate([FakeWorker("w", pin=WorkerLost("died"))], TASKS, version=3, step=7, temperature=1.0)
        with pytest.raises(NotReady, match="no worker serves version 3"):
            await evaluate([], TASKS, version=3, step=7, temperature=1.0)

    run(scene())


class LostOnce(RolloutWorker):
    """Dies in its first evaluation."""

    _lost = False

    async def evaluate(self, tasks: Sequence[Task], temperature: float, label: str) -> list[Trajectory]:
        found = await super().evaluate(tasks, temperature, label)
        if not self._lost:
            self._lost = True
            raise WorkerLost("died while it evaluated", worker=self.name)
        return found


def test_a_run_outlives_a_worker_that_dies_in_the_first_evaluation(tmp_path: Path) -> None:
    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        engine, dialect = ScriptedEngine(sometimes_right), make_dialect(config.policy)
        return LostOnce(name, engine=engine, dialect=dialect, host=host, config=config.rollout, seed=config.seed)

    config = small_config(
        tmp_path, "steps=2", "learner.self_check_tolerance=1e9", "monitor.alerts.mismatch_kl=0"
    )  # a script has no true logprobs
    finished = train_in_process(config, build=build)
    assert [(e.step, e.n) for e in finished.controller.progress.evaluations] == [(0, 4), (2, 4)]
    kinds = [json.loads(line)["kind"] for line in finished.folder.events.read_text().splitlines()]
    assert kinds == ["evaluation_failed", "worker_lost", "worker_restarted", "checkpoint"]


class DyingEngine(ScriptedEngine):
    """Dies of its third request."""

    num_asked = 0

    async def generate(self, request: GenerationRequest) -> Completion:
        self.num_asked += 1
        if self.num_asked >= 3:
            self.died = True
            raise EngineClosed("its process is gone")
        return await super().generate(request)


def test_what_was_played_while_an_engine_died_is_no_group_and_no_sign_of_life(tmp_path: Path) -> None:
    config = small_config(tmp_path)

    async def scene() -> None:
        engine, host = DyingEngine(sometimes_right), build_pool(config)
        worker = RolloutWorker(
            "w", engine=engine, dialect=make_dialect(config.policy), host=host, config=config.rollout, seed=0
        )
        await worker.load_weights(PolicySnapshot.create(0, {"a": np.zeros(1, np.float32)}))
        assert (await worker.status()).policy_version == 0
        task = Task(task_id="t/0", env_id="Calculator-v0", env_name="calculator", seed=1)
        with pytest.raises(EngineClosed, match="engine of w died"):
            await worker.run_lease(Lease(group_id="g", task=task, attempt=0, min_version=0, deadline_s=20))
        with pytest.raises(EngineClosed):
            await worker.evaluate([task], 1.0, "eval")
        with pytest.raises(EngineClosed):
            await worker.status()

    run(scene())


LEASE_OF_A_DEAD_ENGINE = """
import asyncio
from policy.engine.protocol import EngineClosed
from rollout.actors import RolloutWorkerActor

class Worker:
    async def run_lease(self, lease):
        raise EngineClosed("its core was killed")

actor = RolloutWorkerActor.__new__(RolloutWorkerActor)
actor._worker = Worker()
asyncio.run(actor.run_lease(None))
"""


@pytest.mark.slow
def test_a_workers_process_ends_with_its_engine_and_says_why() -> None:
    """So that it is replaced as a killed one is: Ray reports it lost, the fleet revives it, its leases go out again."""
    done = subprocess.run([sys.executable, "-c", LEASE_OF_A_DEAD_ENGINE], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "the engine died" in done.stderr and "its core was killed" in done.stderr
