"""The benchmark of asynchrony at its smallest, on runs as they are: a step without a heartbeat has no busy seconds."""

import json
from pathlib import Path

import pytest

from rl.cli.bench import run_benchmark


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_of_asynchrony_runs_and_writes_its_figures(tmp_path: Path) -> None:
    """J1: it ended with a TypeError wherever a step is shorter than the interval of heartbeats."""
    output = tmp_path / "async.json"
    small = "rollout.groups_per_step=2 rollout.group_size=4 evaluation.final_tasks=8 cluster.heartbeat_s=5"
    assert run_benchmark("async", ["--steps", "5", "--pairs", "1", "--words", small, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["ratios"]["async_over_sync"] > 0 and result["made_at"]["commit"]
    assert [side["max_staleness"] for side in result["figures"]["sides"]] == [0, 2]
    assert all(0 <= side["rollout_idle_ratio"] <= 1 for side in result["figures"]["sides"])
