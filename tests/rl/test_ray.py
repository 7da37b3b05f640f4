"""Whole runs as a user starts them: real Ray actors in processes of their own, killed, interrupted and continued."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.loading import load_config
from conf.schema import VllmConfig
from rl.cluster.ray import RayCluster
from rl.runs.checkpoint import load_latest
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import read_audit
from rollout.record.recorder import TrajectoryReader

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]

RUN = (
    "seed=3", "rollout.groups_per_step=2", "rollout.group_size=4", "evaluation.every=0", "evaluation.final_tasks=8",
    "monitor.wandb=disabled", "cluster.heartbeat_s=1",
)  # fmt: skip


def shoal(*words: str) -> list[str]:
    return [sys.executable, "-m", "rl.cli", *words]


def start(tmp_path: Path, *overrides: str) -> "subprocess.Popen[str]":
    words = shoal("train", *RUN, f"run.root={tmp_path / 'runs'}", *overrides)
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output[-4000:]
    return output


def events_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.events.read_text().splitlines()]


def wait_for_step(tmp_path: Path, step: int) -> RunFolder:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        time.sleep(0.2)
        if (tmp_path / "runs" / "latest" / "run.json").exists():
            folder = RunFolder.resolve(tmp_path / "runs", "latest")
            if folder.state().step >= step:
                return folder
    raise AssertionError(f"step {step} was not reached in 120 s")


def trained_once(folder: RunFolder, *, groups: int) -> None:
    """Every group of the run was consumed exactly once, and each of its rows is stored as trained at that step."""
    audit = read_audit(folder.ledger)
    assert audit["balanced"] is True
    assert audit["consumed"] == groups
    with TrajectoryReader(folder.trajectories) as reader:
        rows = [r for r in reader.list({"split": "train"}, limit=10_000) if r["step"] is not None]
    assert len({(row["group_id"], row["member"]) for row in rows}) == len(rows) == groups * 4


def test_a_worker_killed_in_every_phase_loses_no_group_and_counts_none_twice(tmp_path: Path) -> None:
    plan = "reset:9,sample:11,tool:13,commit:3,swap:2"
    finish(start(tmp_path, "steps=16", f"run.debug_failpoint='{plan}'"), 0)
    folder = RunFolder.resolve(tmp_path / "runs", "latest")
    lost = [event for event in events_of(folder) if event["kind"] == "worker_lost"]
    assert len(lost) == 5
    assert json.loads(folder.summary.read_text())["restarts"] == 5
    trained_once(folder, groups=32)


def test_weights_that_an_earlier_life_left_are_gone_when_the_parts_answer_and_its_own_when_they_end(
    tmp_path: Path,
) -> None:
    config = load_config([*RUN, "policy.init=random"])
    config = replace(config, engine=replace(config.engine, vllm=VllmConfig(transport="files")))
    folder = tmp_path / "run"
    weights = folder / "weights"
    for path in (folder / "logs", weights):
        path.mkdir(parents=True)
    (weights / "version-00000009.safetensors").write_bytes(b"of another life")

    async def check() -> None:
        cluster = await RayCluster.start(config, folder)
        try:
            assert not weights.exists()
            assert await cluster.workers[0].load_weights(await cluster.learner.snapshot()) == 0
            assert [path.name for path in weights.iterdir()] == ["version-00000000.safetensors"]
        finally:
            await cluster.close()

    asyncio.run(asyncio.wait_for(check(), 200))
    assert not weights.exists()


def test_an_interrupted_run_writes_a_checkpoint_and_continues_where_it_stopped(tmp_path: Path) -> None:
    process = start(tmp_path, "steps=40", "env.kwargs.latency_median_s=0.1")
    folder = wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    assert f"shoal resume {folder.name}" in output
    stopped_at = folder.state().step
    assert folder.state().status == "interrupted"
    assert (folder.checkpoints / f"step-{stopped_at:06d}").is_dir()
    subprocess.run(
        shoal("resume", str(folder.path), f"steps={stopped_at + 3}"), check=True, capture_output=True, timeout=240
    )
    steps = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    trained_steps = [step for step in steps if step > 0]
    assert sorted(set(trained_steps)) == list(range(1, stopped_at + 4))
    trained_once(folder, groups=2 * (stopped_at + 3))


def test_a_run_whose_driver_was_killed_continues_from_its_checkpoint_and_repeats_no_task(tmp_path: Path) -> None:
    process = start(tmp_path, "steps=40", "run.checkpoint_every=2", "env.kwargs.latency_median_s=0.1")
    folder = wait_for_step(tmp_path, 5)
    process.kill()
    process.communicate(timeout=30)
    until = time.monotonic() + 30
    while folder.state().status != "crashed":
        assert time.monotonic() < until
        time.sleep(0.2)
    subprocess.run(shoal("resume", str(folder.path), "steps=9"), check=True, capture_output=True, timeout=240)
    trained_once(folder, groups=18)


def test_a_curriculum_with_a_gate_goes_on_after_the_driver_was_killed(tmp_path: Path) -> None:
    words = (
        "curriculum=levels", "curriculum.max_level=2", "curriculum.window=4", "curriculum.gate=zero_variance",
        "engine.max_model_tokens=384", "steps=40", "run.checkpoint_every=2", "env.kwargs.latency_median_s=0.05",
    )  # fmt: skip
    process = start(tmp_path, *words)
    folder = wait_for_step(tmp_path, 3)
    process.kill()
    process.communicate(timeout=30)
    gated = read_audit(folder.ledger)["dropped"].get("zero_variance", 0)
    subprocess.run(shoal("resume", str(folder.path), "steps=5"), check=True, capture_output=True, timeout=240)
    audit = read_audit(folder.ledger)
    assert (audit["balanced"], audit["consumed"]) == (True, 10)
    assert audit["dropped"].keys() <= {"zero_variance"}
    assert audit["dropped"].get("zero_variance", 0) >= gated
    steps = [row for row in map(json.loads, folder.metrics.read_text().splitlines()) if row["kind"] == "step"]
    assert max(row["off_policy/lag/max"] for row in steps) <= 2
    state = load_latest(folder.checkpoints).state["run"]["curriculum"]
    assert state["next_counter"] >= audit["issued"]
    awaited = sum(len(group) == 1 for _, _, groups in state["groups"] for group in groups)
    assert audit["queued"] + audit["leased"] <= awaited <= 6  # only what is still out, at most a group for each slot


def test_no_process_of_a_finished_run_stays(tmp_path: Path) -> None:
    process = start(tmp_path, "steps=1")
    finish(process, 0)
    folder = RunFolder.resolve(tmp_path / "runs", "latest")
    pids = [int(line) for file in folder.logs.glob("*.lives") for line in file.read_text().split()]
    assert pids
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < until, "a worker outlives its run"
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
