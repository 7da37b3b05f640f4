"""Exactly-once accounting of groups: each is trained on once or dropped with a reason, whatever crashes in between.

    queued --lease--> leased(attempt, worker, deadline) --commit--> committed(digest) --consume--> consumed(step)
       ^                 |                                             |
       +----release------+------------------requeue--------------------+      any but consumed --drop--> dropped(reason)

Invariant, asserted after every change and recomputed from the table by `audit`:
issued = queued + leased + committed + consumed + dropped.

Each change leaves an event in the same transaction: when, of which attempt, why (rollout/record/lineage.py).

One process writes (a lock file keeps a second one out), in SQLite WAL with synchronous=FULL: what a method returned for
has reached the disk. Every method is one transaction, so one fsync; `batch` makes one of many.
"""

import fcntl
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from envs.task import Task
from rollout.record import lineage
from rollout.record.codec import task_from_json, task_to_json


class GroupState(StrEnum):
    """Where a group stands."""

    QUEUED = "queued"
    LEASED = "leased"
    COMMITTED = "committed"
    CONSUMED = "consumed"
    DROPPED = "dropped"


class LedgerError(RuntimeError):
    """Raised for a change that the state of a group does not allow, an unknown group, and a ledger in use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewind:
    """What `Ledger.rewind` moved."""

    recommitted: int
    """Groups consumed after the checkpoint, committed again."""
    requeued: int
    """Leases of the process that died."""


_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
  ordinal INTEGER PRIMARY KEY,
  group_id TEXT NOT NULL UNIQUE,
  task TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('queued', 'leased', 'committed', 'consumed', 'dropped')),
  attempt INTEGER NOT NULL DEFAULT 0,
  redispatched INTEGER NOT NULL DEFAULT 0,
  refused_commits INTEGER NOT NULL DEFAULT 0,
  worker TEXT,
  deadline REAL,
  digest TEXT,
  step INTEGER,
  reason TEXT,
  last_cause TEXT,
  CHECK ((state = 'consumed') = (step IS NOT NULL)),
  CHECK ((state = 'dropped') = (reason IS NOT NULL))
);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state, ordinal);
CREATE TABLE IF NOT EXISTS issued (total INTEGER NOT NULL);
INSERT INTO issued SELECT 0 WHERE NOT EXISTS (SELECT * FROM issued);
"""


