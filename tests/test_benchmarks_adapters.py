"""The count of benchmarks/adapters.py: a stated subset always, every listed id where slow tests run (a minute)."""

import pytest

from benchmarks.adapters import listed, measure

pytestmark = pytest.mark.slow

SUBSET = ["TicTacToe-v0", "ConnectFour-v0", "GuessTheNumber-v0", "IteratedPrisonersDilemma-v0", "Chess-v0"]


def test_a_subset_of_games_is_driven_and_a_broken_one_is_listed_with_its_reason() -> None:
    pytest.importorskip("textarena", reason="extra 'textarena'")
    result = measure("textarena", [*SUBSET, "NoSuchGame-v0"])
    assert result["driven"] >= 4
    assert result["failures"]["NoSuchGame-v0"] == "MalformedEnvironment: textarena has no 'NoSuchGame-v0'"


@pytest.mark.slow
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
