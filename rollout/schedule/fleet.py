"""The workers of a run: who is healthy, which version each serves, who gets the next lease.

States   STARTING -> HEALTHY -> LOST -> STALE -> HEALTHY
- HEALTHY serves leases; it has verified weights.
- LOST: the process died or is silent. It is restarted and asked again with growing pauses.
- STALE: it answers but holds no weights yet; it gets the newest snapshot before any lease (pitfalls A4).

Loops    heartbeat: waits for the interval; wakes recovery. Recovery: waits for the worker to answer; wakes `choose`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from policy.sync.snapshot import WeightSyncError
from rollout.schedule.lease import WorkerClient, WorkerLost, WorkerStatus

MAX_RESTARTS = 20
"""Restarts of one worker before the run gives up on it."""
MAX_PAUSE_S = 5.0
"""Between two attempts at a worker's recovery; pauses double up to it."""


class WorkerState(StrEnum):
    STARTING = "starting"
    HEALTHY = "healthy"
    LOST = "lost"
    STALE = "stale"
    RETIRED = "retired"


class FleetError(RuntimeError):
    """Raised when no worker can go on."""


@dataclass(kw_only=True, slots=True)
class Member:
    """One worker and what is known about it."""

    client: WorkerClient
    state: WorkerState = WorkerState.STARTING
    version: int = -1
    load: int = 0
    """Leases out."""
    restarts: int = 0
    last_seen_s: float = 0.0
    idle_since_s: float | None = None
    """When its last lease ended; None while it has one, and before it had weights."""
    status: WorkerStatus | None = None
    last_error: str = ""

    @property
    def name(self) -> str:
        return self.client.name


