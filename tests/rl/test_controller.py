"""The asynchronous loop on the real controller, in one process."""

import asyncio
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from rl.loop.controller import Controller, RunStalled
from rollout.record.recorder import TrajectoryReader
from rollout.record.trajectory import TrajectoryGroup
from rollout.worker import RolloutWorker, build_engine
from tests.fakes import ScriptedEngine
from tests.rl.training import scripted_worker, small_config, sometimes_right, train_in_process, train_plainly

LOOSE = "learner.self_check_tolerance=1e9"  # a scripted engine has no true logprobs


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "step"]


def test_without_staleness_ten_steps_equal_a_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    config = small_config(tmp_path, "rollout.max_staleness=0", "steps=10", LOOSE)
    ours = train_in_process(config, build=scripted_worker)
    plain = train_plainly(config, lambda: ScriptedEngine(sometimes_right))
    initial = train_plainly(dataclasses.replace(config, steps=0), lambda: ScriptedEngine(sometimes_right))
    assert any(not np.array_equal(plain[name], initial[name]) for name in plain), "nothing was learned"
    assert all(np.array_equal(ours.weights[name], plain[name]) for name in plain)


def test_without_staleness_the_real_engine_equals_a_plain_loop(tmp_path: Path) -> None:
    config = small_config(
        tmp_path, "rollout.max_staleness=0", "steps=4", "rollout.groups_per_step=1", "rollout.max_turn_tokens=8",
        "learner.loss.advantage=tests.rl.training:first_is_best",
    )  # fmt: skip
    ours = train_in_process(config)
    plain = train_plainly(config, lambda: build_engine(config))
    assert max(np.abs(ours.weights[name] - plain[name]).max() for name in plain) <= 1e-5


@pytest.mark.parametrize(("staleness", "publish_every"), [(0, 1), (1, 2), (2, 1), (3, 4)])
def test_staleness_reaches_the_bound_and_never_passes_it(tmp_path: Path, staleness: int, publish_every: int) -> None:
    config = small_config(
        tmp_path, f"rollout.max_staleness={staleness}", f"learner.publish_every={publish_every}", "steps=12", LOOSE
    )
    run = train_in_process(config, build=scripted_worker)
    lags = [row["off_policy/lag/max"] for row in metrics_of(run.folder.path)]
    assert max(lags) <= staleness
    assert len(lags) == 12
    if staleness:
        assert max(lags) > 0, "the asynchronous run was synchronous"


def test_every_group_is_consumed_once_and_every_row_is_stored(tmp_path: Path) -> None:
    run = train_in_process(small_config(tmp_path, "steps=5", LOOSE), build=scripted_worker)
    assert run.audit["consumed"] == 10
    assert run.audit["issued"] == 10
    assert run.audit["balanced"] is True
    with TrajectoryReader(run.folder.trajectories) as reader:
        rows = reader.list({"split": "train"}, limit=100)
    assert len(rows) == 40
    assert {row["step"] for row in rows} == {1, 2, 3, 4, 5}


def test_training_tasks_are_never_held_out_ones(tmp_path: Path) -> None:
    run = train_in_process(small_config(tmp_path, "steps=5", LOOSE), build=scripted_worker)
    assert run.controller.held_out_overlap == 0
    assert len(run.controller.trained_digests) == 10


def test_an_evaluation_during_training_holds_one_version(tmp_path: Path) -> None:
    config = small_config(tmp_path, "steps=8", "evaluation.every=2", "evaluation.tasks=4", LOOSE)
    run = train_in_process(config, build=scripted_worker)
    evaluations = run.controller.progress.evaluations
    assert [e.step for e in evaluations] == [0, 2, 4, 6, 8]
    assert [e.policy_version for e in evaluations] == [0, 2, 4, 6, 8]  # summarise() raises on mixed versions


def test_a_stopped_run_ends_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    async def stop_at_three(controller: Controller) -> None:
        while controller.progress.step < 3:
            await asyncio.sleep(0.01)
        controller.stop()

    run = train_in_process(
        small_config(tmp_path, "steps=100000", LOOSE), build=scripted_worker, meanwhile=stop_at_three
    )
    step = run.controller.progress.step
    assert 3 <= step <= 5
    assert [path.name for path in run.folder.checkpoints.iterdir()] == [f"step-{step:06d}"]


def test_a_run_whose_groups_never_come_stops_and_says_who_waits(tmp_path: Path) -> None:
    def silent_worker(config, name, host) -> RolloutWorker:
        worker = scripted_worker(config, name, host)

        async def never(lease) -> TrajectoryGroup:
            await asyncio.Event().wait()
            raise AssertionError

        worker.run_lease = never  # type: ignore[method-assign]
        return worker

    config = small_config(tmp_path, "steps=3", "rollout.episode_deadline_s=0.5", "cluster.stall_timeout_s=1", LOOSE)
    with pytest.raises(
        RunStalled, match=r"no 2 groups .* 1 s: 0 ready, 6 pending.*worker-0 healthy version 0 leases 6"
    ):
        train_in_process(config, build=silent_worker)
