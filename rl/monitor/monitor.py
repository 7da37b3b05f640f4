"""What a run tells about itself, while it runs and afterwards.

The files are the record: metrics.jsonl, events.jsonl and spans.jsonl in the run folder, one JSON object a line; what
cannot be written there fails the run. Trackers are copies behind `MetricSink`: they work in a thread of their own
behind a bounded queue, lose rows rather than time, and can neither stop a run nor keep it waiting (sinks.py).
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.schema import TrainConfig
from rl.monitor.alerts import Alert, Alerts, active_alerts
from rl.monitor.json_lines import JsonLines, keep_json_lines, read_json_lines
from rl.monitor.progress import ProgressLine
from rl.monitor.sinks import MetricSink, ThreadedSink
from rl.monitor.verdict import WINDOW_STEPS, Verdict, judge

if TYPE_CHECKING:
    from rl.monitor.evaluation import Evaluation

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
SPANS_FILE = "spans.jsonl"


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
        sinks: list[MetricSink] | None = None,
        progress: ProgressLine | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sinks` and `progress` default to what `config.monitor` asks for. A run's time goes on where it stopped."""
        self._clock = clock
        self._metrics_path = folder / METRICS_FILE
        earlier = list(read_json_lines(folder / EVENTS_FILE))
        self._start_s = clock() - max((row["time_s"] for row in earlier), default=0.0)
        self._config = config
        self._alerts = Alerts(config, now_s=self._now(), active=active_alerts(earlier))
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW_STEPS)
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
        row = self._write("step", step, policy_version, metrics)
        self._recent.append(row)
        self._tell(self._alerts.step(row, self._now()))
        if self._progress is not None:
            self._progress.step(step, metrics, alerts=self._alerts.active)

    def detail(self, step: int, make: Callable[[bool], Mapping[str, Any]]) -> None:
        """Histograms and samples of a step, for trackers alone; not made where there are none.

        `make`: takes whether samples are due, returns {"histograms": ..., "samples": ...} (`step_detail`).
        """
        if self._sinks:
            every = self._config.monitor.samples_every
            self._send({"kind": "detail", "step": step, **make(bool(every) and step % every == 0)})

    def checkpoint(self, step: int, path: str, seconds: float) -> None:
        """A checkpoint lies at `path`."""
        self.event("checkpoint", step=step, seconds=round(seconds, 3))
        self._send({"kind": "checkpoint", "step": step, "path": path})

    def tick(self, heartbeat_ages_s: Mapping[str, float]) -> None:
        """Look for trouble that no step tells; worker -> seconds since it was last heard of."""
        self._tell(self._alerts.tick(self._now(), heartbeat_ages_s))

    def verdict(self) -> Verdict:
        """What limits the run, by the newest steps of this process."""
        return judge(list(self._recent), max_staleness=self._config.rollout.max_staleness)

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
        if kind == "run_failed":
            self._tell(self._alerts.run_failed(fields["error"]))

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
                self.event("tracker", name=sink.name, dropped=sink.num_dropped, problem=sink.problem)
        if (verdict := self.verdict()).limit != "unknown":
            self.event("verdict", **asdict(verdict))
        for file in (self._metrics, self._events, self._spans):
            file.close()

    def _tell(self, alerts: list[Alert]) -> None:
        for alert in alerts:
            self.event("alert", **alert.fields())
            self._send({"kind": "alert", **alert.fields()})
            self.say(f"{'alert' if alert.state == 'raised' else 'cleared'}: {alert.rule}: {alert.text}")

    def _write(self, kind: str, step: int, policy_version: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        row = {"kind": kind, "step": step, "policy_version": policy_version, "time_s": self._now()}
        row |= self._metrics.plain(metrics)
        row["monitor/non_finite"] = self._metrics.num_non_finite
        row["monitor/dropped"] = sum(sink.num_dropped for sink in self._sinks)
        self._metrics.append(row)
        self._send(row)
        return row

    def _send(self, row: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(row)

    def _now(self) -> float:
        return round(self._clock() - self._start_s, 4)


def _sinks_of(folder: Path, config: TrainConfig) -> list[MetricSink]:
    """Each module is imported where it is asked for; a missing package shows as the sink's problem."""
    asked, sinks = config.monitor, []
    if asked.wandb != "disabled":
        from rl.monitor.wandb_sink import start_wandb

        sinks.append(ThreadedSink(lambda: start_wandb(folder, config), name="wandb"))
    if "tensorboard" in asked.trackers:
        from rl.monitor.tensorboard_export import start_tensorboard

        sinks.append(ThreadedSink(lambda: start_tensorboard(folder), name="tensorboard"))
    if "trackio" in asked.trackers:
        from rl.monitor.trackio_sink import start_trackio

        sinks.append(ThreadedSink(lambda: start_trackio(folder, config), name="trackio"))
    if asked.prometheus_port:
        from rl.monitor.prometheus import start_prometheus

        sinks.append(ThreadedSink(lambda: start_prometheus(asked.prometheus_port), name="prometheus"))
    return sinks


def _progress_of(config: TrainConfig) -> ProgressLine:
    return ProgressLine(
        total_steps=config.steps, max_staleness=config.rollout.max_staleness, log_every=config.monitor.log_every
    )
