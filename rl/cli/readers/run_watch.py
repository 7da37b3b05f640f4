"""What a run says while it goes on, read from its folder alone: for `shoal top`, and one glance of it for scripts."""

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl.cli.readers.diff import settings_of
from rl.monitor.progress import BARS, duration, visible
from rl.monitor.verdict import Verdict, judge
from rl.runs.run_folder import RunFolder, RunFolderError, RunState
from rl.runs.usage import UsageError, resolve_run

WATCHED = (
    "reward/mean",
    "group/frac_mixed",
    "policy/entropy",
    "policy/mismatch_kl/mean",
    "optim/grad_norm",
    "off_policy/lag/mean",
    "off_policy/lag/max",
    "time/step",
    "time/trainer_idle_ratio",
    "trainer/tok_s",
    "rollout/episodes_s",
    "queue/ready_groups",
    "queue/in_flight",
    "env/error_ratio",
    "workers/healthy",
    "faults/restarts",
)
KEPT_ROWS = 200
KEPT_EVENTS = 100


class FollowedLines:
    """Rows of a growing file of JSON lines, each given once; all again after the file was rewritten (a resume)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0

    def new(self) -> tuple[list[dict[str, Any]], bool]:
        """(rows since the last call, whether they begin anew). A line that is being written waits for its end."""
        try:
            with self._path.open("rb") as file:
                status = self._path.stat()
                anew = status.st_ino != self._inode or status.st_size < self._offset
                if anew:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return [], False
        self._offset += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines() if line], anew


@dataclass(frozen=True, kw_only=True, slots=True)
class Glance:
    """A run at one moment."""

    run: str
    status: str
    step: int
    steps: int
    silent_s: float
    """Since its last sign of life, by this machine's clock."""
    eta_s: float | None
    """From the pace of the last steps; None while it is unknown and after the end."""
    verdict: Verdict
    metrics: dict[str, float | None]
    """Of the last learner step."""
    evaluation: dict[str, Any]
    """The newest line of metrics.jsonl that is one; empty before."""
    error: str


class RunWatch:
    """Reads what is new at every `look`. Example: RunWatch.open("runs", "latest").look().step -> 12"""

    def __init__(self, folder: RunFolder, *, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.rows: deque[dict[str, Any]] = deque(maxlen=KEPT_ROWS)
        """The last learner steps, oldest first."""
        self.evaluations: list[dict[str, Any]] = []
        self.events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._clock = clock
        self._metric_lines = FollowedLines(folder.metrics)
        self._event_lines = FollowedLines(folder.events)
        settings = settings_of(folder)
        self._steps = int(settings["steps"])
        self._max_staleness = int(settings["rollout.max_staleness"])

    @staticmethod
    def open(root: str, run: str) -> "RunWatch":
        """Raises `UsageError` where RUN names no run, or one without settings."""
        return RunWatch(resolve_run(root, run))

    def look(self) -> Glance:
        """Raises `UsageError` where run.json cannot be read."""
        self._read()
        try:
            state = self.folder.state(clock=self._clock)
        except RunFolderError as error:
            raise UsageError(str(error)) from None
        last = self.rows[-1] if self.rows else {}
        return Glance(
            run=self.folder.name,
            status=str(state.status),
            step=state.step,
            steps=self._steps,
            silent_s=max(0.0, self._clock() - state.heartbeat_s),
            eta_s=self._eta_s(state),
            verdict=judge(list(self.rows), max_staleness=self._max_staleness),
            metrics={name: value for name, value in last.items() if "/" in name},
            evaluation=self.evaluations[-1] if self.evaluations else {},
            error=state.error,
        )

    def series(self, metric: str, count: int) -> list[float]:
        """Its last finite values, oldest first."""
        values = [row[metric] for row in self.rows if row.get(metric) is not None]
        return values[-count:]

    def _read(self) -> None:
        rows, anew = self._metric_lines.new()
        if anew:
            self.rows.clear()
            self.evaluations.clear()
        for row in rows:
            (self.rows if row["kind"] == "step" else self.evaluations).append(row)
        events, anew = self._event_lines.new()
        if anew:
            self.events.clear()
        self.events.extend(events)

    def _eta_s(self, state: RunState) -> float | None:
        recent = list(self.rows)[-20:]
        if state.status != "running" or len(recent) < 2 or recent[-1]["step"] == recent[0]["step"]:
            return None
        pace_s = (recent[-1]["time_s"] - recent[0]["time_s"]) / (recent[-1]["step"] - recent[0]["step"])
        return max(0.0, pace_s * (self._steps - state.step))


def spark(values: list[float]) -> str:
    """Bars between the least and the largest value. Example: spark([1.0, 2.0, 3.0]) -> "▁▅█"; equal values are low."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low or 1.0
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)


def headline(glance: Glance) -> str:
    """Example: "runs-id  running  step 12/90  seen 2s ago  eta 3m 02s" """
    parts = [glance.run, glance.status, f"step {glance.step}/{glance.steps}"]
    if glance.status == "running":
        parts.append(f"seen {duration(glance.silent_s)} ago")
    if glance.eta_s is not None:
        parts.append(f"eta {duration(glance.eta_s)}")
    if glance.evaluation.get("eval/success") is not None:
        parts.append(f"success {glance.evaluation['eval/success']:.3f} at step {glance.evaluation['step']}")
    return "  ".join(parts)


def print_glance(watch: RunWatch, *, as_json: bool = False) -> int:
    """Once, where no terminal is there to redraw."""
    glance = watch.look()
    if as_json:
        print(json.dumps(asdict(glance)))
        return 0
    print(visible(headline(glance)))
    print(glance.verdict.sentence)
    if glance.error:
        print(visible(glance.error))
    for metric in WATCHED:
        if (value := glance.metrics.get(metric)) is not None:
            print(f"  {metric:<26}{value:<12.4g}{spark(watch.series(metric, 40))}")
    return 0
