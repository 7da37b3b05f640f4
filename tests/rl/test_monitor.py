"""Metrics, events and spans on disk; trackers that fail, hang or fall behind; the line on the terminal."""

import io
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from conf.loading import load_config
from rl.monitor.evaluation import Evaluation
from rl.monitor.json_lines import JsonLines, keep_json_lines, read_json_lines
from rl.monitor.monitor import Monitor
from rl.monitor.progress import ProgressLine, duration, sparkline
from rl.monitor.sinks import ThreadedSink
from tests.fakes import FakeClock


def quiet(folder: Path, **kwargs: Any) -> Monitor:
    return Monitor(folder, load_config(["monitor=quiet"]), **kwargs)


def evaluation(step: int, success: float) -> Evaluation:
    return Evaluation(
        step=step, policy_version=step, success=success, ci95=(0.1, 0.9), n=10, errors=0, reward=success, turns=2.0,
        tool_calls=1.0, facts={"call_rate/needed": 1.0},
    )  # fmt: skip


# --- files


def test_a_step_is_one_json_object_with_its_version_and_time(tmp_path):
    clock = FakeClock()
    monitor = quiet(tmp_path, clock=clock)
    clock.advance(2.5)
    monitor.step(3, 4, {"reward/mean": np.float32(0.5), "queue/in_flight": np.int64(7)})
    monitor.close()
    (row,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert row == {
        "kind": "step", "step": 3, "policy_version": 4, "time_s": 2.5, "reward/mean": 0.5, "queue/in_flight": 7,
        "monitor/non_finite": 0, "monitor/dropped": 0,
    }  # fmt: skip


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path):
    monitor = quiet(tmp_path)
    monitor.step(1, 1, {"loss/policy": float("nan"), "optim/grad_norm": np.float32("inf"), "hist": [1, float("-inf")]})
    monitor.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (row["loss/policy"], row["optim/grad_norm"], row["hist"]) == (None, None, [1, None])
    assert row["monitor/non_finite"] == 3


def test_an_evaluation_is_a_row_of_its_step(tmp_path):
    monitor = quiet(tmp_path)
    monitor.evaluation(evaluation(20, 0.7))
    monitor.close()
    (row,) = read_json_lines(tmp_path / "metrics.jsonl")
    assert (row["kind"], row["step"], row["policy_version"], row["eval/success"]) == ("evaluation", 20, 20, 0.7)
    assert (row["eval/ci95_low"], row["eval/ci95_high"], row["eval/call_rate/needed"]) == (0.1, 0.9, 1.0)


def test_events_and_spans_lie_on_the_time_axis_of_the_metrics(tmp_path):
    clock = FakeClock()
    clock.advance(100)
    monitor = quiet(tmp_path, clock=clock)
    clock.advance(5)
    monitor.event("worker_lost", worker="worker-0", error="killed")
    monitor.span("learner", "train", 101.0, 104.5)
    monitor.close()
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["time_s"], event["worker"]) == ("worker_lost", 5.0, "worker-0")
    (span,) = read_json_lines(tmp_path / "spans.jsonl")
    assert span == {"process": "learner", "activity": "train", "start_s": 1.0, "end_s": 4.5}


def test_a_resumed_run_forgets_metrics_after_the_checkpoint_and_its_time_goes_on(tmp_path):
    clock = FakeClock()
    monitor = quiet(tmp_path, clock=clock)
    for step in (1, 2, 3):
        clock.advance(10)
        monitor.step(step, step, {})
        monitor.event("checkpoint", step=step)
    monitor.close()
    clock.advance(1000)
    resumed = quiet(tmp_path, clock=clock)
    resumed.rewind(2)
    clock.advance(1)
    resumed.step(3, 3, {})
    resumed.close()
    rows = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert [(row["step"], row["time_s"]) for row in rows] == [(1, 10.0), (2, 20.0), (3, 31.0)]
    assert len(list(read_json_lines(tmp_path / "events.jsonl"))) == 3


def test_a_line_that_a_kill_cut_off_is_neither_read_nor_glued_to_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b"')
    assert list(read_json_lines(path)) == [{"a": 1}]
    lines = JsonLines(path)
    lines.append({"a": 3})
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": 3}]  # readable while it is open
    lines.close()
    keep_json_lines(path, lambda row: row["a"] > 1)
    assert path.read_text() == '{"a": 3}\n'


def test_what_is_no_json_is_refused_by_name(tmp_path):
    lines = JsonLines(tmp_path / "rows.jsonl")
    with pytest.raises(TypeError, match="object"):
        lines.append({"a": object()})
    lines.close()


# --- trackers


class ScriptedTracker:
    """Remembers rows; raises or waits where told."""

    def __init__(self, *, fail_on: int = -1, gate: threading.Event | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = False
        self._fail_on = fail_on
        self._gate = gate

    def log(self, data: dict[str, Any]) -> None:
        if self._gate is not None:
            assert self._gate.wait(30)
        if data["step"] == self._fail_on:
            raise ConnectionError("gone")
        self.rows.append(data)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_every_row_and_is_finished(tmp_path):
    tracker = ScriptedTracker()
    monitor = quiet(tmp_path, sinks=[ThreadedSink(lambda: tracker)])
    for step in range(5):
        monitor.step(step, step, {"reward/mean": 0.1})
    monitor.close()
    assert [row["step"] for row in tracker.rows] == [0, 1, 2, 3, 4] and tracker.finished


def test_a_row_that_a_tracker_refuses_is_counted_and_the_rest_goes_on(tmp_path):
    tracker = ScriptedTracker(fail_on=1)
    sink = ThreadedSink(lambda: tracker)
    monitor = quiet(tmp_path, sinks=[sink])
    for step in range(3):
        monitor.step(step, step, {})
    monitor.close()
    assert [row["step"] for row in tracker.rows] == [0, 2]
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["dropped"], event["problem"]) == ("tracker", 1, "ConnectionError: gone")
    assert len(list(read_json_lines(tmp_path / "metrics.jsonl"))) == 3


