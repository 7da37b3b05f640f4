"""An event loop whose time passes only when every task waits for it: hours of a run in seconds, on its own clock."""

import asyncio
import selectors
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

GRACE_S = 0.001
"""Real seconds that other threads get to answer before time goes on."""


class _Selector(selectors.DefaultSelector):
    """Waits for nothing but files and threads; a wait for time is passed on to `loop`."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        events = super().select(GRACE_S)
        assert self.loop is not None
        if not events and not self.loop.in_threads and timeout is not None:
            self.loop.now_s += timeout
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """Example: asyncio.Runner(loop_factory=VirtualLoop).run(asyncio.sleep(3600.0)) returns at once."""

    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        selector.loop = self
        self.now_s = 1000.0  # a machine's clock does not begin with a run
        self.in_threads = 0

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor: Executor | None, func: Any, *args: Any) -> asyncio.Future[Any]:
        """What runs in a thread takes no time: the loop waits for it."""
        future = super().run_in_executor(executor, func, *args)
        self.in_threads += 1
        future.add_done_callback(lambda _: self._left_thread())
        return future

    def _left_thread(self) -> None:
        self.in_threads -= 1


def seconds_by(spans: Sequence[Mapping[str, Any]], process: str, activity: str, start_s: float, end_s: float) -> float:
    """Length of the union of a process's spans of an activity within (start_s, end_s)."""
    mine = sorted(
        (max(span["start_s"], start_s), min(span["end_s"], end_s))
        for span in spans
        if span["process"] == process and span["activity"] == activity
    )
    total_s, until_s = 0.0, start_s
    for begin_s, finish_s in mine:
        total_s += max(0.0, finish_s - max(begin_s, until_s))
        until_s = max(until_s, finish_s)
    return total_s
