"""A run under a scripted clock: what the overview shows is worked out here from spans and events, by code of its own.

Elsewhere: every sentence of the verdict and the shares of a real run (test_throughput_verdict), every rule of the
alerts (test_alerts), histograms against rows (test_dashboard_api), panels against the lines of a live run
(test_dashboard_live).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from policy.engine.protocol import EngineStats
from rl.dashboard.metrics import MetricTables
from rl.dashboard.overview import glance
from rl.loop.step_time import PARTS, StepTime, busy_since
from rl.monitor.learning_verdict import VerdictSettings
from rl.monitor.monitor import Monitor
from rl.runs.run_folder import RunFolder
from rollout.schedule.lease import WorkerStatus
from tests.fakes import FakeClock
from tests.rl.dashboard_runs import make_run
from tests.rl.training import small_config

SCRIPT = (  # seconds of wait, train, learner inside train, records, sync, checkpoint; engines busy; age of the queue
    (4.0, 3.0, 2.5, 0.25, 0.5, 0.0, 6.0, 1.0),
    (6.0, 2.0, 2.0, 0.25, 0.5, 1.0, 8.0, 2.0),
    (5.0, 2.5, 2.0, 0.5, 0.25, 0.0, 7.5, 6.0),
    (7.0, 2.0, 1.5, 0.25, 0.5, 1.5, 9.0, 3.0),
)


def _scripted_run(folder: RunFolder, root: Path) -> float:
    """Written by the run's own clockwork; returns the seconds that the steps took by the clock's own count."""
    for path in (folder.metrics, folder.events, folder.spans):
        path.unlink()
    clock = FakeClock()
    clock.advance(100.0)  # the machine's clock does not begin with the run
    monitor = Monitor(folder.path, small_config(root, "monitor=quiet"), clock=clock)
    spent = StepTime(clock, monitor.span)
    begun_s = clock()
    for step, (wait, train, learner, records, sync, checkpoint, busy, age) in enumerate(SCRIPT, start=1):
        for seconds, part in ((wait, "wait_for_batch"), (train, "train"), (sync, "sync"), (checkpoint, "checkpoint")):
            with spent.part(part, part):
                clock.advance(seconds)
            clock.advance(records / 4)  # between the parts
        metrics = {"rollout/busy_s": busy, "queue/oldest_age_s": age, "off_policy/lag/mean": 1.0}
        lag = 99.0 if step == 3 else 1.0  # one step on data that is too old: an alert, and its end
        monitor.step(step, step, spent.close(learner) | metrics | {"off_policy/lag/max": lag})
    monitor.close()
    return clock() - begun_s


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_under_a_scripted_clock_the_overview_s_idle_ratio_verdict_and_alerts_follow_from_spans(tmp_path: Path) -> None:
    folder = RunFolder(path=make_run(tmp_path))
    wall_s = _scripted_run(folder, tmp_path)
    rows, spans = _lines(folder.metrics), _lines(folder.spans)
    ends = [row["time_s"] for row in rows]
    for row, start_s, end_s in zip(rows, [0.0, *ends], ends, strict=False):
        waits = [s for s in spans if s["activity"] == "wait_for_batch" and start_s <= s["start_s"] < end_s]
        waited_s = sum(s["end_s"] - s["start_s"] for s in waits)
        assert row["time/step"] == pytest.approx(end_s - start_s)
        assert row["time/trainer_idle_ratio"] == pytest.approx(waited_s / (end_s - start_s))
        assert sum(row[f"time/{part}"] for part in PARTS) == pytest.approx(end_s - start_s, rel=0.02)
    assert sum(row["time/step"] for row in rows) == pytest.approx(wall_s, rel=0.02)

    told = glance(folder, MetricTables().get(folder.metrics), VerdictSettings(max_staleness=2))
    waited_s = sum(s["end_s"] - s["start_s"] for s in spans if s["activity"] == "wait_for_batch")
    assert told["sentence"] == (
        f"rollout-bound: the learner waits {waited_s / wall_s:.0%} of the time; add workers or raise max_staleness"
    )
    assert (told["limit"], told["num_steps"], told["active"]) == ("rollout", len(SCRIPT), [])
    assert [(a["rule"], a["state"], a["step"], a["time_s"]) for a in told["alerts"]] == [
        ("staleness_violation", "cleared", 4, ends[3]),
        ("staleness_violation", "raised", 3, ends[2]),
    ]
    (verdict,) = [event for event in _lines(folder.events) if event["kind"] == "verdict"]
    assert verdict["learner_idle"] == pytest.approx(waited_s / wall_s)
    assert verdict["rollout_idle"] == pytest.approx(1 - sum(script[6] for script in SCRIPT) / wall_s)
    assert verdict["queue_age_s"] == pytest.approx((1.0 + 2.0 + 6.0 + 3.0) / 4)


def _heartbeat(busy_s: float, pid: int = 1) -> WorkerStatus:
    engine = EngineStats(busy_s=busy_s)
    return WorkerStatus(name="worker-0", policy_version=0, groups=0, episodes=0, engine=engine, pid=pid)


def test_a_restarted_worker_counts_from_nothing_and_silence_is_no_idleness() -> None:
    old, idle, later = _heartbeat(9.0), _heartbeat(9.0), _heartbeat(11.0)
    assert busy_since([old], [old]) is None
    assert busy_since([None], [None]) is None
    assert busy_since([old], [idle]) == 0.0
    assert busy_since([old, old], [later, old]) == 1.0
    assert busy_since([old], [_heartbeat(2.5, pid=2)]) == 2.5
    assert busy_since([old], [_heartbeat(10.0, pid=2)]) == 10.0
