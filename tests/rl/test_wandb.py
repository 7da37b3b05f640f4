"""wandb's own file read back with wandb's own tool; other trackers with theirs; what happens when one is killed."""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.loading import load_config
from rl.algorithm.step_report import RowReport
from rl.loop.step_detail import step_detail
from rl.monitor.json_lines import read_json_lines
from rl.monitor.monitor import Monitor
from rl.monitor.prometheus import PrometheusTracker
from rl.monitor.tensorboard_export import export_tensorboard
from rl.monitor.wandb_sink import OVERVIEW, RENAMED, wandb_id
from rollout.record.trajectory import TrajectoryGroup
from tests.rl.training import SMALL
from tests.rollout.trajectories import make_group, make_trajectory, random_trajectory

ROOT = Path(__file__).resolve().parents[2]
METRICS = {"reward/mean": 0.25, "loss/policy": float("nan"), "off_policy/lag/max": 2, "time/step": 1.5}


def inspect(path: Path) -> list[dict[str, Any]]:
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def told(folder: Path) -> set[tuple[str, int, Any]]:
    """(key, step, value) of every scalar of metrics.jsonl, under wandb's keys."""
    return {
        (RENAMED.get(key, key), row["step"], value)
        for row in read_json_lines(folder / "metrics.jsonl")
        for key, value in row.items()
        if key != "kind"
    }


def logged(records: list[dict[str, Any]]) -> set[tuple[str, int, Any]]:
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return {
        (key, item["trainer/step"], value)
        for item in items
        for key, value in item.items()
        if not isinstance(value, dict | list)
    }


@pytest.mark.slow
def test_after_a_clean_finish_every_scalar_of_ours_is_in_the_wandb_file_and_a_resumed_run_is_the_same_run(
    tmp_path, monkeypatch
):
    folder = tmp_path / "a-run"
    monkeypatch.setenv("WANDB_DATA_DIR", str(folder / "wandb"))  # as the sink sets it, but taken back
    (folder / "step-000001").mkdir(parents=True)
    (folder / "step-000001" / "weights.bin").write_bytes(b"w" * 100)
    settings = ["monitor.progress=false", "monitor.samples_every=2", "monitor.upload_checkpoints=true"]
    monitor = Monitor(folder, load_config(settings))
    group = group_of([1.0, 0.0])
    for step in (1, 2):
        monitor.step(step, step, METRICS | {"reward/mean": step / 4, "env/error_ratio": 0.5})
        monitor.detail(
            step, lambda samples: step_detail([group], fates(group), learner_version=2, with_samples=samples)
        )
    monitor.checkpoint(1, str(folder / "step-000001"), 0.1)
    monitor.event("run_failed", error="OSError: disk full")
    monitor.close()
    resumed = Monitor(folder, load_config(settings))
    resumed.step(3, 3, METRICS)
    resumed.close()
    assert [row for row in read_json_lines(folder / "events.jsonl") if row["kind"] == "tracker"] == []
    first, second = (inspect(path) for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")))
    missing = told(folder) - logged(first) - logged(second)
    assert missing == set() and ("loss/policy", 1, None) in told(folder)
    runs = [record["run"]["run_id"] for record in [*first, *second] if record["type"] == "run"]
    assert runs == [wandb_id(folder)] * 2
    items = {
        key: value
        for record in first
        if record["type"] == "history"
        for key, value in record["history"]["item"].items()
    }
    assert items[OVERVIEW["reward/mean"]] == 0.5
    assert items["hist/staleness._type"] == "histogram" and sum(items["hist/length.values"]) == 2
    assert (items["samples/trajectories._type"], items["samples/trajectories.nrows"]) == ("table-file", 2)
    alerts = [record["alert"] for record in first if record["type"] == "alert"]
    assert [(alert["title"], alert["text"]) for alert in alerts] == [("run_failed", "OSError: disk full")]
    assert any(record["type"] == "artifact" for record in first)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_scalar_of_a_real_training_is_in_its_wandb_file(tmp_path):
    words = ["env=tool_gate", "steps=3", "evaluation.every=2", "evaluation.tasks=4", "rollout.max_turn_tokens=8"]
    words += ["learner.loss.advantage=tests.rl.training:first_is_best", "monitor.wandb=offline", f"run.root={tmp_path}"]
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    command = [sys.executable, "-m", "rl.cli", "train", *SMALL, *words, "run.name=real"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "real"
    (path,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    scalars = told(folder)
    assert scalars - logged(inspect(path)) == set()
    steps = {step for key, step, _ in scalars if key == "reward/mean"}
    evaluated = {step for key, step, _ in scalars if key == "eval/success"}
    assert (steps, evaluated) == ({1, 2, 3}, {0, 2, 3}) and len({key for key, _, _ in scalars}) > 60


def group_of(rewards: list[float | None], group_id: str = "g") -> TrajectoryGroup:
    return make_group([make_trajectory(reward) for reward in rewards], group_id)


def fates(group: TrajectoryGroup) -> list[RowReport]:
    return [
        RowReport(
            trajectory_id=t.trajectory_id,
            advantage=0.5,
            learner_logprobs=t.rollout_logprobs,
            status="trained",
            cause="",
        )
        for t in group.trajectories
    ]


KILLED = """
import os, signal, sys, time, pathlib, psutil
from conf.loading import load_config
from rl.monitor.monitor import Monitor
folder = pathlib.Path(sys.argv[1])
monitor = Monitor(folder, load_config(["monitor.progress=false"]))
for step in range(1, 21):
    monitor.step(step, step, {"reward/mean": 0.5})
    if step == 5:
        until = time.monotonic() + 30
        while not (cores := [p for p in psutil.Process().children(recursive=True) if "wandb" in p.name()]):
            assert time.monotonic() < until, "wandb did not start"
            time.sleep(0.1)
        time.sleep(1)
        for core in cores:
            core.send_signal(signal.SIGKILL)
started = time.monotonic()
monitor.close(deadline_s=10)
assert time.monotonic() - started < 15
"""


@pytest.mark.slow
def test_killing_wandb_in_mid_run_loses_nothing_of_ours_and_the_run_ends_well(tmp_path):
    own = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}  # no core of this process
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, env=own, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    rows = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 21)) and all(row["reward/mean"] == 0.5 for row in rows)


