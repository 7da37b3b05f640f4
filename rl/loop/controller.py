"""The asynchronous loop: the only loop. Synchronous training is `rollout.max_staleness=0` on the same code.

      TaskSource --task--> Scheduler ==lease==> workers ==group==> GroupBuffer
                              ^ slots                                  | P groups, oldest first
                              |                                        v
      workers <==snapshot== push loop <--version made-- learner loop (one optimizer step) --> ledger, recorder, monitor

Loops, and what each waits for / is woken by
- scheduler.run    a free slot / a publication or a drop
- learner loop     P groups / the buffer (deadline: cluster.stall_timeout_s, then the run stops and says who waits)
- push loop        a new version / the learner loop; while it swaps weights the learner is already at its next step
- fleet.heartbeat  its interval; revives workers that died or fell silent
- watch loop       the same interval; alerts of silent workers and of steps that do not come

The order inside a step matters: a group is marked consumed in the ledger before its version is published, because its
slot may be given to a new group at that moment; a checkpoint is asked for before the next learner step, so that
weights and ledger are one consistent cut.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.schema import TrainConfig
from envs.task import Task
from envs.tasks.task_source import TaskSource
from policy.sync.snapshot import WeightSyncError
from rl.algorithm.advantage import ToolPrice, has_signal
from rl.algorithm.step_report import LearnerReport, RowReport
from rl.cluster.protocol import Cluster
from rl.loop.evaluate import evaluate
from rl.loop.selection_bias import SelectionBias
from rl.loop.step_detail import step_detail
from rl.loop.step_time import StepTime, busy_since
from rl.monitor.evaluation import Evaluation
from rl.monitor.monitor import Monitor
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import Ledger
from rollout.record.recorder import Recorder, TrainedRow
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.buffer import GroupBuffer
from rollout.schedule.fleet import Fleet, FleetError, WorkerState
from rollout.schedule.lease import NotReady, WorkerLost, WorkerStatus
from rollout.schedule.scheduler import Scheduler
from rollout.schedule.signal_gate import SignalGate
from rollout.schedule.staleness import SlotGate, StalenessBound

QUIET_STEPS = 10
"""Learner steps in a row without a learning signal that make the event "no_signal"."""


class RunStalled(RuntimeError):
    """Raised when nothing moved for `cluster.stall_timeout_s`; the message says who waits for whom."""


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a run stands; what a checkpoint adds to the learner's own state."""

    step: int = 0
    policy_version: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)


