"""How staleness, length and ratio of what was trained moved over the run: step by bin, from the rows themselves."""

import sqlite3
from itertools import pairwise
from typing import Any

import numpy as np

from rl.dashboard.overview import ratios_of

MAX_COLUMNS = 60
"""Stretches of steps; each is one column."""
MAX_ROWS = 20_000
"""That staleness and length are taken from; of a larger run every third, fifth, ..."""
RATIO_ROWS = 6
"""Trajectories of each stretch whose tokens are read."""
NUM_BINS = 24
RATIO_EDGES = np.exp(np.linspace(-1.0, 1.0, NUM_BINS + 1))
"""What lies beyond counts in the last bin of its side."""
MAX_WHOLE_BINS = 32


def heat_maps(db: sqlite3.Connection) -> dict[str, Any]:
    """{"steps": first and last step of each column, and per name {"edges": [B + 1], "counts": a list of B for each
    column}}; names as in `overview.histograms`. {"steps": []} before anything was trained."""
    total = db.execute("SELECT COUNT(*) FROM trajectories WHERE status = 'consumed'").fetchone()[0]
    every = total // MAX_ROWS * 2 + 1  # odd, so that it meets all members of groups, which are mostly even
    rows = db.execute(  # the inner question is answered by an index; each row that it leaves out is a page not read
        "SELECT row, step, min_version >= 0, COALESCE(staleness(step, min_version), 0), num_tokens, "
        "learner_logprobs IS NOT NULL FROM trajectories WHERE row IN "
        "(SELECT row FROM trajectories WHERE status = 'consumed' AND row % ? = 0) AND step IS NOT NULL",
        (every,),
    ).fetchall()
    if not rows:
        return {"steps": []}
    number, step, sampled, stale, tokens, has_ratio = np.array([tuple(row) for row in rows], dtype=np.int64).T
    first, last = int(step.min()), int(step.max())
    columns = min(MAX_COLUMNS, last - first + 1)
    column = (step - first) * columns // (last - first + 1)
    starts = [first + -(-k * (last - first + 1) // columns) for k in range(columns + 1)]
    return {
        "steps": [[start, end - 1] for start, end in pairwise(starts)],
        "staleness": _map(stale[sampled == 1], column[sampled == 1], columns),
        "length": _map(tokens, column, columns),
        "ratio": _ratio_map(db, number[has_ratio == 1], column[has_ratio == 1], columns),
    }


def _map(values: np.ndarray, column: np.ndarray, columns: int) -> dict[str, Any]:
    """Bins one wide where they are few."""
    if not len(values):
        return {}
    low, high = int(values.min()), int(values.max())
    if high - low < MAX_WHOLE_BINS:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.linspace(low - 0.5, high + 0.5, NUM_BINS + 1)
    return _counted(values, column, columns, edges)


def _ratio_map(db: sqlite3.Connection, number: np.ndarray, column: np.ndarray, columns: int) -> dict[str, Any]:
    """Of a few trajectories of each column, evenly among its own: reading all tokens of a run takes too long."""
    values, places = [], []
    for k in range(columns):
        mine = number[column == k]
        for row in mine[:: max(1, -(-len(mine) // RATIO_ROWS))].tolist():
            values.append(ratios_of(db, row))
            places.append(np.full(len(values[-1]), k))
    if not values or not sum(map(len, values)):
        return {}
    inside = np.clip(np.concatenate(values), RATIO_EDGES[0], RATIO_EDGES[-1])
    return _counted(inside, np.concatenate(places), columns, RATIO_EDGES)


def _counted(values: np.ndarray, column: np.ndarray, columns: int, edges: np.ndarray) -> dict[str, Any]:
    counts, _, _ = np.histogram2d(column, values, bins=[np.arange(columns + 1) - 0.5, edges])
    return {"edges": edges.tolist(), "counts": counts.astype(int).tolist()}
