"""Two evaluations on the same tasks: which of the two is better, by the tasks on which they differ."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rl.monitor.evaluation import is_success, wilson
from rollout.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """B against A on the tasks that both have a result of.

    Example: of 100 tasks 60 right by both, 5 by A alone, 20 by B alone -> difference 0.15, p_value 0.004.
    """

    n: int
    """Tasks with a reward of both; a failed episode of either leaves its task out."""
    only_a: int
    """Tasks that A alone solved."""
    only_b: int
    difference: float
    """Success of B minus that of A, on these tasks."""
    ci95: tuple[float, float]
    """Of `difference`: Newcombe's interval for paired proportions (Statistics in Medicine 17, 1998, method 10)."""
    p_value: float
    """McNemar's exact test, two-sided: how likely so uneven a split is if neither is better."""

    @property
    def sentence(self) -> str:
        """For people: the difference and whether it is beyond chance."""
        low, high = self.ci95
        sure = "beyond chance" if self.p_value < 0.05 else "within chance"
        return (
            f"success differs by {self.difference:+.3f} (95% {low:+.3f} to {high:+.3f}) on {self.n} tasks, {sure}: "
            f"{self.only_b} solved by it alone, {self.only_a} by the other alone (McNemar p={self.p_value:.2g})"
        )


def compare_paired(a: Sequence[Trajectory], b: Sequence[Trajectory]) -> PairedComparison:
    """One trajectory a task in each; paired by the task's id."""
    right_a, right_b = _right_by_task(a), _right_by_task(b)
    pairs = [(right_a[task], right_b[task]) for task in right_a if task in right_b]
    both, only_a = pairs.count((True, True)), pairs.count((True, False))
    only_b, neither = pairs.count((False, True)), pairs.count((False, False))
    return paired(both=both, only_a=only_a, only_b=only_b, neither=neither)


def paired(*, both: int, only_a: int, only_b: int, neither: int) -> PairedComparison:
    """Out of the numbers of tasks that both, one or neither solved."""
    n = both + only_a + only_b + neither
    return PairedComparison(
        n=n,
        only_a=only_a,
        only_b=only_b,
        difference=(only_b - only_a) / max(n, 1),
        ci95=_interval(both, only_a, only_b, neither),
        p_value=mcnemar(only_a, only_b),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value. Example: mcnemar(0, 5) -> 0.0625, for 2 of 32 equally likely splits are as uneven."""
    n, few = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def _interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    n = both + only_a + only_b + neither
    if n == 0:
        return (-1.0, 1.0)
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    phi = _correlation(both, only_a, only_b, neither)

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    difference = p_b - p_a
    below, above = distance(p_b - low_b, high_a - p_a), distance(high_b - p_b, p_a - low_a)
    return (max(-1.0, difference - below), min(1.0, difference + above))


def _correlation(both: int, only_a: int, only_b: int, neither: int) -> float:
    """Phi of the two results, with Newcombe's continuity correction where it is positive."""
    n, top = both + only_a + only_b + neither, both * neither - only_a * only_b
    if top > 0:
        top = max(top - n / 2, 0)
    bottom = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    return top / math.sqrt(bottom) if bottom else 0.0


def _right_by_task(trajectories: Sequence[Trajectory]) -> Mapping[str, bool]:
    return {t.task.task_id: is_success(t) for t in trajectories if t.reward is not None}