class Ledger:
    """The states of all groups of a run, on disk.

    Example: ledger.issue([task]); ledger.lease("train/calculator/0", "worker-0", 120.0) -> 1;
    ledger.commit("train/calculator/0", 1, digest) -> True, and False for the same commit again;
    ledger.consume(["train/calculator/0"], step=4).
    """

    def __init__(
        self,
        path: Path | str,
        *,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        """`clock`: of deadlines. `unix_clock`: of events, which processes of a resumed run add to."""
        self._path = Path(path)
        self._clock = clock
        self._unix_clock = unix_clock
        self._lock_file = _lock(self._path)
        try:
            self._db = sqlite3.connect(self._path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA + lineage.SCHEMA)
            self._read_counts()
        except sqlite3.Error as error:
            self._lock_file.close()
            raise LedgerError(f"cannot open the ledger {self._path}: {error}") from error

    def close(self) -> None:
        self._db.close()
        self._lock_file.close()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make all changes inside one transaction: all of them or, if the block raises, none. Nests."""
        self._execute("SAVEPOINT change")  # the outermost one is a transaction
        try:
            yield
            assert self._issued == sum(self._counts.values()), f"{self._issued} issued, but {dict(self._counts)}"
            self._execute("RELEASE change")
        except BaseException:  # interrupted too: undone as a whole, then raised
            if self._db.in_transaction:  # SQLite has rolled back itself where the disk is full
                self._db.execute("ROLLBACK TO change")
                self._db.execute("RELEASE change")
            self._read_counts()
            raise

    def issue(self, tasks: Sequence[Task]) -> None:
        """Queue one group per task; its id is the task's."""
        with self.batch():
            for task in tasks:
                if self._find(task.task_id):
                    raise LedgerError(f"group {task.task_id!r} was issued before")
                row = (task.task_id, task_to_json(task), GroupState.QUEUED)
                self._execute("INSERT INTO groups (group_id, task, state) VALUES (?, ?, ?)", row)
                self._note(task.task_id, "issued")
            self._execute("UPDATE issued SET total = total + ?", (len(tasks),))
            self._issued += len(tasks)
            self._counts[GroupState.QUEUED] += len(tasks)

    def lease(self, group_id: str, worker: str, deadline_s: float) -> int:
        """Give a queued group to a worker for `deadline_s` seconds; returns the attempt, from 1."""
        with self.batch():
            attempt = self.attempts(group_id) + 1
            deadline = self._clock() + deadline_s
            self._move(
                group_id,
                (GroupState.QUEUED,),
                GroupState.LEASED,
                "attempt = ?, worker = ?, deadline = ?",
                (attempt, worker, deadline),
            )
            self._note(group_id, "leased")
            return attempt

    def expired(self) -> list[tuple[str, int]]:
        """(group_id, attempt) of leases past their deadline."""
        sql = "SELECT group_id, attempt FROM groups WHERE state = 'leased' AND deadline < ? ORDER BY ordinal"
        return self._execute(sql, (self._clock(),)).fetchall()

    def release(self, group_id: str, attempt: int, cause: str) -> bool:
        """Queue a leased group again; False if that attempt no longer holds it."""
        with self.batch():
            if not self._holds(group_id, attempt):
                return False
            self._move(
                group_id,
                (GroupState.LEASED,),
                GroupState.QUEUED,
                "redispatched = redispatched + 1, last_cause = ?",
                (cause,),
            )
            self._note(group_id, "released", cause=cause)
            return True

    def commit(self, group_id: str, attempt: int, digest: str) -> bool:
        """Accept the group's trajectories; False, and counted, unless that attempt holds the lease."""
        with self.batch():
            if not self._holds(group_id, attempt):
                self._execute("UPDATE groups SET refused_commits = refused_commits + 1 WHERE group_id = ?", (group_id,))
                self._note(group_id, "refused", attempt=attempt)
                return False
            self._move(group_id, (GroupState.LEASED,), GroupState.COMMITTED, "digest = ?", (digest,))
            self._note(group_id, "committed")
            return True

    def requeue(self, group_id: str, cause: str) -> None:
        """Queue a committed group again: a resumed run found its trajectories lost."""
        update = "redispatched = redispatched + 1, last_cause = ?, digest = NULL"
        with self.batch():
            self._move(group_id, (GroupState.COMMITTED,), GroupState.QUEUED, update, (cause,))
            self._note(group_id, "requeued", cause=cause)

    def consume(self, group_ids: Sequence[str], step: int) -> None:
        """Train on committed groups at a learner step: all or, if one is not committed, none."""
        with self.batch():
            for group_id in group_ids:
                self._move(group_id, (GroupState.COMMITTED,), GroupState.CONSUMED, "step = ?", (step,))
                self._note(group_id, "consumed")

    def drop(self, group_id: str, reason: str) -> None:
        """End a group that will never be trained on."""
        alive = (GroupState.QUEUED, GroupState.LEASED, GroupState.COMMITTED)
        with self.batch():
            self._move(group_id, alive, GroupState.DROPPED, "reason = ?", (reason,))
            self._note(group_id, "dropped", cause=reason)

    def rewind(self, step: int) -> Rewind:
        """Go back to the checkpoint of `step`: what was consumed later is committed again, leases are queued again.

        Groups committed or dropped since stay so: their work is done, and the learner's older state does not undo it.
        """
        with self.batch():
            with self._explaining():
                lineage.note_rewind(self._db, step, self._unix_clock())
            recommitted = self._execute(
                "UPDATE groups SET state = 'committed', step = NULL WHERE state = 'consumed' AND step > ?", (step,)
            ).rowcount
            requeued = self._execute(
                "UPDATE groups SET state = 'queued', redispatched = redispatched + 1, last_cause = 'resume' "
                "WHERE state = 'leased'"
            ).rowcount
            self._counts[GroupState.CONSUMED] -= recommitted
            self._counts[GroupState.COMMITTED] += recommitted
            self._counts[GroupState.LEASED] -= requeued
            self._counts[GroupState.QUEUED] += requeued
        return Rewind(recommitted=recommitted, requeued=requeued)

    def tasks_in(self, state: GroupState | str) -> list[Task]:
        """Tasks of the groups in a state, in the order they were issued."""
        rows = self._execute("SELECT task FROM groups WHERE state = ? ORDER BY ordinal", (GroupState(state),))
        return [task_from_json(text) for (text,) in rows]

    def last_issued(self) -> Task | None:
        """The newest task; a resumed run goes on after it. None in a new ledger."""
        row = self._execute("SELECT task FROM groups ORDER BY ordinal DESC LIMIT 1").fetchone()
        return None if row is None else task_from_json(row[0])

    def attempts(self, group_id: str) -> int:
        """Leases the group has had."""
        return self._row(group_id)[1]

    def digest(self, group_id: str) -> str | None:
        """As given to `commit`; None before."""
        self._row(group_id)
        return self._execute("SELECT digest FROM groups WHERE group_id = ?", (group_id,)).fetchone()[0]

    def audit(self) -> dict[str, Any]:
        """Recount the table: {issued, queued, leased, committed, consumed, dropped {reason: n}, balanced,
        redispatched, refused_commits}; balanced also demands that the running counts agree."""
        report = _audit(self._db)
        report["balanced"] = report["balanced"] and self._counts == _recount(self._db)
        return report

    def _move(
        self, group_id: str, sources: tuple[GroupState, ...], target: GroupState, update: str, values: tuple[Any, ...]
    ) -> None:
        """Change one group's state and the fields named in `update`; LedgerError unless it is in one of `sources`."""
        state, _ = self._row(group_id)
        if state not in sources:
            raise LedgerError(f"group {group_id!r} is {state}, so it cannot become {target}")
        sql = f"UPDATE groups SET state = ?, {update} WHERE group_id = ? AND state = ?"
        changed = self._execute(sql, (target, *values, group_id, state)).rowcount
        assert changed == 1, f"{changed} rows changed for {group_id!r}"
        self._counts[state] -= 1
        self._counts[target] += 1

    def _holds(self, group_id: str, attempt: int) -> bool:
        return self._row(group_id) == (GroupState.LEASED, attempt)

    def _row(self, group_id: str) -> tuple[GroupState, int]:
        row = self._find(group_id)
        if row is None:
            raise LedgerError(f"group {group_id!r} was never issued")
        return row

    def _find(self, group_id: str) -> tuple[GroupState, int] | None:
        row = self._execute("SELECT state, attempt FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        return None if row is None else (GroupState(row[0]), row[1])

    def _read_counts(self) -> None:
        self._issued: int = self._db.execute("SELECT total FROM issued").fetchone()[0]
        self._counts = _recount(self._db)

    def _note(self, group_id: str, event: str, *, attempt: int | None = None, cause: str | None = None) -> None:
        with self._explaining():
            lineage.note(self._db, group_id, event, self._unix_clock(), attempt=attempt, cause=cause)

    def _execute(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        with self._explaining():
            return self._db.execute(sql, values)

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"cannot use the ledger {self._path}: {error}") from error


def read_audit(path: Path | str) -> dict[str, Any]:
    """`Ledger.audit` of a ledger that another process may be writing."""
    if not Path(path).is_file():
        raise LedgerError(f"no ledger at {path}")
    try:
        with closing(sqlite3.connect(f"{Path(path).resolve().as_uri()}?mode=ro", uri=True)) as db:
            return _audit(db)
    except sqlite3.Error as error:
        raise LedgerError(f"cannot read the ledger {path}: {error}") from error


def _recount(db: sqlite3.Connection) -> Counter[GroupState]:
    rows = db.execute("SELECT state, COUNT(*) FROM groups GROUP BY state")
    return Counter({GroupState(state): count for state, count in rows})


def _audit(db: sqlite3.Connection) -> dict[str, Any]:
    # One statement reads one snapshot, also while the writer goes on.
    rows = db.execute(
        "SELECT (SELECT total FROM issued), state, reason, COUNT(*), SUM(redispatched), SUM(refused_commits) "
        "FROM groups GROUP BY state, reason"
    ).fetchall()
    issued = rows[0][0] if rows else db.execute("SELECT total FROM issued").fetchone()[0]
    counts = Counter[str]()
    for _, state, _, count, _, _ in rows:
        counts[state] += count
    return {
        "issued": issued,
        **{state.value: counts[state] for state in GroupState if state is not GroupState.DROPPED},
        "dropped": {reason: count for _, state, reason, count, _, _ in rows if state == GroupState.DROPPED},
        "balanced": issued == counts.total(),
        "redispatched": sum(row[4] for row in rows),
        "refused_commits": sum(row[5] for row in rows),
    }


def _lock(path: Path) -> IO[str]:
    """Hold `<path>.lock` until closed; the kernel lets go of it when the process dies."""
    try:
        handle = open(f"{path}.lock", "a")  # noqa: SIM115 (open for the ledger's life)
    except OSError as error:
        raise LedgerError(f"cannot open the ledger {path}: {error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise LedgerError(f"the ledger {path} is written by another process") from error
    return handle
