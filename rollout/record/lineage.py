"""The life of a group, event by event: what the ledger wrote beside each change of state, in the same transaction.

    issued -> leased -> released -> leased -> committed -> consumed
                                 (refused: a late answer)     -> recommitted (resumed from an older checkpoint)
                                                -> requeued                   any but consumed -> dropped

A file from before this table has none of it; what it goes on with is written from then on.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  number INTEGER PRIMARY KEY,
  ordinal INTEGER NOT NULL,
  event TEXT NOT NULL,
  unix_s REAL NOT NULL,
  attempt INTEGER,
  worker TEXT,
  step INTEGER,
  cause TEXT
);
CREATE INDEX IF NOT EXISTS events_by_group ON events (ordinal);
"""
STATE_AFTER = {
    "issued": "queued",
    "leased": "leased",
    "released": "queued",
    "requeued": "queued",
    "committed": "committed",
    "recommitted": "committed",
    "consumed": "consumed",
    "dropped": "dropped",
}
"""Event -> state of the group after it. "refused" is not among them: a late answer changes nothing."""
_COLUMNS = (
    "e.number, CAST(g.group_id AS TEXT), CAST(e.event AS TEXT), COALESCE(CAST(e.unix_s AS REAL), 0.0), "
    "CAST(e.attempt AS INTEGER), CAST(e.worker AS TEXT), CAST(e.step AS INTEGER), CAST(e.cause AS TEXT)"
)
"""Cast, for a file may be of foreign making and SQLite keeps any type in any column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LineageEvent:
    """One event of a group.

    Example: LineageEvent(number=7, group_id="train/calculator/3", event="leased", unix_s=1.8e9, attempt=2,
    worker="worker-1", step=None, cause=None).
    """

    number: int
    """In the order of writing, from 1 over all groups."""
    group_id: str
    event: str
    """A key of `STATE_AFTER`, or "refused"."""
    unix_s: float
    attempt: int | None
    """The lease that it is about; None for "issued"."""
    worker: str | None
    """Who got, lost or answered that lease."""
    step: int | None
    """Learner step of "consumed"; of "recommitted", the one that the run forgot."""
    cause: str | None
    """Why a lease or a group was lost or dropped."""


def note(
    db: sqlite3.Connection,
    group_id: str,
    event: str,
    unix_s: float,
    *,
    attempt: int | None = None,
    cause: str | None = None,
) -> None:
    """Write one event; attempt (unless given), worker and step are those that the group's row has now."""
    db.execute(
        "INSERT INTO events (ordinal, event, unix_s, attempt, worker, step, cause) "
        "SELECT ordinal, ?, ?, COALESCE(?, NULLIF(attempt, 0)), "
        "CASE WHEN ? IS NULL OR ? = attempt THEN worker END, step, ? FROM groups WHERE group_id = ?",
        (event, unix_s, attempt, attempt, attempt, cause, group_id),
    )


def note_rewind(db: sqlite3.Connection, step: int, unix_s: float) -> None:
    """Of all groups that `Ledger.rewind` is about to move; before it does."""
    db.execute(
        "INSERT INTO events (ordinal, event, unix_s, attempt, worker, step, cause) "
        "SELECT ordinal, CASE state WHEN 'consumed' THEN 'recommitted' ELSE 'released' END, ?, attempt, worker, step, "
        "'resume' FROM groups WHERE state = 'consumed' AND step > ? OR state = 'leased' ORDER BY ordinal",
        (unix_s, step),
    )


def group_events(db: sqlite3.Connection, group_id: str, limit: int = 1000) -> list[LineageEvent]:
    """Of one group, oldest first; none where the file is older than this table."""
    where = "WHERE e.ordinal = (SELECT ordinal FROM groups WHERE group_id = ?) ORDER BY e.number LIMIT ?"
    return _read(db, where, (group_id, limit))


def newest_events(db: sqlite3.Connection, *, before: int, limit: int) -> list[LineageEvent]:
    """Of all groups, newest first; those below number `before` (0: all)."""
    return _read(db, "WHERE e.number < ? ORDER BY e.number DESC LIMIT ?", (before or 2**62, limit))


def read_lineage(path: Path, group_id: str) -> list[LineageEvent]:
    """`group_events` of a ledger that another process may be writing. Raises sqlite3.Error."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        return group_events(db, group_id)


def story(events: Sequence[LineageEvent]) -> str:
    """In one line, with seconds since the group was issued.

    Example: "issued → leased to worker-0 (0.1 s) → released: worker_lost (4.2 s) → leased again to worker-1 (4.2 s)
    → committed (9.0 s) → consumed at step 3 (9.8 s)"
    """
    return " → ".join(_words(event, event.unix_s - events[0].unix_s) for event in events)


def _words(event: LineageEvent, since_s: float) -> str:
    words = event.event
    if event.event == "leased":
        words += (" again" if (event.attempt or 1) > 1 else "") + f" to {event.worker}"
    if event.event == "refused":
        words = f"late answer of attempt {event.attempt} refused"
    if event.event == "consumed":
        words += f" at step {event.step}"
    if event.cause:
        words += f": {event.cause}"
    return words if event.event == "issued" else f"{words} ({since_s:.1f} s)"


def _read(db: sqlite3.Connection, where: str, values: tuple[object, ...]) -> list[LineageEvent]:
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone() is None:
        return []
    sql = f"SELECT {_COLUMNS} FROM events e JOIN groups g USING (ordinal) {where}"
    names = ("number", "group_id", "event", "unix_s", "attempt", "worker", "step", "cause")
    return [LineageEvent(**dict(zip(names, row, strict=True))) for row in db.execute(sql, values)]
