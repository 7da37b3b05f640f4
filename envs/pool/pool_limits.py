"""What keeps a pool of many environments upright: how much runs at once, how fast, and when its process starts anew.

Waits: a step waits here for its turn outside of its author's deadline; the caller's own deadline covers it.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LAG_PERIOD_S = 0.05
_LAG_SAMPLES = 1200
"""Of the last minute."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """Limits of one pool; conf.schema.EnvConfig has the defaults of a run."""

    max_running: int = 1024
    """Resets and steps that run at once; more wait in the order of their arrival."""
    steps_per_second: Mapping[str, float] = field(default_factory=dict)
    """Environment's name -> resets and steps a second; a name that is missing is not limited."""
    max_answer_bytes: int = 256 << 20
    """Answers that wait to be fetched by one client; while there are more, its next requests wait."""
    recycle_mib: int = 0
    """Resident memory after which the process takes no new episodes, ends the running ones, starts anew; 0 = never."""
    recycle_episodes: int = 0
    """The same after so many episodes; 0 = never."""
    recycle_threads: int = 64
    """The same after so many threads that hung and were left behind; 0 = never."""


class TurnTaker:
    """At most `max_running` at once, and each name at its pace.

    Example: async with turns.turn("shop_db"): ...
    """

    def __init__(self, limits: PoolLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ValueError for a pace or a number that is not positive."""
        if limits.max_running < 1:
            raise ValueError(f"max_running = {limits.max_running}, not >= 1")
        for name, pace in limits.steps_per_second.items():
            if not pace > 0:
                raise ValueError(f"steps_per_second of {name} = {pace}, not > 0")
        self._running = asyncio.Semaphore(limits.max_running)
        self._paces = dict(limits.steps_per_second)
        self._next_s: dict[str, float] = {}
        self._clock = clock

    @asynccontextmanager
    async def turn(self, name: str) -> AsyncIterator[None]:
        pace = self._paces.get(name)
        if pace is not None:
            now = self._clock()
            at = max(now, self._next_s.get(name, now))
            self._next_s[name] = at + 1 / pace
            await asyncio.sleep(at - now)
        async with self._running:
            yield


class LagMeter:
    """How late the event loop wakes what it should wake: what one blocking call costs all others."""

    def __init__(self) -> None:
        self._late_s: deque[float] = deque(maxlen=_LAG_SAMPLES)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to measure on the running loop. Idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    def p99_s(self) -> float:
        """Over the last minute; 0.0 where nothing was measured yet."""
        return percentile(self._late_s, 99)

    async def _run(self) -> None:
        while True:
            due = time.monotonic() + _LAG_PERIOD_S
            await asyncio.sleep(_LAG_PERIOD_S)
            self._late_s.append(time.monotonic() - due)


def percentile(values: Iterable[float], percent: int) -> float:
    """By nearest rank: the smallest value that `percent` (1 to 100) of a hundred do not exceed; 0.0 of none.

    Example: percentile([3.0, 1.0], 99) -> 3.0
    """
    ordered = sorted(values)
    return ordered[math.ceil(percent * len(ordered) / 100) - 1] if ordered else 0.0


def resident_mib() -> float:
    """Resident memory of this process; 0.0 where the system does not tell (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
