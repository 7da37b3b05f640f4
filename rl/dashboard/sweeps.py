"""Runs of one `shoal train -m ...` beside each other: what was varied, and what came of it over the seeds."""

import functools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl.dashboard.folders import NotThere, confined
from rl.runs.run_folder import RunFolder, RunSummary

SEED = "seed"
"""The setting that is no choice: runs that differ in nothing else are the same thing again."""
MAX_MANIFEST_BYTES = 2**20
MAX_TEXT = 2000
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120),
    *(2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Two-sided 95% quantile of Student's t for 1, 2, ... degrees of freedom; beyond, the last, which is a little wide."""


def place_in_sweep(folder: RunFolder) -> dict[str, Any] | None:
    """{"id", "number", "of", "settings": {key: text}} of a run that is one of a sweep."""
    try:
        path = confined(folder, folder.manifest)
        stat = path.stat()
    except (NotThere, OSError):
        return None
    return _place(path, stat.st_mtime_ns) if stat.st_size <= MAX_MANIFEST_BYTES else None


def compare(sweep: str, runs: Sequence[tuple[RunSummary, dict[str, Any]]]) -> dict[str, Any]:
    """Runs of a sweep with their places: {"keys": varied settings but the seed, "of", "rows": one per combination}.

    A row has the final success over its runs that have one: `mean`, `low` and `high` (95%), `seeds`, `tasks`. Over two
    seeds and more the interval is Student's, over the runs' own numbers; with one it is the run's own (Wilson's, over
    its held-out tasks), and `over` says which of both it is.
    """
    if not runs:
        raise NotThere(f"no run is of a sweep {sweep[:100]!r}")
    ordered = sorted(runs, key=lambda pair: pair[1]["number"])
    keys = dict.fromkeys(key for _, place in ordered for key in place["settings"] if key != SEED)
    rows: dict[tuple[str | None, ...], list[tuple[RunSummary, dict[str, Any]]]] = {}
    for run, place in ordered:
        rows.setdefault(tuple(place["settings"].get(key) for key in keys), []).append((run, place))
    return {
        "sweep": sweep,
        "keys": list(keys),
        "of": max(place["of"] for _, place in ordered),
        "rows": [{"settings": list(chosen), **_row(members)} for chosen, members in rows.items()],
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% Student interval of the mean of shares, at least two of them.

    Example: interval([0.8, 0.9, 1.0]) -> (0.652, 1.0), for 0.9 +- 4.303 * 0.1 / sqrt(3) and no share is over 1.
    """
    mean = statistics.mean(values)
    half = T_975[min(len(values) - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def _row(members: Sequence[tuple[RunSummary, dict[str, Any]]]) -> dict[str, Any]:
    shown = [
        {
            "run": run.name,
            "seed": place["settings"].get(SEED, run.summary.get("seed")),
            "status": run.state.status if run.state else "unreadable",
            "step": run.state.step if run.state else None,
            "success_before": _share(run.summary.get("success_before")),
            "success_after": _share(run.summary.get("success_after")),
        }
        for run, place in members
    ]
    ended = [run.summary for run, _ in members if _share(run.summary.get("success_after")) is not None]
    values = [float(summary["success_after"]) for summary in ended]
    before = [value for one in shown if (value := one["success_before"]) is not None]
    low, high, over = None, None, ""
    if len(values) > 1:
        (low, high), over = interval(values), "seeds"
    elif values and _is_interval(ended[0].get("ci95")):
        (low, high), over = ended[0]["ci95"], "tasks"
    tasks = [summary.get("n") for summary in ended]
    return {
        "runs": shown,
        "seeds": len(values),
        "before": statistics.mean(before) if before else None,
        "mean": statistics.mean(values) if values else None,
        "low": low,
        "high": high,
        "over": over,
        "tasks": sum(n for n in tasks if isinstance(n, int)),
    }


def _share(value: Any) -> float | None:
    """A summary may be of foreign making."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0.0 <= value <= 1.0 else None


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_share(end) is not None for end in value)


@functools.lru_cache(maxsize=1000)
def _place(path: Path, _: int) -> dict[str, Any] | None:
    try:
        place = json.loads(path.read_text(encoding="utf-8", errors="replace")).get("sweep")
        settings = {str(key)[:MAX_TEXT]: str(value)[:MAX_TEXT] for key, value in place["settings"].items()}
        number, of = int(place["number"]), int(place["of"])
        return {"id": str(place["id"])[:MAX_TEXT], "number": number, "of": of, "settings": settings}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None  # most runs are of no sweep