class Controller:
    """Owns the loops of one run. `run()` returns when the steps are done or `stop()` was called."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        cluster: Cluster,
        folder: RunFolder,
        monitor: Monitor,
        ledger: Ledger,
        recorder: Recorder,
        source: TaskSource,
        held_out: Mapping[str, Task],
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: of everything it measures, the monitor's too, or spans mean nothing."""
        self.config = config
        self.progress = progress
        self._cluster = cluster
        self._folder = folder
        self._monitor = monitor
        self._ledger = ledger
        self._recorder = recorder
        self._source = source
        self._held_out = list(held_out.values())
        self._held_out_digests = frozenset(held_out)
        self.trained_digests: set[str] = set()
        self._clock = clock
        self._gate = _slot_gate(config, version=progress.step)
        self._buffer = GroupBuffer(config.rollout.max_staleness, clock=self._clock)
        self.fleet = Fleet(
            cluster.workers,
            heartbeat_s=config.cluster.heartbeat_s,
            restart_timeout_s=config.cluster.start_timeout_s,
            on_event=monitor.event,
            on_span=monitor.span,
            clock=self._clock,
        )
        self.scheduler = Scheduler(
            config=config.rollout,
            total_groups=config.steps * config.rollout.groups_per_step,
            source=source,
            fleet=self.fleet,
            gate=self._gate,
            ledger=ledger,
            buffer=self._buffer,
            recorder=recorder,
            signal_gate=_signal_gate(config),
            on_event=monitor.event,
            on_span=monitor.span,
            clock=self._clock,
        )
        self._stop = asyncio.Event()
        self._to_push: asyncio.Queue[tuple[int, int, object]] = asyncio.Queue()
        self._sync_s = 0.0
        self._statuses: list[WorkerStatus | None] = [None] * len(self.fleet.members)
        self._quiet_steps = 0
        self._selection_bias = SelectionBias()
        self.transcripts: list[Trajectory] = []
        """First held-out episode of the evaluation before and after training."""

    @property
    def held_out_overlap(self) -> int:
        """Problems trained on in this process that are held out, by content digest. Must be 0."""
        return len(self.trained_digests & self._held_out_digests)

    @property
    def held_out_passed_over(self) -> int:
        """Training candidates not used because their problem is held out."""
        return self._source.passed_over

    def stop(self) -> None:
        """End after the running learner step, with a checkpoint."""
        self._stop.set()

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    async def run(self, *, queued: Sequence[Task] = (), committed: Sequence[TrajectoryGroup] = ()) -> None:
        """Train to the last step. `queued` and `committed` are what an earlier process left."""
        progress = self.progress
        try:
            snapshot = await self._cluster.learner.snapshot()
            await self.fleet.push(progress.policy_version, snapshot)
            finished = progress.step * self.config.rollout.groups_per_step
            await self.scheduler.resume(
                queued=queued,
                committed=committed,
                finished=finished,
                versions_per_step=self.config.learner.updates_per_step,
            )
            if progress.step == 0 and not progress.evaluations:
                await self._evaluate(self.config.evaluation.final_tasks, edge=True)
            self.scheduler.published(progress.policy_version, progress.step)
            await self._train()
            await self._checkpoint()
            if not self.interrupted:
                await self._evaluate(self.config.evaluation.final_tasks, edge=True)
        finally:
            await self.scheduler.close()
            await self._buffer.close()

    async def _train(self) -> None:
        """Run the loops until the learner loop ends; the first failure of any of them ends all."""
        self._spent = StepTime(self._clock, self._monitor.span)
        await self.fleet.beat()
        self._new_busy_s()  # what engines did in the evaluation before belongs to no step

        async def learn() -> None:
            await self._learner_loop()
            await self._to_push.join()  # in here, so that a push that fails now is heard as well

        background = [
            asyncio.create_task(self.scheduler.run()),
            asyncio.create_task(self._push_loop()),
            asyncio.create_task(self.fleet.heartbeat_loop()),
            asyncio.create_task(self._watch_loop()),
        ]
        watched: set[asyncio.Future[Any]] = {asyncio.create_task(learn()), self.scheduler.failure, *background}
        try:
            done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                future.result()
        finally:
            for future in watched:
                future.cancel()
            await asyncio.gather(*watched, return_exceptions=True)

    async def _learner_loop(self) -> None:
        progress, config, spent = self.progress, self.config, self._spent
        while progress.step < config.steps:
            with spent.part("wait_for_batch", "wait"):
                groups = await self._take()
            if groups is None:
                return
            with spent.part("train", "train"):
                report = await self._cluster.learner.step(groups)
            progress.step += 1
            progress.policy_version = report.policy_version
            group_ids = [group.group_id for group in groups]
            self._ledger.consume(group_ids, progress.step)
            self._recorder.mark_consumed(progress.step, [_fate(row) for row in report.rows])
            self.scheduler.consumed(group_ids, at_step=progress.step - 1)
            self.trained_digests.update(t.problem_digest for group in groups for t in group.trajectories)
            evaluation_due = config.evaluation.every and progress.step % config.evaluation.every == 0
            last = progress.step == config.steps
            if progress.step % config.learner.publish_every == 0 or last or evaluation_due:
                with spent.part("sync", "sync"):
                    snapshot = await self._cluster.learner.snapshot()
                self._to_push.put_nowait((progress.step, progress.policy_version, snapshot))
            if progress.step % config.run.checkpoint_every == 0 and not last:
                with spent.part("checkpoint", "checkpoint"):
                    await self._checkpoint()
            self._report(groups, report, spent.close(report.metrics["time/forward_backward"]))

    async def _take(self) -> list[TrajectoryGroup] | None:
        """The next step's groups, or None when the run should stop."""
        take = asyncio.create_task(
            self._buffer.take(
                self.config.rollout.groups_per_step,
                self.progress.step,
                timeout_s=self.config.cluster.stall_timeout_s,
            )
        )
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({take, stop}, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                return None
            return take.result()
        except TimeoutError as error:
            workers = "; ".join(self.fleet.describe())
            lost = self.scheduler.last_problem and f"; the last group was dropped for {self.scheduler.last_problem}"
            raise RunStalled(f"{error}; {self.scheduler.num_alive} groups are out; {workers}{lost}") from error
        finally:
            for task in (take, stop):
                task.cancel()
            await asyncio.gather(take, stop, return_exceptions=True)

    async def _push_loop(self) -> None:
        """Publish versions in order; older ones that pile up are passed over. Evaluations pin what was just pushed."""
        while True:
            step, version, snapshot = await self._to_push.get()
            try:
                while not self._to_push.empty() and not self._evaluation_due(step):
                    step, version, snapshot = self._to_push.get_nowait()
                    self._to_push.task_done()
                start_s = self._clock()
                await self.fleet.push(version, snapshot)
                self._sync_s = self._clock() - start_s
                self._monitor.span("push", "sync", start_s, self._clock())
                self.scheduler.published(version, step)
                if self._evaluation_due(step) and step < self.config.steps:
                    with self._spent.evaluation():
                        await self._evaluate(self.config.evaluation.tasks, step=step, version=version)
            finally:
                self._to_push.task_done()

    async def _watch_loop(self) -> None:
        """Silent workers and steps that do not come are seen while nothing else happens."""
        while True:
            await asyncio.sleep(self.config.cluster.heartbeat_s)
            self._monitor.tick(self.fleet.heartbeat_ages_s())

    def _evaluation_due(self, step: int) -> bool:
        return bool(self.config.evaluation.every) and step % self.config.evaluation.every == 0

    async def _evaluate(self, count: int, *, step: int = -1, version: int = -1, edge: bool = False) -> None:
        """Evaluate on `count` held-out tasks. At the edges of a run a lost worker means another try, else a gap."""
        step = self.progress.step if step < 0 else step
        version = self.progress.policy_version if version < 0 else version
        start_s = self._clock()
        for attempt in range(3 if edge else 1):
            try:
                await self.fleet.done(await self.fleet.choose(version, self.config.cluster.start_timeout_s))
                workers = [
                    m.client for m in self.fleet.members if m.state == WorkerState.HEALTHY and m.version == version
                ]
                evaluation, trajectories = await evaluate(
                    workers,
                    self._held_out[:count],
                    version=version,
                    step=step,
                    temperature=self.config.evaluation.temperature,
                )
                break
            except (WorkerLost, NotReady, FleetError, WeightSyncError) as error:
                self._monitor.event("evaluation_failed", step=step, attempt=attempt, error=str(error))
                if edge and attempt == 2:
                    raise
                await self.fleet.find_dead(error)  # or it would be chosen again at once
        else:
            return
        for worker in workers:
            self._monitor.span(worker.name, "evaluate", start_s, self._clock())
        self._recorder.write([_alone(t) for t in trajectories], split="eval", eval_step=step)
        self.progress.evaluations.append(evaluation)
        if edge and trajectories:
            self.transcripts.append(min(trajectories, key=lambda t: t.task.task_id))
        self._monitor.evaluation(evaluation)

    async def _checkpoint(self) -> None:
        start_s = self._clock()
        await asyncio.to_thread(self._recorder.flush, 60.0)
        path = await self._cluster.learner.save(
            str(self._folder.checkpoints),
            self.progress.step,
            {
                "step": self.progress.step,
                "policy_version": self.progress.policy_version,
                "evaluations": [asdict(evaluation) for evaluation in self.progress.evaluations],
                "curriculum": self._source.curriculum.state(),
            },
        )
        self._monitor.checkpoint(self.progress.step, path, self._clock() - start_s)

    def _report(self, groups: Sequence[TrajectoryGroup], report: LearnerReport, times: Mapping[str, float]) -> None:
        """Metrics of one step. `times`: its wall time by part, which adds up, so the idle ratio cannot lie."""
        stats = self._buffer.stats()
        counters = self.scheduler.counters
        step_s = times["time/step"]
        trajectories = [t for group in groups for t in group.trajectories if t.is_trainable]
        tokens = sum(t.num_sampled_tokens for t in trajectories)
        busy_s = self._new_busy_s()
        self._selection_bias.add(trajectories)
        metrics = {
            **report.metrics,
            **times,
            "trainer/tok_s": tokens / max(step_s, 1e-9),
            "rollout/episodes_s": len(trajectories) / max(step_s, 1e-9),
            "rollout/env_s/mean": sum(t.env_seconds for t in trajectories) / max(len(trajectories), 1),
            "weight_sync/latency_s": self._sync_s,
            "queue/ready_groups": stats.ready,
            "queue/in_flight": self.scheduler.num_alive,
            "queue/oldest_age_s": stats.oldest_ready_s,
            "rollout/busy_s": busy_s,
            "rollout/episode_s/mean": sum(t.seconds for t in trajectories) / max(len(trajectories), 1),
            "faults/restarts": self.fleet.num_restarts,
            "faults/redispatched": counters.redispatched,
            "faults/dropped_groups": counters.dropped,
            "workers/healthy": self.fleet.num_healthy,
            "curriculum/gated_groups": counters.gated,
            "time/rollout_idle_ratio": None if busy_s is None else max(1.0 - busy_s / max(step_s, 1e-9), 0.0),
            **self._source.curriculum.metrics(),
            **self._selection_bias.metrics(counters),
        }
        step, version = self.progress.step, self.progress.policy_version
        self._monitor.step(step, version, metrics)
        before = version - self.config.learner.updates_per_step
        self._monitor.detail(
            step, lambda samples: step_detail(groups, report.rows, learner_version=before, with_samples=samples)
        )
        self._watch_signal(metrics)
        self._folder.heartbeat(step=self.progress.step)

    def _watch_signal(self, metrics: Mapping[str, float]) -> None:
        """Tell once that nothing has been learned for a while (pitfalls C7). Trained rows, not differing rewards, are
        the sign: the price of tool calls teaches where all are correct."""
        self._quiet_steps = 0 if metrics.get("rows/trained") else self._quiet_steps + 1
        if self._quiet_steps != QUIET_STEPS:
            return
        shares = {kind: metrics[f"group/frac_{kind}"] for kind in ("mixed", "all_good", "all_bad")}
        self._monitor.event("no_signal", step=self.progress.step, steps=QUIET_STEPS, **shares)
        self._monitor.say(
            f"nothing to learn from for {QUIET_STEPS} steps: of the last groups {shares['all_good']:.0%} all right, "
            f"{shares['all_bad']:.0%} all alike and wrong; change the level, the reward or the temperature"
        )

    def _new_busy_s(self) -> float | None:
        """As `busy_since`, since the last report."""
        before, self._statuses = self._statuses, [member.status for member in self.fleet.members]
        return busy_since(before, self._statuses)


def _slot_gate(config: TrainConfig, *, version: int) -> SlotGate:
    rollout = config.rollout
    bound = StalenessBound(max_staleness=rollout.max_staleness, groups_per_step=rollout.groups_per_step)
    return SlotGate(bound, publish_every=config.learner.publish_every, version=version)


def _signal_gate(config: TrainConfig) -> SignalGate | None:
    if config.curriculum.gate == "none":
        return None
    price = ToolPrice(cost=config.env.tool_cost, below=config.env.tool_cost_below)
    limit = math.ceil(config.curriculum.max_refill * config.rollout.groups_per_step)
    return SignalGate(lambda group: has_signal(group, price), limit=limit)


def _alone(trajectory: Trajectory) -> TrajectoryGroup:
    """An evaluation's episode as a group of one, to be stored."""
    return TrajectoryGroup(
        group_id=trajectory.group_id, task=trajectory.task, attempt=trajectory.attempt, trajectories=(trajectory,)
    )


def _fate(row: RowReport) -> TrainedRow:
    """What the learner did with a trajectory, as the store keeps it."""
    return TrainedRow(
        trajectory_id=row.trajectory_id,
        advantage=row.advantage,
        learner_logprobs=row.learner_logprobs,
        status="consumed" if row.status in ("trained", "zero_advantage") else "dropped",
        cause=row.cause or ("" if row.status == "trained" else row.status),
    )