def test_histograms_and_samples_are_of_the_step_s_trajectories():
    dull = group_of([0.0, 0.0], group_id="dull")
    split = group_of([1.0, 0.0], group_id="split")
    found = step_detail([dull, split], [*fates(dull), *fates(split)], learner_version=3, with_samples=True)
    assert found["histograms"]["hist/staleness"] == {"counts": [8], "edges": [2.5, 3.5]}  # 2 tokens of version 0 each
    assert sum(found["histograms"]["hist/ratio"]["counts"]) == 8
    assert sum(found["histograms"]["hist/length"]["counts"]) == 4
    assert [(row["id"], row["reward"], row["staleness"]) for row in found["samples"]] == [
        ("split/0", 1.0, 3), ("split/1", 0.0, 3),
    ]  # fmt: skip


def test_groups_of_which_nothing_can_be_trained_have_no_histogram():
    group = group_of([None, None])
    found = step_detail([group], fates(group), learner_version=0, with_samples=True)
    assert found["histograms"] == {} and [row["reward"] for row in found["samples"]] == [None, None]


def test_tensorboard_s_own_reader_finds_every_number(tmp_path):
    monitor = Monitor(tmp_path, load_config(["monitor=quiet", "monitor.trackers=[tensorboard]"]))
    monitor.step(4, 4, METRICS)
    monitor.detail(4, lambda _: {"histograms": {"hist/length": {"counts": [2, 1], "edges": [0, 1, 2]}}, "samples": []})
    monitor.close()
    assert list(read_json_lines(tmp_path / "events.jsonl")) == []
    assert export_tensorboard(tmp_path / "metrics.jsonl", tmp_path / "again") == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for folder in ("tensorboard", "again"):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        (point,) = events.Scalars("reward/mean")
        assert (point.step, point.value) == (4, 0.25) and np.isnan(events.Scalars("loss/policy")[0].value)
        assert set(METRICS) < set(events.Tags()["scalars"])
    (histogram,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Histograms("hist/length")
    assert histogram.histogram_value.num == 3


def test_prometheus_serves_the_newest_numbers_on_loopback_and_ends():
    before = threading.active_count()
    tracker = PrometheusTracker(0)
    tracker.log({"kind": "step", "step": 1, "reward/mean": 0.25, "loss/policy": 2.0})
    tracker.log({"kind": "step", "step": 2, "reward/mean": 0.5, "loss/policy": None})
    tracker.log({"kind": "alert", "rule": "env_errors", "state": "raised"})
    with urllib.request.urlopen(f"http://127.0.0.1:{tracker.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    assert {"shoal_reward_mean 0.5", "shoal_step 2.0", "shoal_loss_policy NaN", "shoal_alert_env_errors 1.0"} < set(
        lines
    )
    tracker.finish()
    assert threading.active_count() == before


def test_a_port_that_is_taken_is_the_tracker_s_problem_and_not_the_run_s(tmp_path):
    taken = PrometheusTracker(0)
    monitor = Monitor(tmp_path, load_config(["monitor=quiet", f"monitor.prometheus_port={taken.port}"]))
    monitor.step(1, 1, METRICS)
    monitor.close()
    taken.finish()
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["name"]) == ("tracker", "prometheus") and "in use" in event["problem"]


@pytest.mark.parametrize(
    ("off", "num_bins"), [(0.0, 1), (1e-9, 1), (1e-2, 32)], ids=["equal", "equal but for rounding", "different"]
)
def test_ratios_that_hardly_differ_make_one_bin_and_never_end_a_run(off: float, num_bins: int) -> None:
    rng = np.random.default_rng(0)
    group = make_group([random_trajectory(rng, 1.0) for _ in range(4)])
    rows = [
        RowReport(
            trajectory_id=t.trajectory_id,
            advantage=0.5,
            learner_logprobs=(t.rollout_logprobs + off * np.arange(len(t.token_ids))).astype(np.float32),
            status="trained",
            cause="",
        )
        for t in group.trajectories
    ]
    ratio = step_detail([group], rows, learner_version=0, with_samples=False)["histograms"]["hist/ratio"]
    assert (len(ratio["counts"]), len(ratio["edges"])) == (num_bins, num_bins + 1)
    assert sum(ratio["counts"]) == sum(int((t.loss_mask == 1).sum()) for t in group.trajectories)
