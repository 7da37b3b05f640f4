"""When a worker may swap weights under running episodes.

Units (turns, trajectories or groups, by mode) hold the lock shared; a swap holds it alone.

Invariants
- While a swap runs no unit of the lock's mode runs; while a unit runs no swap runs. Mode "none" lets swaps pass.
- Writer preference: once a swap waits, no new unit starts before it is done, so a busy worker cannot starve it.
- Only units of the lock's own mode touch the lock, so nothing that holds a unit ever waits for another one inside it:
  in mode "trajectory" the turns of a running trajectory pass, and the swap waits for the whole trajectory.
- Every wait ends: by its turn, by `timeout_s` (TimeoutError) or by cancellation, and then leaves no trace.

Waits for / woken by
- a unit: no swap running or waiting / end of a swap, or a waiting swap that gave up.
- a swap: no unit running and no other swap / end of the last unit, end of a swap.

One asyncio loop only: between two awaits nothing else runs, so counters need no further protection.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Literal, cast, get_args

LockMode = Literal["none", "turn", "trajectory", "group"]


class RolloutLock:
    """Example: lock = RolloutLock("turn"); episodes sample inside `lock.turn()`, the worker swaps in `lock.swap()`."""

    def __init__(self, mode: str = "turn", *, timeout_s: float = 600.0) -> None:
        if mode not in get_args(LockMode):
            raise ValueError(f"unknown lock mode {mode!r}; choose one of {', '.join(get_args(LockMode))}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0, got {timeout_s}")
        self.mode = cast(LockMode, mode)
        self.timeout_s = timeout_s
        self._units = 0
        self._swaps_waiting = 0
        self._swapping = False
        self._waiters: set[asyncio.Future[None]] = set()

    def turn(self) -> AbstractAsyncContextManager[None]:
        return self._unit("turn")

    def trajectory(self) -> AbstractAsyncContextManager[None]:
        return self._unit("trajectory")

    def group(self) -> AbstractAsyncContextManager[None]:
        return self._unit("group")

    def _unit(self, kind: LockMode) -> AbstractAsyncContextManager[None]:
        return self._shared() if kind == self.mode else nullcontext()

    @asynccontextmanager
    async def _shared(self) -> AsyncIterator[None]:
        await self._wait_until(lambda: not self._swapping and not self._swaps_waiting, self.mode)
        self._units += 1
        try:
            yield
        finally:
            self._units -= 1
            self._wake()

    @asynccontextmanager
    async def swap(self) -> AsyncIterator[None]:
        """Hold the lock alone. Raises TimeoutError where units do not end in time; new units then go on."""
        self._swaps_waiting += 1
        try:
            await self._wait_until(lambda: not self._units and not self._swapping, "swap")
            self._swapping = True
        finally:
            self._swaps_waiting -= 1
            self._wake()  # matters where this swap gave up: units waited for it
        try:
            yield
        finally:
            self._swapping = False
            self._wake()

    async def _wait_until(self, ready: Callable[[], bool], what: str) -> None:
        loop, timeout_s = asyncio.get_running_loop(), self.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not ready():
                    changed: asyncio.Future[None] = loop.create_future()
                    self._waiters.add(changed)
                    try:
                        await changed
                    finally:
                        self._waiters.discard(changed)
        except TimeoutError:
            raise TimeoutError(
                f"rollout lock ({self.mode}): a {what} waited {timeout_s:g} s; {self._units} units running, "
                f"{self._swaps_waiting} swaps waiting, swap running: {self._swapping}"
            ) from None

    def _wake(self) -> None:
        for changed in self._waiters:
            if not changed.done():
                changed.set_result(None)
