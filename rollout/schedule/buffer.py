"""Finished groups between rollout and learner: one may overtake a slow one while all can still be trained in time.

A group admitted at version v must be trained at version v + S or before; call that its last version. The learner takes
the P ready groups whose last versions come first (ties: admission order), if the rest, ready or not, can still be
trained in time at P groups a step; else it waits. With S = 0 that means exactly the P groups admitted.

Looking only at groups that are due now is not enough. S = 2, P = 1, groups a b c admitted at version 0: taking c, then
a newer d, leaves both a and b due at version 2, where one step trains one of them.

`take` waits for: enough ready groups, or the slow one it may no longer pass. Woken by: `put`, `drop`, `admit`, `close`.
Every group ends in `put` or `drop` when its episodes' deadlines pass, so with `SlotGate` (staleness.py) before it a
wait always ends; the timeout is for the case that somebody breaks this.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from rollout.record.trajectory import TrajectoryGroup
from rollout.schedule.staleness import StalenessViolation


class BufferClosed(RuntimeError):
    """Raised by `take` when the buffer was closed before or while it waited."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferStats:
    """A reading for metrics and for the message of a stalled run."""

    ready: int
    """Groups that could be taken."""
    pending: int
    """Groups admitted and not yet put, dropped or taken."""
    oldest_version: int
    """Smallest version at admission over both; -1 if there is none."""
    oldest_ready_s: float
    """Time the longest-waiting ready group has been here; 0 if there is none."""


@dataclass(slots=True)
class _Entry:
    """One admitted group."""

    group_id: str
    order: int
    """Admission number."""
    version: int
    """At admission: nothing in the group is sampled by an older one."""
    group: TrajectoryGroup | None = None
    """None until put."""
    ready_at_s: float = 0.0


class GroupBuffer:
    """Groups from admission to the learner.

    Example (S = 1, P = 1): admit("a", 0); admit("b", 0); put(b); take(1, learner_version=0) -> [b]: a can still be
    trained at version 1. take(1, learner_version=1) then waits for a, also if a newer c is ready.
    """

    def __init__(self, max_staleness: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_staleness = max_staleness
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._admitted = 0
        self._closed = False
        self._changed = asyncio.Condition()

    async def admit(self, group_id: str, version: int) -> None:
        """Count on a group whose tokens are all sampled at `version` or newer."""
        async with self._changed:
            if group_id in self._entries:
                raise ValueError(f"group {group_id!r} was admitted before")
            self._entries[group_id] = _Entry(group_id=group_id, order=self._admitted, version=version)
            self._admitted += 1
            self._changed.notify_all()

    async def put(self, group: TrajectoryGroup) -> None:
        """Make an admitted group ready. ValueError if it was not admitted, was dropped, or is here already."""
        async with self._changed:
            entry = self._entries.get(group.group_id)
            if entry is None or entry.group is not None:
                raise ValueError(f"group {group.group_id!r} is not awaited: not admitted, dropped, or put before")
            entry.group, entry.ready_at_s = group, self._clock()
            self._changed.notify_all()

    async def drop(self, group_id: str) -> bool:
        """Stop counting on a group; False if it is not here."""
        async with self._changed:
            found = self._entries.pop(group_id, None) is not None
            self._changed.notify_all()
            return found

    async def take(self, num_groups: int, learner_version: int, *, timeout_s: float) -> list[TrajectoryGroup]:
        """The P groups of the next step, in admission order.

        Raises TimeoutError saying what it waited for where nothing was admitted, put or dropped for `timeout_s`,
        `BufferClosed`, or `StalenessViolation` where no order of the admitted groups can keep the bound.
        """
        async with self._changed:
            try:
                async with asyncio.timeout(timeout_s) as limit:
                    while (chosen := self._choose(num_groups, learner_version)) is None:
                        await self._changed.wait()
                        limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
            except TimeoutError:
                raise TimeoutError(self._waits_for(num_groups, learner_version, timeout_s)) from None
            for entry in chosen:
                del self._entries[entry.group_id]
            return [entry.group for entry in chosen if entry.group is not None]

    async def close(self) -> None:
        """End all waits. Safe to call twice."""
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stats(self) -> BufferStats:
        entries = self._entries.values()
        ready = [entry for entry in entries if entry.group is not None]
        return BufferStats(
            ready=len(ready),
            pending=len(entries) - len(ready),
            oldest_version=min((entry.version for entry in entries), default=-1),
            oldest_ready_s=self._clock() - min(entry.ready_at_s for entry in ready) if ready else 0.0,
        )

    def _choose(self, num_groups: int, learner_version: int) -> list[_Entry] | None:
        """The groups to train on now, or None to wait."""
        if self._closed:
            raise BufferClosed("the buffer is closed")
        entries = self._by_last_version()
        if late := self._first_late(entries, num_groups, learner_version):
            raise StalenessViolation(
                f"group {late.group_id!r}, admitted at version {late.version}, cannot be trained by version "
                f"{late.version + self._max_staleness}: {len(entries)} groups wait, {num_groups} a step, the learner "
                f"is at version {learner_version}"
            )
        chosen = [entry for entry in entries if entry.group is not None][:num_groups]
        if len(chosen) < num_groups:
            return None
        taken = {entry.order for entry in chosen}
        rest = [entry for entry in entries if entry.order not in taken]
        if self._first_late(rest, num_groups, learner_version + 1):
            return None
        return sorted(chosen, key=lambda entry: entry.order)

    def _by_last_version(self) -> list[_Entry]:
        return sorted(self._entries.values(), key=lambda entry: (entry.version, entry.order))

    def _first_late(self, entries: list[_Entry], num_groups: int, version: int) -> _Entry | None:
        """First of `entries` (in order of last version) that misses it when training starts at `version`, P a step.

        Earliest-deadline-first finds an order that keeps all deadlines if there is one.
        """
        for position, entry in enumerate(entries):
            if version + position // num_groups > entry.version + self._max_staleness:
                return entry
        return None

    def _waits_for(self, num_groups: int, learner_version: int, timeout_s: float) -> str:
        pending = [e for e in self._by_last_version() if e.group is None]
        names = ", ".join(f"{e.group_id} (admitted at version {e.version})" for e in pending[:3]) or "admissions"
        ready = len(self._entries) - len(pending)
        return (
            f"no {num_groups} groups for the learner at version {learner_version} within {timeout_s:g} s: "
            f"{ready} ready, {len(pending)} pending; waits for {names}"
        )
