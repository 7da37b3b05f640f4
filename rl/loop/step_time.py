"""Where the wall time of a learner step goes.

A step lasts from the report of the one before to its own, so steps leave no gap: their times add up to the time of the
run's learner loop. What no part claims is `other`, the run's own bookkeeping and the transport of groups.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rollout.schedule.lease import WorkerStatus

PARTS = ("wait_for_batch", "forward_backward", "sync", "checkpoint", "other")
"""Metrics "time/<part>" that add up to "time/step"."""


class StepTime:
    """The ledger of the step that is running.

    Example: time = StepTime(clock, on_span); 3 s in `with time.part("wait_for_batch", "wait")`, then 1 s elsewhere;
    time.close() -> {"time/step": 4.0, "time/wait_for_batch": 3.0, "time/other": 1.0, ...}
    """

    def __init__(self, clock: Callable[[], float], on_span: Callable[[str, str, float, float], None]) -> None:
        """`on_span`: takes (process, activity, start, end) of each part."""
        self._clock = clock
        self._on_span = on_span
        self._start_s = clock()
        self._spent: dict[str, float] = {}
        self._waiting_since: float | None = None
        self._evaluating_since: float | None = None
        self._waited_for_evaluation_s = 0.0

    @contextmanager
    def part(self, name: str, activity: str) -> Iterator[None]:
        """Time inside belongs to "time/<name>", and is a span of the learner. Parts do not nest."""
        start_s = self._clock()
        if name == "wait_for_batch":
            self._waiting_since = start_s
        try:
            yield
        finally:
            end_s = self._clock()
            if name == "wait_for_batch":
                self._add_overlap(end_s)
                self._waiting_since = None
            self._spent[name] = self._spent.get(name, 0.0) + end_s - start_s
            self._on_span("learner", activity, start_s, end_s)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """While workers evaluate, beside the learner: what it waits meanwhile is told apart as well."""
        self._evaluating_since = self._clock()
        try:
            yield
        finally:
            self._add_overlap(self._clock())
            self._evaluating_since = None

    def _add_overlap(self, end_s: float) -> None:
        if self._waiting_since is not None and self._evaluating_since is not None:
            self._waited_for_evaluation_s += end_s - max(self._waiting_since, self._evaluating_since)

    def close(self, forward_backward_s: float) -> dict[str, float]:
        """End the step and begin the next. `forward_backward_s`: of the part "train", by the learner's own clock."""
        end_s = self._clock()
        step_s, self._start_s = end_s - self._start_s, end_s
        spent, self._spent = self._spent, {}
        train_s = spent.get("train", 0.0)
        times = {name: spent.get(name, 0.0) for name in ("wait_for_batch", "sync", "checkpoint")}
        times["forward_backward"] = min(forward_backward_s, train_s)
        times["other"] = step_s - sum(times.values())
        times |= {"step": step_s, "train": train_s, "trainer_idle_ratio": times["wait_for_batch"] / max(step_s, 1e-9)}
        times["wait_for_evaluation"], self._waited_for_evaluation_s = self._waited_for_evaluation_s, 0.0
        return {f"time/{name}": seconds for name, seconds in times.items()}


def busy_since(before: Sequence[WorkerStatus | None], now: Sequence[WorkerStatus | None]) -> float | None:
    """Seconds that engines spent in model steps between two looks at their heartbeats, mean over workers.

    None where no heartbeat came in between: engines that were idle all the time say so. A worker that was started anew
    counts from 0 again.
    """
    new_s, heard = 0.0, False
    for then, status in zip(before, now, strict=True):
        if status is None or status is then:
            continue
        heard = True
        is_same = then is not None and then.pid == status.pid and then.engine.busy_s <= status.engine.busy_s
        new_s += status.engine.busy_s - (then.engine.busy_s if then and is_same else 0.0)
    return new_s / len(now) if heard else None
