"""What the overview says beside its curves: the verdict, alerts, and how one step's trajectories were spread."""

import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rl.dashboard.database import RECENT
from rl.dashboard.folders import NotThere, confined
from rl.dashboard.metrics import Cursor, MetricTable, read_new_lines
from rl.dashboard.processes import last_rows
from rl.monitor.alerts import active_alerts
from rl.monitor.learning_verdict import LEARNING_METRICS, VerdictSettings, judge_learning
from rl.monitor.throughput_verdict import judge_throughput
from rl.runs.run_folder import RunFolder

TAIL_BYTES = 256 * 1024
"""Of metrics.jsonl: more than the steps that a verdict looks at."""
MAX_ALERTS = 50
MAX_HISTOGRAM_ROWS = 1000
"""Trajectories of a step that are looked at."""
MAX_RATIO_TOKENS = 100_000
"""Of one trajectory."""
NUM_BINS = 32


def glance(folder: RunFolder, table: MetricTable, settings: VerdictSettings) -> dict[str, Any]:
    """{"learning": {"state", "sentence", ...}, "limit", "sentence" (of the speed), "num_steps", "active": alerts that
    last, "alerts": raised and cleared, newest first}"""
    verdict = judge_throughput(_newest_steps(folder), max_staleness=settings.max_staleness)
    events = [row for row in last_rows(folder, folder.events, 5000) if _is_alert(row) or row.get("kind") == "resumed"]
    told = [row for row in events if row["kind"] == "alert"]
    return {
        "learning": asdict(judge_learning(table.rows(LEARNING_METRICS), settings)),
        "limit": verdict.limit,
        "sentence": verdict.sentence,
        "num_steps": verdict.num_steps,
        "active": list(active_alerts(events).values()),
        "alerts": told[::-1][:MAX_ALERTS],
    }


def histograms(db: sqlite3.Connection, step: int) -> dict[str, Any]:
    """Of what learner step `step` trained (0: the newest): staleness and tokens of each trajectory, and per sampled
    token the ratio exp(learner - rollout); each {"counts": [B], "edges": [B + 1]}, {} where there is nothing."""
    first = 0
    if not step:
        newest = "SELECT row, step FROM trajectories WHERE status = 'consumed' ORDER BY row DESC LIMIT 1"
        row, step = db.execute(newest).fetchone() or (0, 0)
        first = row - RECENT  # a step's rows were stored together: no need to look through all of a long run
    rows = db.execute(
        "SELECT row, num_tokens, staleness(step, min_version), learner_logprobs IS NOT NULL FROM trajectories "
        f"WHERE status = 'consumed' AND row > ? AND step = ? LIMIT {MAX_HISTOGRAM_ROWS}",
        (first, step),
    ).fetchall()
    ratios = [ratios_of(db, row[0]) for row in rows if row[3]]
    return {
        "step": step,
        "n": len(rows),
        "staleness": _whole_bins([row[2] for row in rows if row[2] is not None]),
        "length": _whole_bins([row[1] for row in rows]),
        "ratio": _bins(np.concatenate(ratios)) if ratios else {},
    }


def _newest_steps(folder: RunFolder) -> list[dict[str, Any]]:
    """Of kind "step", with nothing in them but numbers."""
    try:
        size = confined(folder, folder.metrics).stat().st_size
    except NotThere:
        return []
    new = read_new_lines(folder.metrics, Cursor(offset=max(0, size - TAIL_BYTES)), TAIL_BYTES)
    steps = [row for row in new.rows if row.get("kind") == "step"]
    return [{k: v for k, v in row.items() if isinstance(v, int | float)} | {"kind": "step"} for row in steps]


def _is_alert(row: dict[str, Any]) -> bool:
    return row.get("kind") == "alert" and isinstance(row.get("rule"), str) and row.get("state") in ("raised", "cleared")


def ratios_of(db: sqlite3.Connection, row: int) -> np.ndarray:
    """exp(learner - rollout) of a row's sampled tokens, of the first MAX_RATIO_TOKENS at most."""
    mask = _array(db, row, "loss_mask", "u1")
    learner, rollout = _array(db, row, "learner_logprobs", "<f4"), _array(db, row, "rollout_logprobs", "<f4")
    size = min(len(mask), len(learner), len(rollout))
    sampled = mask[:size] == 1
    difference = learner[:size][sampled].astype(np.float64) - rollout[:size][sampled]
    return np.exp(np.clip(difference[np.isfinite(difference)], -20.0, 20.0))


def _array(db: sqlite3.Connection, row: int, column: str, dtype: str) -> np.ndarray:
    with db.blobopen("trajectories", column, row, readonly=True) as blob:
        data = blob.read(MAX_RATIO_TOKENS * np.dtype(dtype).itemsize)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(data[: len(data) // size * size], dtype=dtype)


def _whole_bins(values: Sequence[int]) -> dict[str, Any]:
    """Bins one wide where they are few."""
    if not values or max(values) - min(values) >= NUM_BINS:
        return _bins(np.array(values, dtype=np.float64))
    counts, edges = np.histogram(values, bins=np.arange(min(values), max(values) + 2) - 0.5)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _bins(values: np.ndarray) -> dict[str, Any]:
    if not values.size:
        return {}
    low, high = float(values.min()), float(values.max())
    least = 1e-6 * max(1.0, abs(low), abs(high))  # numpy refuses bins that rounding would make empty
    alike = high - low < least
    span = (low - least, high + least) if alike else (low, high)
    counts, edges = np.histogram(values, bins=1 if alike else NUM_BINS, range=span)
    return {"counts": counts.tolist(), "edges": edges.tolist()}