class Fleet:
    """Chooses, feeds and revives workers."""

    def __init__(
        self,
        clients: Sequence[WorkerClient],
        *,
        heartbeat_s: float,
        restart_timeout_s: float,
        on_event: Callable[..., None],
        on_span: Callable[[str, str, float, float], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.members = [Member(client=client) for client in clients]
        self._heartbeat_s = heartbeat_s
        self._restart_timeout_s = restart_timeout_s
        self._on_event = on_event
        self._on_span = on_span
        self._clock = clock
        self._sleep = sleep
        self._changed = asyncio.Condition()
        self._snapshot: object = None
        self._version = -1
        self._recoveries: set[asyncio.Task[None]] = set()

    @property
    def num_healthy(self) -> int:
        return sum(member.state == WorkerState.HEALTHY for member in self.members)

    @property
    def num_restarts(self) -> int:
        return sum(member.restarts for member in self.members)

    def heartbeat_ages_s(self) -> dict[str, float]:
        """Worker -> seconds since it last answered; those that never did or are retired are left out."""
        known = (m for m in self.members if m.state not in (WorkerState.STARTING, WorkerState.RETIRED))
        return {m.name: self._clock() - m.last_seen_s for m in known}

    async def choose(self, min_version: int, deadline_s: float) -> Member:
        """The least-loaded healthy worker serving `min_version` or later; its load is counted up at once.

        Raises `FleetError` when none is found within the deadline.
        """

        def candidates() -> list[Member]:
            if all(member.state == WorkerState.RETIRED for member in self.members):
                raise FleetError("every worker used up its restarts: " + "; ".join(self.describe()))
            return [m for m in self.members if m.state == WorkerState.HEALTHY and m.version >= min_version]

        try:
            async with asyncio.timeout(deadline_s), self._changed:
                await self._changed.wait_for(candidates)
                member = min(candidates(), key=lambda m: m.load)
                member.load += 1
                if member.idle_since_s is not None:
                    self._on_span(member.name, "wait", member.idle_since_s, self._clock())
                    member.idle_since_s = None
                return member
        except TimeoutError:
            raise FleetError(
                f"no worker served policy version {min_version} within {deadline_s:.0f} s: {'; '.join(self.describe())}"
            ) from None

    async def done(self, member: Member) -> None:
        """A lease of `member` ended, however it ended."""
        async with self._changed:
            member.load -= 1
            if member.load == 0:
                member.idle_since_s = self._clock()
            self._changed.notify_all()

    def describe(self) -> list[str]:
        """One line per worker, for errors and logs."""
        return [
            f"{m.name} {m.state} version {m.version} leases {m.load} restarts {m.restarts}"
            + (f" ({m.last_error})" if m.last_error else "")
            for m in self.members
        ]

    async def push(self, version: int, snapshot: object) -> None:
        """Give every healthy or starting worker the snapshot and wait until each serves it or is lost.

        A worker that refuses it keeps the old version. Raises `WeightSyncError` when all refuse.
        """
        self._snapshot, self._version = snapshot, version
        targets = [m for m in self.members if m.state in (WorkerState.HEALTHY, WorkerState.STARTING)]
        results = await asyncio.gather(*(self._load(member) for member in targets))
        refusals = [error for error in results if error is not None]
        if refusals and len(refusals) == len(targets):
            raise refusals[0]

    async def _load(self, member: Member) -> WeightSyncError | None:
        start_s = self._clock()
        try:
            member.version = await member.client.load_weights(self._snapshot)
            self._on_span(member.name, "sync", start_s, self._clock())
        except WeightSyncError as error:
            member.last_error = str(error)
            self._on_event("weights_refused", worker=member.name, version=self._version, error=str(error))
            return error
        except WorkerLost as error:
            await self.lost(member, str(error))
            return None
        async with self._changed:
            member.state = WorkerState.HEALTHY
            member.last_seen_s = self._clock()
            self._changed.notify_all()
        return None

    async def lost(self, member: Member, cause: str) -> None:
        """Take a worker out of service and begin to revive it. Calling it again while that goes on changes nothing."""
        async with self._changed:
            if member.state in (WorkerState.LOST, WorkerState.STALE, WorkerState.RETIRED):
                return
            member.state, member.version, member.last_error = WorkerState.LOST, -1, cause
            self._changed.notify_all()
        self._on_event("worker_lost", worker=member.name, error=cause)
        task = asyncio.create_task(self._recover(member))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def find_dead(self, error: Exception) -> None:
        """A call outside of leases failed: take whoever it names, or is dead when asked, out of service."""
        for member in self.members:
            if isinstance(error, WorkerLost) and member.name == error.worker:
                await self.lost(member, str(error))
        await self.beat()

    async def _recover(self, member: Member) -> None:
        pause_s = 0.2
        while member.restarts < MAX_RESTARTS:
            member.restarts += 1
            start_s = self._clock()
            while self._clock() - start_s < self._restart_timeout_s:
                try:
                    member.status = await member.client.status()
                    break
                except WorkerLost:
                    await self._sleep(pause_s)
                    pause_s = min(2 * pause_s, MAX_PAUSE_S)
            else:
                self._on_event("worker_restart_timeout", worker=member.name)
                await member.client.restart()
                continue
            member.state = WorkerState.STALE
            try:
                await self._catch_up(member)
            except Exception as error:  # actor supervision: whatever a new life raises costs one of its restarts
                member.state, member.last_error = WorkerState.LOST, f"{type(error).__name__}: {error}"
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, MAX_PAUSE_S)
                continue
            async with self._changed:
                member.state, member.last_seen_s = WorkerState.HEALTHY, self._clock()
                self._changed.notify_all()
            self._on_event("worker_restarted", worker=member.name, restarts=member.restarts)
            return
        async with self._changed:
            member.state = WorkerState.RETIRED
            self._changed.notify_all()
        self._on_event("worker_retired", worker=member.name, restarts=member.restarts)

    async def _catch_up(self, member: Member) -> None:
        """Load the newest snapshot, again if a newer one was pushed meanwhile."""
        while member.version != self._version:
            member.version = await member.client.load_weights(self._snapshot)

    async def heartbeat_loop(self) -> None:
        """Ask every worker how it is; one that is silent for ten intervals is killed and revived."""
        while True:
            await asyncio.sleep(self._heartbeat_s)
            await self.beat()

    async def beat(self) -> None:
        """One round of questions; whoever is found dead is being revived when it returns."""
        await asyncio.gather(*(self._beat(m) for m in self.members if m.state == WorkerState.HEALTHY))

    async def _beat(self, member: Member) -> None:
        version = member.version
        try:
            async with asyncio.timeout(self._heartbeat_s):
                member.status = await member.client.status()
            member.last_seen_s = self._clock()
        except (TimeoutError, WorkerLost) as error:
            silent_s = self._clock() - member.last_seen_s
            if isinstance(error, WorkerLost):
                await self.lost(member, str(error))
            elif silent_s > 10 * self._heartbeat_s:
                await member.client.restart()
                await self.lost(member, f"silent for {silent_s:.0f} s")
        else:
            if member.status.policy_version < version:  # a new process behind the same name
                await self.lost(member, f"restarted: it holds version {member.status.policy_version}, not {version}")

    async def close(self) -> None:
        for task in self._recoveries:
            task.cancel()
        await asyncio.gather(*self._recoveries, return_exceptions=True)
        await asyncio.gather(*(m.client.close() for m in self.members), return_exceptions=True)
