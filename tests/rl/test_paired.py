"""Two checkpoints on the same tasks: exact numbers of small samples, and intervals that hold what they promise."""

import random

import pytest

from rl.monitor.paired import mcnemar, paired


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (0, 1, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (5, 0, 2 / 32), (1, 7, 18 / 256), (2, 12, 212 / 16384)],
)
def test_mcnemar_is_the_share_of_equally_likely_splits_that_are_as_uneven(only_a: int, only_b: int, p: float) -> None:
    assert mcnemar(only_a, only_b) == pytest.approx(p)  # faults F6


def test_the_sentence_says_who_is_better_by_how_much_and_whether_that_is_chance() -> None:  # faults F6
    found = paired(both=60, only_a=5, only_b=20, neither=15)
    assert (found.n, found.difference) == (100, pytest.approx(0.15))
    assert found.sentence.startswith("success differs by +0.150 (95% +0.0") and "beyond chance" in found.sentence
    assert "20 solved by it alone, 5 by the other alone (McNemar p=0.0041)" in found.sentence
    other = paired(both=60, only_a=20, only_b=5, neither=15)
    assert other.ci95 == pytest.approx((-found.ci95[1], -found.ci95[0]))
    assert "within chance" in paired(both=60, only_a=9, only_b=11, neither=20).sentence


def test_equal_answers_give_a_narrow_interval_around_nothing_and_no_tasks_say_nothing() -> None:
    low, high = paired(both=50, only_a=0, only_b=0, neither=50).ci95
    assert low == pytest.approx(-high) and high < 0.05  # of two unrelated samples it would reach 0.13
    assert paired(both=0, only_a=0, only_b=0, neither=0).ci95 == (-1.0, 1.0)


def test_the_interval_holds_the_true_difference_in_95_of_100_draws() -> None:  # faults F6
    rng, hits, draws = random.Random(1), 0, 2000
    shares = {"both": 0.5, "only_a": 0.1, "only_b": 0.2, "neither": 0.2}
    for _ in range(draws):
        drawn = rng.choices(list(shares), list(shares.values()), k=100)
        low, high = paired(**{name: drawn.count(name) for name in shares}).ci95
        hits += low <= 0.1 <= high
    assert 0.94 <= hits / draws <= 0.97
