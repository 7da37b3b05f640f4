"""What a run tells about itself, while it runs and afterwards.

The files are the record: metrics.jsonl, events.jsonl and spans.jsonl in the run folder, one JSON object a line; what
cannot be written there fails the run. Trackers are copies behind `MetricSink`: they work in a thread of their own
behind a bounded queue, lose rows rather than time, and can neither stop a run nor keep it waiting.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.schema import TrainConfig
from rl.json_lines import JsonLines, keep_json_lines, read_json_lines
from rl.progress import ProgressLine

if TYPE_CHECKING:
    from rl.evaluate import Evaluation

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SPANS_FILE = "spans.jsonl"


class MetricSink(Protocol):
    """A copy of the metrics somewhere else. `write` returns at once and never raises."""

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


class Monitor:
    """Takes what happens, in the driver's process only, and hands it to files, sinks and the terminal.

    Example: monitor.step(12, 12, {"reward/mean": 0.4}) appends
    {"kind": "step", "step": 12, "policy_version": 12, "time_s": 31.2, "reward/mean": 0.4, ...} to metrics.jsonl.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        *,
        sinks: "list[MetricSink] | None" = None,
        progress: ProgressLine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sinks` and `progress` default to what `config.monitor` asks for. A run's time goes on where it stopped."""
        self._clock = clock
        self._metrics_path = folder / METRICS_FILE
        earlier = (row["time_s"] for row in read_json_lines(folder / EVENTS_FILE))
        self._start_s = clock() - max(earlier, default=0.0)
        self._metrics = JsonLines(folder / METRICS_FILE)
        self._events = JsonLines(folder / EVENTS_FILE)
        self._spans = JsonLines(folder / SPANS_FILE)
        self._sinks = _sinks_of(folder, config) if sinks is None else sinks
        self._progress = progress or (_progress_of(config) if config.monitor.progress else None)
        self._closed = False

    def rewind(self, step: int) -> None:
        """Forget metrics after the checkpoint of `step`, so that no curve goes over a step twice. Events stay."""
        self._metrics.close()
        keep_json_lines(self._metrics_path, lambda row: row["step"] <= step)
        self._metrics = JsonLines(self._metrics_path)

    def step(self, step: int, policy_version: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of one learner step, named "area/name"."""
        self._write("step", step, policy_version, metrics)
        if self._progress is not None:
            self._progress.step(step, metrics)

    def evaluation(self, evaluation: "Evaluation") -> None:
        """One held-out evaluation, as metrics "eval/..." of its step."""
        found = asdict(evaluation)
        step, version, facts = found.pop("step"), found.pop("policy_version"), found.pop("facts")
        found["ci95_low"], found["ci95_high"] = found.pop("ci95")
        self._write("evaluation", step, version, {f"eval/{name}": value for name, value in (found | facts).items()})
        low, high = evaluation.ci95
        failed = f", {evaluation.errors} episodes failed" if evaluation.errors else ""
        self.say(
            f"evaluation at step {evaluation.step}: success {evaluation.success:.3f} "
            f"(95% {low:.3f} to {high:.3f}, n={evaluation.n}, policy version {evaluation.policy_version}{failed})"
        )

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once: a restart, a dropped group, a checkpoint."""
        self._events.append({"kind": kind, "time_s": self._now(), "unix_s": time.time(), **fields})

    def span(self, process: str, activity: str, start_s: float, end_s: float) -> None:
        """What a process did for how long; times as read from the monitor's clock."""
        row = {"process": process, "activity": activity}
        self._spans.append(row | {"start_s": start_s - self._start_s, "end_s": end_s - self._start_s})

    def say(self, text: str) -> None:
        """A line for the person at the terminal, where there is to be progress at all."""
        if self._progress is not None:
            self._progress.say(text)

    def close(self, deadline_s: float = 30.0) -> None:
        """Safe to call twice. Sinks get `deadline_s` together to finish."""
        if self._closed:
            return
        self._closed = True
        if self._progress is not None:
            self._progress.close()
        until_s = time.monotonic() + deadline_s
        for sink in self._sinks:
            sink.close(max(0.0, until_s - time.monotonic()))
            if sink.num_dropped or sink.problem:
                self.event("tracker", dropped=sink.num_dropped, problem=sink.problem)
        for file in (self._metrics, self._events, self._spans):
            file.close()

    def _write(self, kind: str, step: int, policy_version: int, metrics: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": step, "policy_version": policy_version, "time_s": self._now()}
        row |= self._metrics.plain(metrics)
        row["monitor/non_finite"] = self._metrics.num_non_finite
        row["monitor/dropped"] = sum(sink.num_dropped for sink in self._sinks)
        self._metrics.append(row)
        for sink in self._sinks:
            sink.write(row)

    def _now(self) -> float:
        return round(self._clock() - self._start_s, 4)


def _sinks_of(folder: Path, config: TrainConfig) -> list[MetricSink]:
    if config.monitor.wandb == "disabled":
        return []
    return [ThreadedSink(lambda: _start_wandb(folder, config))]


def _progress_of(config: TrainConfig) -> ProgressLine:
    return ProgressLine(
        total_steps=config.steps, max_staleness=config.rollout.max_staleness, log_every=config.monitor.log_every
    )


class Tracker(Protocol):
    """A started run of a tracker; may block and may raise."""

    def log(self, data: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class ThreadedSink:
    """A `MetricSink` that starts and feeds a tracker in its own thread.

    A row that finds the queue full is dropped and counted, and so is one that the tracker refuses. A tracker that
    cannot be started drops all.
    """

    def __init__(self, start: Callable[[], Tracker], *, max_queued: int = 512) -> None:
        self.problem = ""
        self._refused = 0
        self._overflowed = 0
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(max_queued)
        self._thread = threading.Thread(target=self._work, args=(start,), name="tracker", daemon=True)
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


class _WandbTracker:
    """Rows as wandb wants them. Never `log(step=...)`: wandb drops whatever comes later for an earlier step."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("trainer/step", hidden=True)
        run.define_metric("*", step_metric="trainer/step")

    def log(self, data: dict[str, Any]) -> None:
        named = {"step": "trainer/step", "policy_version": "trainer/policy_version", "time_s": "time/s"}
        numbers = {named.get(key, key): value for key, value in data.items() if key != "kind" and value is not None}
        self._run.log(numbers)

    def finish(self) -> None:
        self._run.finish()


def _start_wandb(folder: Path, config: TrainConfig) -> Tracker:
    """A wandb run inside the run folder: silent, without a prompt, without a copy of the console."""
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)  # read by wandb when it is imported
    import wandb

    run = wandb.init(
        project=config.monitor.wandb_project,
        name=folder.name,
        dir=folder,
        mode="online" if config.monitor.wandb == "online" else "offline",
        config=asdict(config),
        settings=wandb.Settings(init_timeout=30.0, finish_timeout=20.0, disable_git=True, disable_code=True),
    )
    return _WandbTracker(run)
