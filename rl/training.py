"""`shoal train` and `shoal resume`: from a config to a finished run folder."""

import asyncio
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from conf.loading import read_config, resolved_yaml
from conf.schema import TrainConfig
from envs.registry import environment_facts
from envs.task import Task
from envs.tasks.curriculum import Curriculum, Outcome
from envs.tasks.task_source import TaskSource, counter_of, held_out_tasks
from rl.cluster.protocol import Cluster
from rl.cluster.start import start_cluster
from rl.loop.controller import Controller, Progress
from rl.loop.preflight import check_parts
from rl.loop.tasks import evaluation_levels, task_entries
from rl.monitor.evaluation import Evaluation
from rl.monitor.monitor import Monitor
from rl.monitor.verdict import RunVerdict
from rl.runs.checkpoint import Checkpoint, CheckpointError, load_latest
from rl.runs.run_folder import RunFolder, RunFolderError, RunStatus
from rl.runs.transcript import transcript_text
from rollout.record.ledger import GroupState, Ledger
from rollout.record.recorder import Recorder, TrajectoryReader
from rollout.record.trajectory import TrajectoryGroup
from rollout.schedule.scheduler import outcome_of

DRIVER_LOG = "driver.log"
"""File in the run's logs/ for what ended this process."""


class RunFailed(RuntimeError):
    """Raised when a run ends before its last step without being asked to; the cause is chained and in the folder."""


def train(config: TrainConfig, *, sweep: Mapping[str, Any] | None = None) -> int:
    """Run a whole training. Returns the exit code: 0 ok, 1 failed, 130 interrupted with a checkpoint written.

    `sweep`: which one of which sweep it is, for its manifest; None of one that stands alone.
    """
    if config.dry_run:
        print(resolved_yaml(config), end="")
        return 0
    check_parts(config)  # unknown names and missing files stop here, before anything is made or started
    facts = environment_facts([entry.env_id for entry in task_entries(config)])

    def fill(folder: RunFolder) -> None:
        folder.write_config(resolved_yaml(config))
        folder.write_manifest(seed=config.seed, environments=facts, sweep=sweep)

    folder = RunFolder.create(config.run.root, config.env.name, _policy_name(config), config.run.name, fill=fill)
    return _run(config, folder, None, resumed=False)


def resume(run: str, overrides: Sequence[str] = (), *, root: str = "runs") -> int:
    """Continue an interrupted or crashed run in its own folder, e.g. with overrides ["steps=200"]."""
    folder = RunFolder.resolve(root, run)
    config = read_config(folder.config.read_text(), overrides)
    check_parts(config)
    try:
        checkpoint = load_latest(folder.checkpoints)
    except CheckpointError:
        checkpoint = None  # it never got that far: begin again, with what it had committed
    folder.begin(step=checkpoint.step if checkpoint else 0)
    folder.write_config(resolved_yaml(config))
    return _run(config, folder, checkpoint, resumed=True)


def _policy_name(config: TrainConfig) -> str:
    return config.policy.preset if config.policy.kind == "hybrid" else "hf"


def _run(config: TrainConfig, folder: RunFolder, checkpoint: Checkpoint | None, *, resumed: bool) -> int:
    """Raises `RunFailed`, after the folder says so, for whatever ends the run but an interruption."""
    monitor: Monitor | None = None
    try:
        monitor = Monitor(folder.path, config)
        if resumed:
            monitor.rewind(checkpoint.step if checkpoint else 0)
        try:
            outcome = asyncio.run(_main(config, folder, monitor, checkpoint, resumed=resumed))
        except KeyboardInterrupt:  # the second Ctrl-C: stop hard, keep what is on disk
            outcome = RunStatus.INTERRUPTED
        folder.finish(outcome)
        monitor.close()
    except Exception as error:  # whatever ended the run is noted in its folder, then raised
        _note_failure(folder, monitor, error)
        raise RunFailed(
            f"run {folder.path} failed: {type(error).__name__}: {error} (more in {folder.logs / DRIVER_LOG})"
        ) from error
    if outcome == RunStatus.INTERRUPTED:
        print(f"\ninterrupted; continue with: shoal resume {folder.name}", file=sys.stderr)
        return 130
    return 0


def _note_failure(folder: RunFolder, monitor: Monitor | None, error: Exception) -> None:
    """Leave the cause in the folder as far as the disk lets us: the disk may be the cause."""
    reason = f"{type(error).__name__}: {error}"
    with suppress(OSError), (folder.logs / DRIVER_LOG).open("a", encoding="utf-8") as log:
        log.write("".join(traceback.format_exception(error)))
    with suppress(RunFolderError):
        folder.finish("failed", error=reason)
    if monitor is not None:
        with suppress(OSError):
            monitor.event("run_failed", error=reason)
        with suppress(OSError):
            monitor.close()


