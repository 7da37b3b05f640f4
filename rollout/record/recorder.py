"""trajectories.db: every token row of a run and what became of it, written beside the loop and read by everything else.

`Recorder` is the one writer. Its methods hand work to one thread through a bounded queue and return at once; what went
wrong on the disk is raised by the next call. `TrajectoryReader` reads while the run goes on, in any process.

What `flush` returned for survives a kill; a power cut may take the last transactions (synchronous=NORMAL). The ledger
can therefore know of groups that are not here: a resumed run queues them again. Flush before a checkpoint, so that
this cannot happen to what was trained on. The ledger decides what became of a group, this file holds its content.
"""

import difflib
import hashlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from rollout.record import trajectory_table as table
from rollout.record.codec import FindImage, to_json
from rollout.record.trajectory import Trajectory, TrajectoryGroup

Split = Literal["train", "eval"]

OPEN_TIMEOUT_S = 30.0
MAX_BATCH = 64
"""Most queued items of one transaction: bounds how long readers wait and what a failed transaction takes with it."""


class RecorderError(RuntimeError):
    """Raised when trajectories cannot be written; the message names the file and the cause."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRow:
    """What a learner step did with one trajectory."""

    trajectory_id: str
    advantage: float | None = None
    """None where the trajectory had none (failed, or a group without signal)."""
    learner_logprobs: np.ndarray | None = None
    """(L,) float32, recomputed before the update; None where not computed."""
    status: Literal["consumed", "dropped"] = "consumed"
    cause: str = ""
    """Why it was not trained on, e.g. "no_reward" or "degenerate"; "" if it was."""


Job = Callable[[sqlite3.Connection], None]


class Recorder:
    """Writes trajectories and their fate.

    Example: recorder.write([group]); later
    recorder.mark_consumed(7, [TrainedRow(trajectory_id="train/calculator/0/3", advantage=0.5)]).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        max_queued: int = 256,
        put_timeout_s: float = 30.0,
        connect: Callable[[Path], sqlite3.Connection] = table.open_for_writing,
    ) -> None:
        """`max_queued`: calls that may wait for the disk. One more blocks for `put_timeout_s`, then raises."""
        self._path = Path(path)
        self._connect = connect
        self._put_timeout_s = put_timeout_s
        self._jobs: queue.Queue[Job | threading.Event | None] = queue.Queue(max_queued)
        self._error: Exception | None = None
        self._closed = False
        opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="recorder", daemon=True)
        self._thread.start()
        if not opened.wait(OPEN_TIMEOUT_S):
            raise RecorderError(f"cannot open {self._path} within {OPEN_TIMEOUT_S:g} s")
        self._raise_error()

    def write(self, groups: Sequence[TrajectoryGroup], *, split: Split = "train", eval_step: int | None = None) -> None:
        """Add the trajectories of groups; rows of earlier attempts that still stand become dropped ("superseded").

        Groups of split "train" start as "committed", those of an evaluation (at learner step `eval_step`) as "eval".
        """
        self._put(lambda db: table.insert_groups(db, groups, split, eval_step))

    def mark_consumed(self, step: int, rows: Sequence[TrainedRow]) -> None:
        """Note what learner step `step` did with each trajectory of its groups."""
        values = [(r.status, r.cause, step, r.advantage, r.learner_logprobs, r.trajectory_id) for r in rows]
        self._put(lambda db: table.mark_trained(db, values))

    def mark_dropped(self, group_ids: Sequence[str], cause: str) -> None:
        """Note that groups that were written will not be trained on."""
        self._put(lambda db: table.mark_groups_dropped(db, group_ids, cause))

    def rewind(self, step: int) -> None:
        """Go back to the checkpoint of `step`: rows of later steps are committed again, later evaluations go."""
        self._put(lambda db: table.rewind(db, step))

    def flush(self, deadline_s: float) -> None:
        """Return when all calls so far are on disk. RecorderError past the deadline or where writing failed."""
        done = threading.Event()
        until = time.monotonic() + deadline_s
        self._put(done, timeout_s=deadline_s)
        if not done.wait(max(0.0, until - time.monotonic())):
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to write")
        self._raise_error()

    def close(self, deadline_s: float = 30.0) -> None:
        """Write what is queued and end the thread. Safe to call twice; raises what went wrong, once."""
        if self._closed:
            return
        self._closed = True
        try:
            self._jobs.put(None, timeout=deadline_s)
        except queue.Full:
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to write") from None
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise RecorderError(f"{self._path} took longer than {deadline_s:g} s to close")
        self._raise_error()

    def _put(self, item: Job | threading.Event, timeout_s: float | None = None) -> None:
        self._raise_error()
        if self._closed:
            raise RecorderError(f"the recorder of {self._path} is closed")
        timeout_s = self._put_timeout_s if timeout_s is None else timeout_s
        try:
            self._jobs.put(item, timeout=timeout_s)
        except queue.Full:
            raise RecorderError(
                f"{self._path}: the disk is slower than the run, {self._jobs.maxsize} writes wait for {timeout_s:g} s"
            ) from None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise RecorderError(_explain(self._path, self._error)) from self._error

    def _run(self, opened: threading.Event) -> None:
        """The thread. After an error it goes on emptying the queue, so that nobody waits for it in vain."""
        try:
            db = self._connect(self._path)
        except Exception as error:  # crosses to the constructor's thread, which raises it
            self._error = error
            return
        finally:
            opened.set()
        ended = False
        while not ended:
            items = [self._jobs.get()]
            while len(items) < MAX_BATCH and not self._jobs.empty():
                items.append(self._jobs.get())
            if self._error is None:
                try:
                    with db:
                        for item in items:
                            if item is not None and not isinstance(item, threading.Event):
                                item(db)
                except Exception as error:  # crosses to the caller's thread, which raises it
                    self._error = error
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()
            ended = None in items
        db.close()


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
    """Reads the file in any process, also while it is written.

    Example: reader.list({"status": "consumed", "step": 7}, limit=20)[0]["reward"];
    reader.get(12).trajectory.
    """

    def __init__(self, path: Path | str) -> None:
        """FileNotFoundError if there is no such file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no trajectories at {path}")
        self._db = table.open_for_reading(Path(path))

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: int | str) -> StoredTrajectory:
        """One trajectory by row number, or by id (its newest row). KeyError if there is none."""
        column = "row" if isinstance(key, int) else "id"
        sql = f"SELECT * FROM trajectories WHERE {column} = ? ORDER BY row DESC LIMIT 1"
        row = self._db.execute(sql, (key,)).fetchone()
        if row is None:
            raise KeyError(f"no trajectory {key!r}; there are {self._total()}")
        return _stored(row, table.image_finder(self._db))

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
        find_image = table.image_finder(self._db)
        return [_group(list(members), find_image) for _, members in groupby(rows, key=_group_key)]

    def list(self, filters: Mapping[str, Any] | None = None, *, limit: int = 100, offset: int = 0) -> list[dict]:
        """Columns of `SUMMARY_COLUMNS` of the rows where every filter column has the value given (None: is unset)."""
        where, values = _where(filters or {})
        sql = f"SELECT {', '.join(table.SUMMARY_COLUMNS)} FROM trajectories{where} ORDER BY row LIMIT ? OFFSET ?"
        return [_summary(row) for row in self._db.execute(sql, (*values, limit, offset))]

    def each(self, filters: Mapping[str, Any] | None = None) -> Iterator[StoredTrajectory]:
        """Whole trajectories under the same filters as `list`, one in memory at a time, in the order of writing."""
        where, values = _where(filters or {})
        rows = [row for (row,) in self._db.execute(f"SELECT row FROM trajectories{where} ORDER BY row", values)]
        return (self.get(row) for row in rows)

    def counts(self, filters: Mapping[str, Any] | None = None) -> dict[str, int]:
        """Rows by status, under the same filters as `list`."""
        where, values = _where(filters or {})
        rows = self._db.execute(f"SELECT status, COUNT(*) FROM trajectories{where} GROUP BY status", values)
        return dict(rows.fetchall())

    def _total(self) -> int:
        return self._db.execute("SELECT COUNT(*) FROM trajectories").fetchone()[0]


def group_digest(group: TrajectoryGroup) -> str:
    """sha256 over what is learned from: tokens, masks, logprobs, versions, routes and rewards of all members."""
    digest = hashlib.sha256()
    for t in group.trajectories:
        header = [t.trajectory_id, len(t.token_ids), t.reward, t.stop_reason.value, t.temperature]
        digest.update(to_json(header).encode())
        for array in (t.token_ids, t.loss_mask, t.rollout_logprobs, t.policy_versions, t.routed_experts):
            digest.update(b"" if array is None else array.tobytes())
    return digest.hexdigest()


def _explain(path: Path, error: Exception) -> str:
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return f"no space for the run folder: cannot write {path}"
    return f"cannot write {path}: {type(error).__name__}: {error}"


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


def _group(rows: list[sqlite3.Row], find_image: FindImage) -> TrajectoryGroup:
    trajectories = tuple(table.read_trajectory(row, find_image) for row in rows)
    first = trajectories[0]
    return TrajectoryGroup(
        group_id=first.group_id, task=first.task, attempt=rows[0]["group_attempt"], trajectories=trajectories
    )


def _stored(row: sqlite3.Row, find_image: FindImage) -> StoredTrajectory:
    return StoredTrajectory(
        row=row["row"],
        trajectory=table.read_trajectory(row, find_image),
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
