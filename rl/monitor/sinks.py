"""Copies of a run's metrics elsewhere: what they get, and the thread that keeps them from mattering to the run.

A row has a "kind": "step" and "evaluation" are rows of metrics.jsonl as they are; "alert" has the fields of an `Alert`;
"detail" has "step", "histograms" and "samples" (`step_detail`); "checkpoint" has "step" and "path". A tracker passes
over kinds that it has no use for.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class MetricSink(Protocol):
    """A copy of the metrics somewhere else. `write` returns at once and never raises."""

    @property
    def name(self) -> str: ...

    @property
    def num_dropped(self) -> int:
        """Rows that were lost."""
        ...

    @property
    def problem(self) -> str:
        """The first thing that went wrong; "" = nothing."""
        ...

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self, deadline_s: float) -> None: ...


class Tracker(Protocol):
    """A started run of a tracker; may block and may raise."""

    def log(self, data: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class ThreadedSink:
    """A `MetricSink` that starts and feeds a tracker in its own thread.

    A row that finds the queue full is dropped and counted, and so is one that the tracker refuses. A tracker that
    cannot be started drops all.
    """

    def __init__(self, start: Callable[[], Tracker], *, name: str = "tracker", max_queued: int = 512) -> None:
        self.name = name
        self.problem = ""
        self._refused = 0
        self._overflowed = 0
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(max_queued)
        self._thread = threading.Thread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        return self._refused + self._overflowed

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._overflowed += 1

    def close(self, deadline_s: float) -> None:
        """Past the deadline the thread is left behind: it is a daemon and holds nothing of the run."""
        until_s = time.monotonic() + deadline_s
        try:
            self._rows.put(None, timeout=deadline_s)
        except queue.Full:
            return
        self._thread.join(max(0.0, until_s - time.monotonic()))

    def _work(self, start: Callable[[], Tracker]) -> None:
        tracker: Tracker | None = None
        try:
            tracker = start()
        except Exception as error:  # whatever a tracker raises must not reach the run
            self.problem = f"{type(error).__name__}: {error}"
        while (row := self._rows.get()) is not None:
            if tracker is None:
                self._refused += 1
                continue
            try:
                tracker.log(row)
            except Exception as error:  # as above
                self._refused += 1
                self.problem = self.problem or f"{type(error).__name__}: {error}"
        if tracker is not None:
            try:
                tracker.finish()
            except Exception as error:  # as above
                self.problem = self.problem or f"{type(error).__name__}: {error}"
