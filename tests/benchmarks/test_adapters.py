"""The count of benchmarks/adapters.py: a stated subset always, every listed id in the full sweep (a minute)."""

import json
from pathlib import Path

import gymnasium
import pytest

from benchmarks.adapters import listed, measure
from rl.cli.bench import SHARED, run_benchmark

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUBSET = ["TicTacToe-v0", "ConnectFour-v0", "GuessTheNumber-v0", "IteratedPrisonersDilemma-v0", "Chess-v0"]


def test_a_subset_of_games_is_driven_and_a_broken_one_is_listed_with_its_reason() -> None:
    pytest.importorskip("textarena", reason="extra 'textarena'")
    result = measure("textarena", [*SUBSET, "NoSuchGame-v0"])
    assert result["driven"] >= 4
    assert result["failures"]["NoSuchGame-v0"] == "MalformedEnvironment: textarena has no 'NoSuchGame-v0'"


@pytest.mark.sweep
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("source", "module", "count"),
    [("minigrid", "minigrid", 150), ("reasoning-gym", "reasoning_gym", 100), ("textarena", "textarena", 60)],
)
def test_nearly_all_that_a_package_lists_is_driven(source: str, module: str, count: int) -> None:
    pytest.importorskip(module, reason=f"extra '{source}'")
    result = measure(source)
    assert result["driven"] >= count, result["failures"]
    assert result["listed"] == len(listed(source)) == result["driven"] + len(result["failures"])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in SHARED))
def test_every_benchmark_starts_from_the_checkout_and_explains_itself(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Run as a script, its own folder comes first on the path, where `envs` is a benchmark and no package."""
    assert run_benchmark(name, ["--help"]) == 0
    assert "--json" in capfd.readouterr().out
    assert f"shoal bench {name}" in (BENCHMARKS / f"{name}.py").read_text()


def test_worlds_of_text_are_listed_as_gymnasium_lists_them() -> None:
    found = listed("gymnasium")
    assert {"Taxi-v4", "FrozenLake-v1", "FrozenLake8x8-v1", "CliffWalkingSlippery-v1", "Blackjack-v1"} < set(found)
    assert "CartPole-v1" not in found
    gymnasium.register("Pond-v0", entry_point="gymnasium.envs.toy_text.frozen_lake:FrozenLakeEnv")
    try:
        assert listed("gymnasium") == sorted([*found, "Pond-v0"])
    finally:
        del gymnasium.registry["Pond-v0"]


def test_the_adapters_benchmark_writes_what_it_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "adapters.json"
    assert run_benchmark("adapters", ["--only", "gymnasium", "--json", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == written
    counts = written["sources"]["gymnasium"]
    assert counts["failures"] == {} and counts["driven"] == counts["listed"] == len(listed("gymnasium"))
