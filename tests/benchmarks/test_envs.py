"""Benchmarks of environments and of the sandbox at their smallest: they run, and write what they print."""

import json
from pathlib import Path

import pytest

from envs.check.checker import PROBES
from rl.cli.bench import run_benchmark

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.ray
def test_a_few_hundred_live_environments_stay_alive_while_tools_block(capfd: pytest.CaptureFixture[str]) -> None:
    committed = (RESULTS / "envs.json").read_bytes()
    assert run_benchmark("envs", ["--live", "300", "--actors", "2", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    figures = result["figures"]
    assert (result["name"], figures["live"], figures["actors"]) == ("envs", 300, 2)
    assert [stage["live"] for stage in figures["stages"]] == [300]
    assert 0 < figures["pss_mib_empty"] < figures["pss_mib_after_two_steps"]
    assert figures["steps_per_second"] > 0
    assert 0 < figures["loop_lag_p99_s_with_blocked_tools"] < 2.5  # a loop that these tools block is 5 s late
    assert (RESULTS / "envs.json").read_bytes() == committed, "only the whole measurement is a result"


@pytest.mark.sandbox
def test_the_sandbox_benchmark_writes_what_it_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sandbox.json"
    assert run_benchmark("sandbox", ["--runs", "2", "--json", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == written
    assert {"none", "subprocess"} <= written["figures"].keys()
    assert written["figures"]["none"]["start_ms"]["median"] > 0


def test_the_check_of_built_in_environments_writes_what_it_prints(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "env_check.json"
    words = ["--only", "Calculator-v0,ToolGate-v0", "--seeds", "2", "--json", "--output", str(output)]
    assert run_benchmark("env_check", words) == 0
    written = json.loads(output.read_text())
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == written
    figures = written["figures"]
    assert (figures["levels"], figures["seeds"], figures["passed"], figures["checked"]) == ([0, 5, 9], 2, 2, 2)
    for found in figures["environments"].values():
        assert found["probes"].keys() == {*(probe.name for probe in PROBES), "control_text"}
        assert (found["passed"], found["failures"]) == (True, {}) and found["seconds"] > 0


def test_a_failed_check_is_written_and_ends_the_benchmark_with_1(tmp_path: Path) -> None:
    output = tmp_path / "env_check.json"
    words = ["--only", "tests.envs.small_envs:Asks", "--seeds", "2", "--output", str(output)]
    assert run_benchmark("env_check", words) == 1
    (found,) = json.loads(output.read_text())["figures"]["environments"].values()
    assert found["passed"] is False and found["failures"]["null"]["seen"]
