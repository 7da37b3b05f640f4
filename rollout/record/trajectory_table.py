"""The tables of trajectories.db. One row per trajectory: columns to filter by, JSON for structure, blobs for arrays.
And one row per distinct image.

All SQL of the file is here; every writing function runs inside the caller's transaction.
"""

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from rollout.record.codec import (
    FindImage,
    Images,
    error_from_json,
    error_to_json,
    messages_from_json,
    messages_to_json,
    task_from_json,
    task_to_json,
    to_json,
    turns_from_json,
    turns_to_json,
)
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup

SCHEMA_VERSION = 3
READABLE_VERSIONS = (0, 1, 2, SCHEMA_VERSION)
"""0: a new file. 1: no table of images; its rows hold their images as text. Up to 2: no column `engine`. Writing to an
older one makes it a file of today."""

SUMMARY_COLUMNS = (
    *("row", "id", "group_id", "env_name", "env_id", "level", "seed", "member", "attempt", "group_attempt"),
    *("split", "eval_step", "reward", "reward_parts", "stop_reason", "error"),
    *("num_turns", "num_tokens", "num_sampled_tokens", "min_version", "max_version", "seconds", "env_seconds"),
    *("worker", "engine", "status", "cause", "step", "advantage", "problem_digest", "meta"),
)
"""What a list shows and filters by."""
JSON_COLUMNS = ("reward_parts", "error", "meta")
"""Of them, those that hold JSON text."""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS trajectories (
  row INTEGER PRIMARY KEY,
  id TEXT NOT NULL,
  group_id TEXT NOT NULL,
  env_name TEXT NOT NULL,
  env_id TEXT NOT NULL,
  level INTEGER NOT NULL,
  seed TEXT NOT NULL,           -- text: SQLite integers end at 63 bits
  member INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  group_attempt INTEGER NOT NULL,
  split TEXT NOT NULL CHECK (split IN ('train', 'eval')),
  eval_step INTEGER,            -- learner step of the evaluation; NULL for training
  reward REAL,                  -- NULL: the episode failed, or its reward was not finite
  reward_parts TEXT NOT NULL,
  stop_reason TEXT NOT NULL,
  error TEXT,
  num_turns INTEGER NOT NULL,
  num_tokens INTEGER NOT NULL,
  num_sampled_tokens INTEGER NOT NULL,
  min_version INTEGER NOT NULL, -- of the weights; -1: nothing sampled
  max_version INTEGER NOT NULL,
  seconds REAL,
  env_seconds REAL,
  worker TEXT NOT NULL,
  engine TEXT NOT NULL DEFAULT '',  -- kind of engine that sampled it; empty in files older than the column
  status TEXT NOT NULL CHECK (status IN ('committed', 'consumed', 'dropped', 'eval')),
  cause TEXT NOT NULL DEFAULT '',
  step INTEGER,                 -- learner step that trained on it or left it out
  advantage REAL,
  problem_digest TEXT NOT NULL,
  meta TEXT NOT NULL,
  task TEXT NOT NULL,
  prompt TEXT NOT NULL,
  turns TEXT NOT NULL,
  temperature REAL,
  token_ids BLOB NOT NULL,
  loss_mask BLOB NOT NULL,
  rollout_logprobs BLOB NOT NULL,
  policy_versions BLOB NOT NULL,
  learner_logprobs BLOB,
  routed_experts BLOB,
  routed_shape TEXT             -- [L, M, k] of routed_experts
);
CREATE TABLE IF NOT EXISTS images (
  sha256 TEXT PRIMARY KEY,      -- of data; what JSON of prompts and turns names. Kept when its trajectories go
  data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS trajectories_by_id ON trajectories (id);
CREATE INDEX IF NOT EXISTS trajectories_by_group ON trajectories (group_id);
CREATE INDEX IF NOT EXISTS trajectories_by_status ON trajectories (status, row);
PRAGMA user_version = {SCHEMA_VERSION};
"""


def open_for_writing(path: Path) -> sqlite3.Connection:
    """A connection to an existing or new file. Transactions are the caller's (`with connection`)."""
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=NORMAL")
    if 0 < check_version(db, path) < 3:
        db.execute("ALTER TABLE trajectories ADD COLUMN engine TEXT NOT NULL DEFAULT ''")
    db.executescript(_SCHEMA)
    return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """A read-only connection that any thread may use, one at a time."""
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
    db.row_factory = sqlite3.Row
    check_version(db, path)
    add_missing_columns(db)
    return db


def add_missing_columns(db: sqlite3.Connection) -> None:
    """For this connection alone an older file looks like one of today."""
    columns = {column[1] for column in db.execute("PRAGMA table_info(trajectories)")}
    if columns and "engine" not in columns:
        db.execute("CREATE TEMP VIEW trajectories AS SELECT *, '' AS engine FROM main.trajectories")


def check_version(db: sqlite3.Connection, path: Path) -> int:
    """The file's layout. ValueError if another version of Shoal made the file."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in READABLE_VERSIONS:
        raise ValueError(f"{path} has layout {version}, this version of Shoal reads layouts up to {SCHEMA_VERSION}")
    return version


def insert_groups(db: sqlite3.Connection, groups: Iterable[TrajectoryGroup], split: str, eval_step: int | None) -> None:
    for group in groups:
        if split == "train":
            mark_groups_dropped(db, [group.group_id], "superseded")
        for trajectory in group.trajectories:
            if split == "eval":
                db.execute(
                    "DELETE FROM trajectories WHERE id = ? AND split = 'eval' AND eval_step IS ?",
                    (trajectory.trajectory_id, eval_step),
                )
            images: Images = {}
            values = _values(trajectory, images) | {
                "group_attempt": group.attempt,
                "split": split,
                "eval_step": eval_step,
                "status": "committed" if split == "train" else "eval",
            }
            names = ", ".join(values)
            places = ", ".join(f":{name}" for name in values)
            db.execute(f"INSERT INTO trajectories ({names}) VALUES ({places})", values)
            db.executemany("INSERT OR IGNORE INTO images (sha256, data) VALUES (?, ?)", images.items())


def mark_trained(db: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """Rows of (status, cause, step, advantage, learner_logprobs, trajectory id)."""
    sql = (
        "UPDATE trajectories SET status = ?, cause = ?, step = ?, advantage = ?, learner_logprobs = ? "
        "WHERE id = ? AND status = 'committed'"
    )
    for status, cause, step, advantage, logprobs, trajectory_id in rows:
        blob = None if logprobs is None else _blob(logprobs, "<f4")
        changed = db.execute(sql, (status, cause, step, _finite(advantage), blob, trajectory_id)).rowcount
        if changed != 1:
            raise LookupError(f"{changed} committed rows of trajectory {trajectory_id!r}, expected 1")


def mark_groups_dropped(db: sqlite3.Connection, group_ids: Sequence[str], cause: str) -> None:
    sql = "UPDATE trajectories SET status = 'dropped', cause = ? WHERE group_id = ? AND status = 'committed'"
    db.executemany(sql, [(cause, group_id) for group_id in group_ids])


def rewind(db: sqlite3.Connection, step: int) -> None:
    """Undo the marks and evaluations of learner steps after `step`."""
    db.execute(
        "UPDATE trajectories SET status = 'committed', cause = '', step = NULL, advantage = NULL, "
        "learner_logprobs = NULL WHERE step > ?",
        (step,),
    )
    db.execute("DELETE FROM trajectories WHERE eval_step > ?", (step,))


def image_finder(db: sqlite3.Connection) -> FindImage:
    """Images of the file by sha256; each is read once, and shared by all trajectories that are read with it."""

    @cache
    def find(sha256: str) -> bytes:
        row = db.execute("SELECT data FROM images WHERE sha256 = ?", (sha256,)).fetchone()
        if row is None:
            raise LookupError(f"the file of trajectories lacks image {sha256}")
        return row[0]

    return find


def read_trajectory(row: sqlite3.Row, find_image: FindImage) -> Trajectory:
    """The trajectory of a full row, equal in every field to what was written."""
    return Trajectory(
        trajectory_id=row["id"],
        group_id=row["group_id"],
        task=task_from_json(row["task"]),
        member=row["member"],
        token_ids=_array(row["token_ids"], "<i4"),
        loss_mask=_array(row["loss_mask"], "u1"),
        rollout_logprobs=_array(row["rollout_logprobs"], "<f4"),
        policy_versions=_array(row["policy_versions"], "<i4"),
        turns=turns_from_json(row["turns"], find_image),
        prompt=messages_from_json(row["prompt"], find_image),
        reward=row["reward"],
        reward_parts={k: math.nan if v is None else v for k, v in json.loads(row["reward_parts"]).items()},
        stop_reason=StopReason(row["stop_reason"]),
        error=error_from_json(row["error"]),
        temperature=_or_nan(row["temperature"]),
        routed_experts=_routes(row),
        meta=json.loads(row["meta"]),
        problem_digest=row["problem_digest"],
        attempt=row["attempt"],
        worker=row["worker"],
        engine=row["engine"],
        seconds=_or_nan(row["seconds"]),
        env_seconds=_or_nan(row["env_seconds"]),
    )


def read_learner_logprobs(row: sqlite3.Row) -> np.ndarray | None:
    return None if row["learner_logprobs"] is None else _array(row["learner_logprobs"], "<f4")


def _values(trajectory: Trajectory, images: Images) -> dict[str, Any]:
    """Columns that the trajectory itself gives; what they name of images is added to `images`."""
    task, routes = trajectory.task, trajectory.routed_experts
    return {
        "id": trajectory.trajectory_id,
        "group_id": trajectory.group_id,
        "env_name": task.env_name,
        "env_id": task.env_id,
        "level": task.level,
        "seed": str(task.seed),
        "member": trajectory.member,
        "attempt": trajectory.attempt,
        "reward": _finite(trajectory.reward),
        "reward_parts": to_json(trajectory.reward_parts),
        "stop_reason": trajectory.stop_reason.value,
        "error": error_to_json(trajectory.error),
        "num_turns": trajectory.num_turns,
        "num_tokens": len(trajectory.token_ids),
        "num_sampled_tokens": trajectory.num_sampled_tokens,
        "min_version": trajectory.min_policy_version,
        "max_version": trajectory.max_policy_version,
        "seconds": _finite(trajectory.seconds),
        "env_seconds": _finite(trajectory.env_seconds),
        "worker": trajectory.worker,
        "engine": trajectory.engine,
        "problem_digest": trajectory.problem_digest,
        "meta": to_json(trajectory.meta),
        "task": task_to_json(task),
        "prompt": messages_to_json(trajectory.prompt, images),
        "turns": turns_to_json(trajectory.turns, images),
        "temperature": _finite(trajectory.temperature),
        "token_ids": _blob(trajectory.token_ids, "<i4"),
        "loss_mask": _blob(trajectory.loss_mask, "u1"),
        "rollout_logprobs": _blob(trajectory.rollout_logprobs, "<f4"),
        "policy_versions": _blob(trajectory.policy_versions, "<i4"),
        "routed_experts": None if routes is None else _blob(routes, "<i2"),
        "routed_shape": None if routes is None else to_json(routes.shape),
    }


def _blob(array: np.ndarray, dtype: str) -> bytes:
    return np.asarray(array).astype(dtype).tobytes()


def _array(blob: bytes, dtype: str) -> np.ndarray:
    return np.frombuffer(blob, dtype=dtype).copy()  # a copy, for a view of the blob could not be written to


def _routes(row: sqlite3.Row) -> np.ndarray | None:
    if row["routed_experts"] is None:
        return None
    return _array(row["routed_experts"], "<i2").reshape(json.loads(row["routed_shape"]))


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
