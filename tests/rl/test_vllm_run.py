"""Runs on vLLM as a user starts them: by each way of weights, and with the engine killed while it samples."""

import asyncio
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.vllm_kills import STEPS_AFTER, STEPS_PER_KILL, count, is_intact, train
from conf.loading import load_config
from policy.vllm.packages import vllm_build
from rl.cli.doctor.consistency import measure
from rl.cli.main import main
from rl.runs.checkpoint import load_latest
from rl.runs.run_folder import RunFolder
from rollout.record.recorder import TrajectoryReader

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra"),
]


@pytest.mark.parametrize("process", ["inproc", pytest.param("core", marks=pytest.mark.sweep)])
def test_a_killed_engine_is_replaced_and_nothing_is_lost_doubled_or_stale(tmp_path: Path, process: str) -> None:
    """Killed is the worker's process, or that of vLLM's core below it. Twenty kills: benchmarks/vllm_kills.py."""
    found = count(train(tmp_path, 1, process))
    assert is_intact(found), found
    assert (found["kills"], found["steps"]) == (1, STEPS_PER_KILL + STEPS_AFTER)
    assert found["engines"] == ["vllm"]  # not one token of the local engine, held-out ones included


RUN = (
    "engine=vllm", "rollout=sync", "seed=3", "steps=3", "rollout.workers=1", "rollout.groups_per_step=2",
    "rollout.group_size=4", "evaluation.every=0", "evaluation.final_tasks=4", "monitor.wandb=disabled",
)  # fmt: skip


@pytest.mark.parametrize("transport", [pytest.param("files", marks=pytest.mark.sweep), "broadcast"])
def test_a_run_trains_on_weights_of_every_version_and_leaves_none_behind(tmp_path: Path, transport: str) -> None:
    words = [*RUN, f"engine.vllm.transport={transport}", f"run.root={tmp_path}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "rl.cli", "train", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    files: set[str] = set()
    until = time.monotonic() + 1000
    while run.poll() is None and time.monotonic() < until:
        files |= {path.name for path in tmp_path.glob("*/weights/version-*.safetensors")}
        time.sleep(0.05)
    run.kill()
    output, _ = run.communicate(timeout=30)
    assert run.returncode == 0, output[-4000:]
    folder = RunFolder.resolve(tmp_path, "latest")
    with TrajectoryReader(folder.trajectories) as reader:
        rows = [row for row in reader.list({"split": "train"}, limit=1000) if row["step"] is not None]
    assert {(row["engine"], row["step"], row["min_version"]) for row in rows} == {("vllm", i, i - 1) for i in (1, 2, 3)}
    pulled = re.findall(r"version (\d+) -> 1 ranks, gloo", (folder.logs / "learner.log").read_text())
    versions = ["0", "1", "2", "3"]
    assert pulled == (versions if transport == "broadcast" else [])
    assert files == (set() if transport == "broadcast" else {f"version-{int(v):08d}.safetensors" for v in versions})
    assert not (folder.path / "weights").exists()


EXPERTS = (
    "engine=vllm", "policy=tiny_moe", "cluster=inprocess", "rollout=sync", "seed=3", "steps=4",
    "rollout.groups_per_step=2", "rollout.group_size=4", "learner.optimizer.lr=3e-3",
    "learner.optimizer.warmup_steps=0", "learner.loss.advantage=tests.rl.training:first_is_best", "evaluation.every=0",
    "evaluation.final_tasks=4", "monitor.wandb=disabled", "monitor.progress=false",
)  # fmt: skip


@pytest.mark.sweep
def test_experts_learn_on_the_routes_that_vllm_took_and_trained_ones_agree_with_it(tmp_path: Path) -> None:
    """The policy is random and earns nothing, so an advantage is made up: what counts is that its weights move."""
    assert main(["train", *EXPERTS, "policy.init=random", f"run.root={tmp_path}"]) == 0
    folder = RunFolder.resolve(tmp_path, "latest")
    with TrajectoryReader(folder.trajectories) as reader:
        rows = [trajectory for group in reader.groups("consumed") for trajectory in group.trajectories]
    assert len(rows) == 4 * 8 and {row.engine for row in rows} == {"vllm"}
    assert {(row.min_policy_version, row.max_policy_version) for row in rows} == {(v, v) for v in range(4)}
    for row in rows:
        last = np.flatnonzero(row.loss_mask)[-1]
        assert row.routed_experts is not None and (row.routed_experts[:last] >= 0).all()
    steps = [line for line in map(json.loads, folder.metrics.read_text().splitlines()) if line["kind"] == "step"]
    for step in steps:
        assert step["moe/replay_fallback_ratio"] == 0.0 and step["optim/grad_norm"] > 0
        assert step["policy/mismatch_kl/mean"] <= 1e-3 and step["policy/logprob_abs_diff/mean"] <= 0.01
    weights = load_latest(folder.checkpoints).path / "weights.safetensors"
    report = asyncio.run(measure(load_config([*EXPERTS, f"policy.init={weights}"]), episodes=8))
    judged = {gap.name: gap.mean for gap in report.gaps if gap.judged}
    assert report.ok and any("prefix cache" in name for name in judged)
    assert max(judged.values()) <= 0.01, judged
