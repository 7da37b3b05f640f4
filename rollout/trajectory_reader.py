"""Reads trajectories.db: lists for viewers, groups for resume and replay. Read-only, safe beside a running writer."""

import difflib
import json
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from rollout import trajectory_table as table
from rollout.trajectory import Trajectory, TrajectoryGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTrajectory:
    """A trajectory and what became of it."""

    row: int
    """Number in the file, from 1 in the order of writing."""
    trajectory: Trajectory
    split: str
    """"train" | "eval"."""
    eval_step: int | None
    """Learner step of the evaluation; None for training."""
    status: str
    """"committed" | "consumed" | "dropped" | "eval"."""
    cause: str
    """Why it was dropped; "" if it was not."""
    step: int | None
    """Learner step that trained on it or left it out."""
    advantage: float | None
    learner_logprobs: np.ndarray | None
    """(L,) float32; None before training and where not computed."""


class TrajectoryReader:
    """Example: reader.list({"status": "consumed", "step": 7}, limit=20)[0]["reward"]; reader.get(12).trajectory."""

    def __init__(self, path: Path | str) -> None:
        """FileNotFoundError if there is no such file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no trajectories at {path}")
        self._db = table.open_for_reading(Path(path))

    def close(self) -> None:
        self._db.close()

    def get(self, key: int | str) -> StoredTrajectory:
        """One trajectory by row number, or by id (its newest row). KeyError if there is none."""
        column = "row" if isinstance(key, int) else "id"
        sql = f"SELECT * FROM trajectories WHERE {column} = ? ORDER BY row DESC LIMIT 1"
        row = self._db.execute(sql, (key,)).fetchone()
        if row is None:
            raise KeyError(f"no trajectory {key!r}; there are {self._total()}")
        return _stored(row)

    def groups(self, status: str, group_ids: Collection[str] | None = None) -> list[TrajectoryGroup]:
        """Groups with a trajectory of that status, whole, in the order of writing; only `group_ids` where given.

        With "committed": what a resumed run still has to train on.
        """
        sql = (
            "SELECT t.* FROM trajectories t JOIN "
            "(SELECT DISTINCT group_id, group_attempt, eval_step FROM trajectories WHERE status = ?) g "
            "ON t.group_id = g.group_id AND t.group_attempt = g.group_attempt AND t.eval_step IS g.eval_step "
            "ORDER BY t.row"
        )
        rows = [row for row in self._db.execute(sql, (status,)) if group_ids is None or row["group_id"] in group_ids]
        return [_group(list(members)) for _, members in groupby(rows, key=_group_key)]

    def list(self, filters: Mapping[str, Any] | None = None, *, limit: int = 100, offset: int = 0) -> list[dict]:
        """Columns of `SUMMARY_COLUMNS` of the rows where every filter column has the value given (None: is unset)."""
        where, values = _where(filters or {})
        sql = f"SELECT {', '.join(table.SUMMARY_COLUMNS)} FROM trajectories{where} ORDER BY row LIMIT ? OFFSET ?"
        return [_summary(row) for row in self._db.execute(sql, (*values, limit, offset))]

    def counts(self, filters: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Rows by status, under the same filters as `list`."""
        where, values = _where(filters or {})
        rows = self._db.execute(f"SELECT status, COUNT(*) FROM trajectories{where} GROUP BY status", values)
        return dict(rows.fetchall())

    def _total(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM trajectories").fetchone()[0]


def _where(filters: Mapping[str, Any]) -> tuple[str, tuple[Any, ...]]:
    for name in filters:
        if name not in table.SUMMARY_COLUMNS:
            near = difflib.get_close_matches(name, table.SUMMARY_COLUMNS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; columns: {', '.join(table.SUMMARY_COLUMNS)}"
            raise ValueError(f"cannot filter trajectories by {name!r}{hint}")
    if not filters:
        return "", ()
    values = tuple(str(value) if name == "seed" else value for name, value in filters.items())
    return " WHERE " + " AND ".join(f"{name} IS ?" for name in filters), values


def _group_key(row: sqlite3.Row) -> tuple[str, int, int | None]:
    return row["group_id"], row["group_attempt"], row["eval_step"]


def _group(rows: list[sqlite3.Row]) -> TrajectoryGroup:
    trajectories = tuple(table.read_trajectory(row) for row in rows)
    first = trajectories[0]
    return TrajectoryGroup(
        group_id=first.group_id, task=first.task, attempt=rows[0]["group_attempt"], trajectories=trajectories
    )


def _stored(row: sqlite3.Row) -> StoredTrajectory:
    return StoredTrajectory(
        row=row["row"],
        trajectory=table.read_trajectory(row),
        split=row["split"],
        eval_step=row["eval_step"],
        status=row["status"],
        cause=row["cause"],
        step=row["step"],
        advantage=row["advantage"],
        learner_logprobs=table.read_learner_logprobs(row),
    )


def _summary(row: sqlite3.Row) -> dict[str, Any]:
    values = dict(row)
    for name in table.JSON_COLUMNS:
        values[name] = None if values[name] is None else json.loads(values[name])
    return values
