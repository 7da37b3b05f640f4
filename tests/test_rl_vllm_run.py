"""Runs on vLLM as a user starts them, the process that holds the engine killed while it samples."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from policy.vllm_packages import vllm_build
from rl.run_folder import RunFolder
from rollout.ledger import read_audit
from rollout.recorder import TrajectoryReader
from tests.test_rl_ray import events_of, finish, start, trained_once, wait_for_step

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.ray,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra"),
]
RESTART_S = 120.0
"""A killed process is replaced, imports vLLM, is given weights and has a step trained by then."""


def kill_while_sampling(tmp_path: Path, number: int) -> RunFolder:
    """SIGKILL to the worker of each life, `number` of them, at a random moment after it has fed a step."""
    rng = random.Random(0)
    folder = wait_for_step(tmp_path, 1)
    for killed in range(number):
        step, until = folder.state().step, time.monotonic() + RESTART_S
        pids = (folder.logs / "worker-0.lives").read_text().split()
        while len(pids) <= killed or folder.state().step <= step:
            assert time.monotonic() < until, f"not back {RESTART_S:.0f} s after kill {killed}"
            time.sleep(0.1)
            pids = (folder.logs / "worker-0.lives").read_text().split()
        time.sleep(rng.random())
        os.kill(int(pids[-1]), signal.SIGKILL)
    return folder


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_engine_is_replaced_and_nothing_is_lost_doubled_or_stale(tmp_path: Path, kills: int) -> None:
    steps = 2 * kills + 6
    process = start(tmp_path, "engine=vllm", f"steps={steps}", "rollout.workers=1", "env.kwargs.latency_median_s=0.2")
    try:
        folder = kill_while_sampling(tmp_path, kills)
        finish(process, 0)
    finally:
        process.kill()
    assert [event["kind"] for event in events_of(folder)].count("worker_lost") == kills
    trained_once(folder, groups=2 * steps)
    assert read_audit(folder.ledger)["redispatched"] >= kills
    with TrajectoryReader(folder.trajectories) as reader:
        rows = reader.list(limit=10_000)
    assert {row["engine"] for row in rows} == {"vllm"}  # not one token of the local engine, held-out ones included
    trained = [row for row in rows if row["status"] == "consumed" and row["num_sampled_tokens"]]
    assert trained and all(0 <= row["step"] - 1 - row["min_version"] <= 2 for row in trained)