def test_a_tracker_that_cannot_start_drops_all_and_stops_nothing(tmp_path):
    def start() -> ScriptedTracker:
        raise RuntimeError("no key")

    sink = ThreadedSink(start)
    monitor = quiet(tmp_path, sinks=[sink])
    monitor.step(1, 1, {})
    monitor.close()
    assert (sink.num_dropped, sink.problem) == (1, "RuntimeError: no key")


def test_a_tracker_that_hangs_costs_rows_and_no_time(tmp_path):
    gate = threading.Event()
    tracker = ScriptedTracker(gate=gate)
    sink = ThreadedSink(lambda: tracker, max_queued=2)
    monitor = quiet(tmp_path, sinks=[sink])
    for step in range(10):
        monitor.step(step, step, {})
    assert sink.num_dropped >= 7  # one row in its hands, two in the queue
    monitor.close(deadline_s=0.2)
    assert len(list(read_json_lines(tmp_path / "metrics.jsonl"))) == 10
    gate.set()


def inspect_wandb(folder: Path) -> list[dict[str, Any]]:
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", folder / "wandb"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_an_offline_wandb_run_lies_in_the_run_folder_and_holds_steps_out_of_order(tmp_path, capfd):
    folder = tmp_path / "20261123-calc"
    folder.mkdir()
    monitor = Monitor(folder, load_config(["seed=7", "monitor.progress=false"]))
    monitor.step(1, 1, {"reward/mean": 0.25, "loss/policy": float("nan")})
    monitor.step(2, 2, {"reward/mean": 0.5})
    monitor.evaluation(evaluation(1, 0.125))  # of an earlier step: wandb's own step would drop it
    monitor.close()
    assert list(read_json_lines(folder / "events.jsonl")) == []
    captured = capfd.readouterr()
    assert captured.out == "" and "wandb" not in captured.err
    records = inspect_wandb(folder)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["project"], run["display_name"]) == ("shoal", "20261123-calc")
    assert run["config"]["update"]["seed"] == 7
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [item["trainer/step"] for item in items] == [1, 2, 1]
    assert [item.get("reward/mean") for item in items] == [0.25, 0.5, None] and items[2]["eval/success"] == 0.125
    assert items[0]["loss/policy"] is None and "time/s" in items[0]
    axes = [record["metric"].get("step_metric") for record in records if record["type"] == "metric"]
    assert "trainer/step" in axes


def test_wandb_is_not_imported_where_it_is_disabled(tmp_path):
    code = (
        "import sys, pathlib; from rl.monitor.monitor import Monitor; from conf.loading import load_config\n"
        f"m = Monitor(pathlib.Path({str(tmp_path)!r}), load_config(['monitor=quiet'])); m.step(1, 1, {{}}); m.close()\n"
        "sys.exit('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 0 and not (tmp_path / "wandb").exists()


# --- terminal

METRICS = {
    "reward/mean": 0.5, "off_policy/lag/mean": 1.25, "trainer/tok_s": 1234.5, "time/trainer_idle_ratio": 0.41,
    "workers/healthy": 2,
}  # fmt: skip


def line_of(*, terminal: bool, log_every: int = 1) -> tuple[ProgressLine, io.StringIO, FakeClock]:
    out, clock = io.StringIO(), FakeClock()
    console = Console(file=out, force_terminal=terminal, width=200, highlight=False)
    return (
        ProgressLine(total_steps=90, max_staleness=2, log_every=log_every, console=console, clock=clock),
        out,
        clock,
    )


def test_elsewhere_than_on_a_terminal_every_nth_step_is_a_plain_line():
    progress, out, clock = line_of(terminal=False, log_every=2)
    for step in (1, 2, 3, 4):
        progress.step(step, METRICS)
        clock.advance(2)
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 2/90  reward 0.50 ▅▅  lag 1.2/2  1,234 tok/s  trainer waits 41%  2 workers ok  eta 2m 56s",
        "step 4/90  reward 0.50 ▅▅▅▅  lag 1.2/2  1,234 tok/s  trainer waits 41%  2 workers ok  eta 2m 52s",
    ]


def test_on_a_terminal_one_line_is_redrawn_and_texts_stay_above_it():
    progress, out, _ = line_of(terminal=True)
    progress.step(1, METRICS)
    progress.say("[bold]evaluation[/bold]\x1b[31m")
    progress.step(2, METRICS)
    progress.close()
    progress.close()
    assert "\x1b[2K" in out.getvalue() and "[bold]evaluation[/bold]\\x1b[31m" in out.getvalue()
    assert out.getvalue().count("\n") <= 3


def test_parts_without_a_metric_are_left_out():
    progress, out, _ = line_of(terminal=False)
    progress.step(1, {"reward/mean": None, "workers/healthy": 1})
    assert out.getvalue() == "step 1/90  1 worker ok\n"


def test_a_run_without_progress_prints_nothing(tmp_path, capsys):
    monitor = quiet(tmp_path)
    monitor.step(1, 1, METRICS)
    monitor.evaluation(evaluation(1, 0.5))
    monitor.close()
    assert capsys.readouterr().out == ""


def test_small_texts():
    assert sparkline([0.0, 0.5, 1.0, 2.0, -1.0]) == "▁▅██▁"
    assert [duration(s) for s in (4.4, 75, 7300)] == ["4s", "1m 15s", "2h 01m"]
