"""Admits tasks, leases them to workers, and brings back each group exactly once.

Invariants
- At most (S+1)*P groups are alive; a new one is admitted only when the slot gate gives a slot (staleness.py).
- Every issued group ends consumed or dropped with a reason, whatever workers do: a lost lease is given out again under
  a new attempt, and a late result of an old attempt is refused by the ledger.
- A group is leased only to a worker that serves at least the version published when the group was admitted.
- Every issued group's outcome is told to the task source, once, whatever it was.
- A group without a learning signal may be dropped at its commit (signal_gate.py); another takes its place.
- A run whose groups mostly fail ends (`GroupsFailing`): dropped groups are replaced by new ones, for ever otherwise.

Loops
- admission: waits for a slot; woken by `published` and `_drop`.
- one task per alive group: waits for a worker (`Fleet.choose`), then for its result; wakes the buffer.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.schema import RolloutConfig
from envs.task import Task
from envs.tasks.curriculum import Outcome
from envs.tasks.task_source import TaskSource
from rollout.record.ledger import Ledger
from rollout.record.recorder import Recorder, group_digest
from rollout.record.trajectory import StopReason, TrajectoryGroup
from rollout.schedule.buffer import GroupBuffer
from rollout.schedule.fleet import Fleet
from rollout.schedule.lease import Lease, NotReady, WorkerLost
from rollout.schedule.signal_gate import SignalGate
from rollout.schedule.staleness import SlotGate

WATCHED_GROUPS = 40
"""A run stops when more than half of its last this many groups were dropped; 21 in a row suffice."""
NOT_RETRIED = ("env_error", "no_tokens")
"""Causes that another attempt would meet again; also reasons of a drop."""
NO_SIGNAL = "zero_variance"
"""Reason of a drop by the signal gate."""
SOLVED = 1.0 - 1e-6
"""Reward from which a trajectory counts as solved."""


class GroupsFailing(RuntimeError):
    """Raised when so many groups are dropped that the fault is no accident; the message shows the last one."""


@dataclass(kw_only=True, slots=True)
class RolloutCounters:
    """Of this process; the two kinds of dropped groups since the run began."""

    admitted: int = 0
    committed: int = 0
    redispatched: int = 0
    dropped: int = 0
    """Failed for good. What the signal gate dropped is not among them."""
    gated: int = 0
    """Dropped by the signal gate."""
    dispatched_length: float = 0.0
    """Sum over committed trajectories of sampled tokens: with the trained sum it shows selection bias."""
    dispatched_reward: float = 0.0
    dispatched_seconds: float = 0.0
    dispatched: int = 0


class Scheduler:
    """Keeps the slots full. `run()` is its admission loop; the learner takes groups from `buffer`."""

    def __init__(
        self,
        *,
        config: RolloutConfig,
        total_groups: int,
        source: TaskSource,
        fleet: Fleet,
        gate: SlotGate,
        ledger: Ledger,
        buffer: GroupBuffer,
        recorder: Recorder,
        signal_gate: SignalGate | None,
        on_event: Callable[..., None],
        on_span: Callable[[str, str, float, float], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._total_groups = total_groups
        self._source = source
        self._fleet = fleet
        self._gate = gate
        self._ledger = ledger
        self._buffer = buffer
        self._recorder = recorder
        self._signal_gate = signal_gate
        self._on_event = on_event
        self._on_span = on_span
        self._clock = clock
        self._backlog: deque[Task] = deque()
        self._wake = asyncio.Event()
        self._alive: dict[str, asyncio.Task[None]] = {}
        self._finished = 0  # consumed by the learner
        self._open = 0  # admitted, neither consumed nor dropped
        self._recently_dropped: deque[bool] = deque(maxlen=WATCHED_GROUPS)  # one entry per group that ended
        self.published_version = -1
        self._published_step = 0
        self.counters = RolloutCounters()
        self.last_problem = ""
        """Why the last dropped group was dropped, in words; "" before."""
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Set to the first exception of a group task: the controller waits on it beside its own work."""

    async def resume(
        self,
        *,
        queued: Sequence[Task],
        committed: Sequence[TrajectoryGroup],
        finished: int,
        versions_per_step: int,
    ) -> None:
        """Take over what an earlier process left: `queued` tasks are leased first, `committed` groups keep their
        slots, `finished` were consumed. Call before `run`."""
        self._backlog.extend(queued)
        self._finished = finished
        dropped = self._ledger.audit()["dropped"]
        self.counters.gated = dropped.get(NO_SIGNAL, 0)
        self.counters.dropped = sum(dropped.values()) - self.counters.gated
        self._gate.restore(len(committed))
        for group in committed:
            await self._buffer.admit(group.group_id, max(group.min_policy_version, 0) // versions_per_step)
            await self._buffer.put(group)
            self._open += 1

    def published(self, version: int, step: int) -> None:
        """Workers serve policy `version`, made by learner step `step`: slots of groups consumed before come back."""
        self.published_version, self._published_step = version, step
        self._gate.published(step)
        self._wake.set()

    def consumed(self, group_ids: Sequence[str], *, at_step: int) -> None:
        """The learner trained on these groups; `at_step` counts the steps it had done before."""
        for group_id in group_ids:
            self._gate.consumed(group_id, at_step)
        self._finished += len(group_ids)
        self._open -= len(group_ids)
        if self._signal_gate is not None:
            self._signal_gate.step_done()

    @property
    def num_alive(self) -> int:
        return len(self._alive)

    async def run(self) -> None:
        """Admit until the run has all the groups it will train on, forever watching for drops that need a refill."""
        while True:
            self._wake.clear()
            while self._wanted() and self._gate.free > 0:
                task = self._backlog.popleft() if self._backlog else await self._issue()
                await self._admit(task)
            await self._wake.wait()  # woken by every publication; the controller's stall watchdog is the deadline

    def _wanted(self) -> bool:
        return self._finished + self._open < self._total_groups

    async def _issue(self) -> Task:
        task = await self._source.next()
        self._ledger.issue([task])
        return task

    async def _admit(self, task: Task) -> None:
        group_id = task.task_id
        if not self._gate.acquire():
            raise AssertionError("a free slot vanished")
        self._open += 1
        await self._buffer.admit(group_id, self._published_step)
        self.counters.admitted += 1
        work = asyncio.create_task(self._produce(task, self.published_version))
        self._alive[group_id] = work
        work.add_done_callback(lambda done: self._ended(group_id, done))

    def _ended(self, group_id: str, work: "asyncio.Task[None]") -> None:
        self._alive.pop(group_id, None)
        self._wake.set()
        if not work.cancelled() and (error := work.exception()) and not self.failure.done():
            self.failure.set_exception(error)

    async def _produce(self, task: Task, min_version: int) -> None:
        """Lease the task until one attempt commits or none is left."""
        while True:
            member = await self._fleet.choose(min_version, 4 * self._config.episode_deadline_s)
            deadline_s = 3 * self._config.episode_deadline_s
            attempt = self._ledger.lease(task.task_id, member.name, deadline_s)
            start_s = self._clock()
            lease = Lease(
                group_id=task.task_id, task=task, attempt=attempt, min_version=min_version, deadline_s=deadline_s
            )
            cause = problem = ""
            group = None
            try:
                group = await member.client.run_lease(lease)
            except WorkerLost as error:
                cause, problem = "worker_lost", str(error)
                await self._fleet.lost(member, str(error))
            except NotReady as error:
                cause, problem = "not_ready", str(error)
            finally:
                await self._fleet.done(member)
            self._on_span(member.name, "generate", start_s, self._clock())
            if group is not None:
                cause, problem = _why_untrainable(group)
                if not cause:
                    return await self._settle(group)
            if self._retry(task, attempt, cause):
                continue
            return await self._drop(task, cause, problem, group)

    async def _settle(self, group: TrajectoryGroup) -> None:
        """Commit a group and hand it to the learner, unless it teaches nothing and the gate refuses it."""
        with self._ledger.batch():
            if not self._ledger.commit(group.group_id, group.attempt, group_digest(group)):
                return  # refused as late or double: the attempt that counts is elsewhere
            if refused := self._refused(group):
                self._ledger.drop(group.group_id, NO_SIGNAL)
        self._source.settled(group.task, outcome_of(group))
        self._recorder.write([group], split="train")
        self._recently_dropped.append(False)
        self.counters.committed += 1
        for trajectory in group.trajectories:
            if trajectory.is_trainable:
                self.counters.dispatched += 1
                self.counters.dispatched_length += trajectory.num_sampled_tokens
                self.counters.dispatched_reward += trajectory.reward or 0.0
                self.counters.dispatched_seconds += trajectory.seconds
        if refused:
            self.counters.gated += 1
            self._recorder.mark_dropped([group.group_id], NO_SIGNAL)
            await self._give_up(group.group_id)
        else:
            await self._buffer.put(group)

    def _refused(self, group: TrajectoryGroup) -> bool:
        if self._signal_gate is None:
            return False
        before = self._signal_gate.exhausted_steps
        refused = self._signal_gate.refuses(group)
        if self._signal_gate.exhausted_steps > before:
            limit, step = self._signal_gate.limit, self._published_step
            self._on_event("refill_exhausted", group=group.group_id, refused=limit, published_step=step)
        return refused

    async def _give_up(self, group_id: str) -> None:
        """Free the slot of a group that the ledger says is dropped, and ask for another."""
        self._gate.dropped(group_id)
        self._open -= 1
        await self._buffer.drop(group_id)
        self._wake.set()

    def _retry(self, task: Task, attempt: int, cause: str) -> bool:
        """Give the lease back for another attempt, unless they are used up or could not help."""
        if cause in NOT_RETRIED or self._ledger.attempts(task.task_id) >= self._config.max_attempts:
            return False
        self._ledger.release(task.task_id, attempt, cause)
        self.counters.redispatched += 1
        self._on_event("redispatched", group=task.task_id, attempt=attempt, cause=cause)
        return True

    async def _drop(self, task: Task, cause: str, problem: str, group: TrajectoryGroup | None) -> None:
        group_id = task.task_id
        reason = cause if cause in NOT_RETRIED else "attempts"
        self._ledger.drop(group_id, reason)
        if group is not None:
            self._recorder.write([group], split="train")
            self._recorder.mark_dropped([group_id], reason)
        self._source.settled(task, outcome_of(group) if group is not None else Outcome())
        await self._give_up(group_id)
        self.counters.dropped += 1
        self._on_event("dropped", group=group_id, reason=reason, cause=cause, error=problem)
        self.last_problem = f"{cause}: {problem}"
        self._recently_dropped.append(True)
        if sum(self._recently_dropped) > WATCHED_GROUPS // 2:
            shown = "; shoal show RUN --traj ID prints the episode and its traceback" if group is not None else ""
            raise GroupsFailing(
                f"{sum(self._recently_dropped)} of the last {len(self._recently_dropped)} groups could not be trained "
                f"on, the last for {self.last_problem}{shown}"
            )

    async def close(self) -> None:
        """Stop every running group. Their leases stay in the ledger and are given out again on resume."""
        works = list(self._alive.values())
        for work in works:
            work.cancel()
        await asyncio.gather(*works, return_exceptions=True)


def outcome_of(group: TrajectoryGroup) -> Outcome:
    """What the curriculum learns of a group. A failed trajectory was dispatched like the others and is not solved."""
    solved = sum(reward is not None and reward >= SOLVED for reward in group.rewards)
    return Outcome(success=solved / len(group.trajectories), flat=group.is_degenerate)


def _why_untrainable(group: TrajectoryGroup) -> tuple[str, str]:
    """(cause, an example in words) of a group with fewer than two members to compare; ("", "") for a good one."""
    failed = [t for t in group.trajectories if not t.is_trainable]
    if len(group.trajectories) - len(failed) >= 2:
        return "", ""
    errors = [t for t in failed if t.stop_reason.is_error]
    if not errors:
        t = failed[0]
        return "no_tokens", f"{t.trajectory_id}: {t.stop_reason} before its first token: raise engine.max_model_tokens?"
    # one that the machinery spoilt decides: another attempt may still show what the environment is worth
    t = next((t for t in errors if t.stop_reason != StopReason.ENV_ERROR), errors[0])
    cause = "env_error" if t.stop_reason == StopReason.ENV_ERROR else "infra_error"
    return cause, f"{t.trajectory_id}: " + (f"{t.error.message} (in {t.error.where})" if t.error else t.stop_reason)