async def _main(
    config: TrainConfig, folder: RunFolder, monitor: Monitor, checkpoint: Checkpoint | None, *, resumed: bool
) -> RunStatus:
    started_s = time.monotonic()
    async with AsyncExitStack() as stack:
        cluster = await start_cluster(config, folder.path)
        stack.push_async_callback(cluster.close)
        monitor.event("cluster_started", seconds=round(time.monotonic() - started_s, 3))
        ledger = stack.enter_context(closing(Ledger(folder.ledger)))
        recorder = stack.enter_context(closing(Recorder(folder.trajectories)))
        left = Leftover()
        if resumed:
            left = await _restore(folder, cluster, ledger, recorder, checkpoint)
            monitor.event("resumed", step=left.progress.step, committed=len(left.committed), queued=len(left.queued))
        controller = await _assemble(config, folder, monitor, cluster, ledger, recorder, left)
        _stop_on_signals(controller)
        ready_s = time.monotonic()
        await controller.run(queued=left.queued, committed=left.committed)
        await asyncio.to_thread(recorder.flush, 60.0)
        if controller.interrupted:
            return RunStatus.INTERRUPTED
        if controller.held_out_overlap:
            raise RuntimeError(f"{controller.held_out_overlap} held-out problems were trained on")
        summary = _summary(
            config,
            controller,
            verdict=monitor.verdict(),
            train_s=time.monotonic() - ready_s,
            start_s=ready_s - started_s,
        )
        folder.write_summary(summary)
        _show_end(config, folder, monitor, controller, summary)
        return RunStatus.FINISHED


async def _assemble(
    config: TrainConfig,
    folder: RunFolder,
    monitor: Monitor,
    cluster: Cluster,
    ledger: Ledger,
    recorder: Recorder,
    left: "Leftover",
) -> Controller:
    entries = task_entries(config)
    during = config.evaluation.tasks if config.evaluation.every else 0  # what is held out is missing in training
    count = max(config.evaluation.final_tasks, during)
    held_out = await held_out_tasks(
        entries, cluster.host, count=count, seed=config.evaluation.seed, levels=evaluation_levels(config)
    )
    curriculum = Curriculum(entries, config.curriculum, seed=config.seed)
    if left.curriculum is not None:
        curriculum.load_state(left.curriculum)
    source = TaskSource(
        entries,
        cluster.host,
        seed=config.seed,
        held_out=frozenset(held_out),
        counter=next_counter(ledger),
        curriculum=curriculum,
    )
    catch_up(source, ledger, left.ended)
    return Controller(
        config,
        cluster=cluster,
        folder=folder,
        monitor=monitor,
        ledger=ledger,
        recorder=recorder,
        source=source,
        held_out=held_out,
        progress=left.progress,
    )


def next_counter(ledger: Ledger) -> int:
    """Counter of the first training task never issued."""
    last = ledger.last_issued()
    return counter_of(last) + 1 if last else 0


def catch_up(source: TaskSource, ledger: Ledger, ended: Sequence[TrajectoryGroup]) -> None:
    """Tell a curriculum what happened since its checkpoint: groups that were issued, and those that came to an end.

    Groups that are queued again or wait for the learner unread stay open: they are settled when they end anew. What is
    consumed was so before the checkpoint, whose state knows it; one of version 0.1 has no state, and then consumed
    groups stay out of the statistics: nothing tells their rewards any more.
    """
    states = {state: ledger.tasks_in(state) for state in GroupState if state != GroupState.CONSUMED}
    for task in sorted((task for tasks in states.values() for task in tasks), key=counter_of):
        source.adopt(task)
    for group in ended:
        source.settled(group.task, outcome_of(group))
    for task in states[GroupState.DROPPED]:
        source.settled(task, Outcome())  # of those not settled yet: nothing of them was stored


@dataclass(kw_only=True, slots=True)
class Leftover:
    """What a run begins with: nothing, or what an earlier process left."""

    progress: Progress = field(default_factory=Progress)
    queued: list[Task] = field(default_factory=list)
    committed: list[TrajectoryGroup] = field(default_factory=list)
    curriculum: dict[str, Any] | None = None
    """Its state at the checkpoint."""
    ended: list[TrajectoryGroup] = field(default_factory=list)
    """Groups whose outcome stands: committed, or dropped with trajectories."""


