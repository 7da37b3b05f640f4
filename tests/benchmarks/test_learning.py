"""The benchmark of RL on the text environments: when one passes, and what a run leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning import judge, result_of
from rl.cli.bench import run_benchmark
from rl.monitor.evaluation import wilson
from tests.rl.training import SMALL


def one_run(seed: int, before: int, after: int, *, env: str = "bank") -> dict[str, Any]:
    """Of so many solved of 1,000."""
    sides = {"before": before, "after": after}
    return {"env": env, "seed": seed} | {
        name: {"success": wins / 1000, "ci95": list(wilson(wins, 1000))} for name, wins in sides.items()
    }


GOOD = [one_run(1, 200, 500), one_run(2, 250, 400), one_run(3, 210, 520)]


def test_an_environment_passes_if_every_seed_gains_enough() -> None:
    found = judge(GOOD)
    assert found["passes"] and found["disjoint"]
    assert found["gain"] == pytest.approx((0.3 + 0.15 + 0.31) / 3, abs=1e-4) and found["least_gain"] == 0.15
    assert not judge([*GOOD[:2], one_run(3, 210, 359)])["passes"]  # 0.149 in one seed


def test_two_seeds_or_a_failed_run_pass_nothing() -> None:
    assert not judge(GOOD[:2])["passes"]
    failed = judge([*GOOD, {"env": "bank", "seed": 4, "error": "status 1"}])
    assert not failed["passes"] and failed["failed"] == 1 and failed["gain"] == judge(GOOD)["gain"]
    assert judge([{"env": "bank", "seed": 1, "error": "status 1"}])["gain"] is None


def test_intervals_that_meet_or_a_loss_are_not_disjoint() -> None:
    assert not judge([*GOOD[:2], one_run(3, 500, 530)])["disjoint"]
    assert not judge([one_run(seed, 500, 200) for seed in (1, 2, 3)])["disjoint"]
    few = {"before": {"success": 0.2, "ci95": wilson(1, 5)}, "after": {"success": 0.6, "ci95": wilson(3, 5)}}
    assert not judge([run | few for run in GOOD])["passes"]  # a gain of 0.4 in five tasks


def test_the_result_counts_what_passes_and_puts_runs_in_order() -> None:
    other = [one_run(seed, 865, 979, env="tool_gate") for seed in (3, 1)]
    result = result_of([*reversed(GOOD), *other])
    assert result["passes"] == 1 and list(result["environments"]) == ["tool_gate", "bank"]
    assert [run["seed"] for run in result["runs"]] == [1, 3, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_runs_are_written_one_by_one_and_a_failed_one_is_noted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "learning.json"
    words = ["--output", str(output), "--root", str(tmp_path), "--json", *SMALL, "steps=2"]
    assert run_benchmark("learning", ["--only", "bank", "--seeds", "3,4", *words]) == 0
    assert run_benchmark("learning", ["--only", "bank", "--seeds", "4", *words, "policy.init=/nowhere"]) == 1
    written = json.loads(output.read_text())
    third, fourth = written["runs"]
    assert (third["seed"], third["steps"], third["overlap"]) == (3, 2, 0) and third["seconds"] > 0
    assert third["before"]["n"] == third["after"]["n"] == 4
    assert third["settings"]["rollout.group_size"] == 4
    assert (fourth["seed"], set(fourth)) == (4, {"env", "seed", "error"}) and "/nowhere" in fourth["error"]
    assert written["environments"]["bank"]["failed"] == 1
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["runs"] == written["runs"]


def test_other_settings_do_not_replace_the_usual_figures(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark("learning", ["steps=2"]) == 2
    assert "--output" in capfd.readouterr().err