async def _restore(
    folder: RunFolder, cluster: Cluster, ledger: Ledger, recorder: Recorder, checkpoint: Checkpoint | None
) -> Leftover:
    """Go back to the checkpoint: weights, ledger, rows and curves as they were, nothing lost.

    A committed group keeps its trajectories unless they were sampled by versions that the run has now forgotten, or
    never reached the disk; then its task is sampled again.
    """
    left = Leftover()
    if checkpoint is not None:
        state = checkpoint.state["run"]
        left.progress = Progress(
            step=state["step"],
            policy_version=await cluster.learner.restore(str(checkpoint.path)),
            evaluations=[Evaluation(**row) for row in state["evaluations"]],
        )
        left.curriculum = state.get("curriculum")  # missing in checkpoints of version 0.1
    ledger.rewind(left.progress.step)
    recorder.rewind(left.progress.step)
    recorder.flush(60.0)
    with closing(TrajectoryReader(folder.trajectories)) as reader:
        stored = {group.group_id: group for group in reader.groups("committed")}
        dropped = {group.group_id: group for group in reader.groups("dropped")}
    for task in ledger.tasks_in(GroupState.COMMITTED):
        group = stored.get(task.task_id)
        if group is None or max(t.max_policy_version for t in group.trajectories) > left.progress.policy_version:
            ledger.requeue(task.task_id, "resume")
        else:
            left.committed.append(group)
    left.queued = ledger.tasks_in(GroupState.QUEUED)
    gone = {task.task_id for task in ledger.tasks_in(GroupState.DROPPED)}
    left.ended = [*left.committed, *(group for group_id, group in dropped.items() if group_id in gone)]
    return left


def _stop_on_signals(controller: Controller) -> None:
    """First Ctrl-C or SIGTERM: finish the step, write a checkpoint, exit 130. Second: stop at once."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        print("\nstopping after this step (Ctrl-C again to stop at once) ...", file=sys.stderr)
        controller.stop()
        loop.remove_signal_handler(signal.SIGTERM)
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for name in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(name, first)


def _summary(
    config: TrainConfig, controller: Controller, *, verdict: RunVerdict, train_s: float, start_s: float
) -> dict[str, Any]:
    evaluations = controller.progress.evaluations
    before, after = evaluations[0], evaluations[-1]
    return {
        "env": config.env.name,
        "policy": _policy_name(config),
        "seed": config.seed,
        "steps": controller.progress.step,
        "success_before": before.success,
        "success_after": after.success,
        "ci95": list(after.ci95),
        "ci95_before": list(before.ci95),
        "n": after.n,
        "train_seconds": round(train_s, 2),
        "start_seconds": round(start_s, 2),
        "setup_seconds": float(os.environ.get("SHOAL_SETUP_SECONDS", "0")),
        "held_out_overlap": controller.held_out_overlap,
        "held_out_passed_over": controller.held_out_passed_over,
        "before": asdict(before),
        "after": asdict(after),
        "curve": [[e.step, e.success, e.n] for e in evaluations],
        "restarts": controller.fleet.num_restarts,
        "verdict": verdict.learning.sentence,
        "learning": asdict(verdict.learning),
        "throughput": verdict.throughput.sentence,
        "transcripts": [transcript_text(t) for t in controller.transcripts],
    }


def _show_end(
    config: TrainConfig, folder: RunFolder, monitor: Monitor, controller: Controller, summary: dict[str, Any]
) -> None:
    """The curve, one task before and after, and where to look next."""
    if config.monitor.transcript and len(controller.transcripts) == 2:
        for title, trajectory in zip(("before", "after"), controller.transcripts, strict=True):
            monitor.say(f"\none held-out task, {title} training\n{transcript_text(trajectory)}")
    curve = "  ".join(f"{e.step}: {e.success:.2f}" for e in controller.progress.evaluations)
    low, high = summary["ci95"]
    monitor.say(
        f"\n{summary['verdict']}\nheld-out success by step   {curve}\n"
        f"{summary['env']}: success {summary['success_before']:.3f} -> {summary['success_after']:.3f} "
        f"(95% interval {low:.3f} to {high:.3f}, {summary['n']} held-out tasks, overlap with training "
        f"{summary['held_out_overlap']}), {summary['train_seconds']:.0f} s\n"
        f"{summary['throughput']}\nrun folder {folder.path}\nlook closer: shoal show {folder.name} --traj 1"
    )
