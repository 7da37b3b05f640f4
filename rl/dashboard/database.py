"""trajectories.db and ledger.sqlite for the page: read-only connections, bounded answers, a deadline for every query.

Rows are read column by column, not through `TrajectoryReader`: an episode of 200 MB must cost neither memory nor time.
"""

import functools
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rl.dashboard.folders import NotThere, Refused
from rollout.record.lineage import LineageEvent, group_events, newest_events, story
from rollout.record.trajectory_table import JSON_COLUMNS, SUMMARY_COLUMNS, add_missing_columns
from rollout.schedule.staleness import staleness, version_before

QUERY_S = 1.5
"""A search that takes longer stops; the answer says how far it came."""
MAX_ROWS = 200
MAX_TEXT = 20_000
"""Characters shown of one text."""
MAX_EPISODE_BYTES = 16 * 2**20
"""Of the stored conversation; above it only the columns of the list are shown."""
MAX_IMAGE_BYTES = 16 * 2**20
RECENT = 5_000
"""Rows that facets and worker figures are taken from."""
FILTERS = {
    "env": "env_name = ?",
    "level": "level = CAST(? AS INTEGER)",
    "status": "status = ?",
    "split": "split = ?",
    "stop": "stop_reason = ?",
    "worker": "worker = ?",
    "group": "group_id = ?",
    "step": "step = CAST(? AS INTEGER)",
    "cause": "cause = ?",
    "min_reward": "reward >= CAST(? AS REAL)",
    "max_reward": "reward <= CAST(? AS REAL)",
    "min_staleness": "staleness(step, min_version) >= CAST(? AS INTEGER)",
}
"""What a list may be filtered by. The SQL function `staleness` is made by `reading`."""


@contextmanager
def reading(path: Path, *, deadline_s: float = QUERY_S, updates_per_step: int = 1) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write and is interrupted past the deadline. Raises `NotThere`, `Refused`.

    Its SQL knows staleness(step, min_version), for which `updates_per_step` is the run's setting of that name.
    """
    if not path.is_file():
        raise NotThere(f"the run has no {path.name} yet")
    uri = path.resolve().as_uri()
    unwritten = not path.with_name(path.name + "-wal").exists()
    db = None
    try:
        try:
            db = _open(f"{uri}?mode=ro")
        except sqlite3.OperationalError:
            if not unwritten:
                raise
            db = _open(f"{uri}?immutable=1")  # a folder on a read-only disk, where SQLite may not make its -shm
        until = time.monotonic() + deadline_s
        db.create_function("staleness", 2, functools.partial(_staleness, updates_per_step))
        db.set_progress_handler(lambda: time.monotonic() > until, 20_000)
        yield db
    except sqlite3.DatabaseError as error:
        raise Refused(f"cannot read {path.name}: {error}") from error
    finally:
        if db is not None:
            db.close()


def list_rows(db: sqlite3.Connection, filters: Mapping[str, str], *, before: int, limit: int) -> dict[str, Any]:
    """Rows below row number `before` (0: from the newest) that pass the filters, newest first.

    `next` goes on where the answer ends (None: there is no more); `cut` says that the deadline ended the search.
    """
    conditions = ["row < ?"]
    values: list[Any] = [before or 2**62]
    for name, value in filters.items():
        if name == "text":
            needle = json.dumps(value)[1:-1]  # texts are stored as ASCII JSON
            db.create_function("is_shown", 1, lambda row: _episode_bytes(db, row) <= MAX_EPISODE_BYTES)
            conditions.append("(instr(id, ?) OR is_shown(row) AND (instr(prompt, ?) OR instr(turns, ?)))")
            values += [value, needle, needle]
        elif name in FILTERS:
            conditions.append(FILTERS[name])
            values.append(value)
        else:
            raise Refused(f"cannot filter by {name[:50]!r}; filters: text, {', '.join(FILTERS)}")
    limit = min(max(limit, 1), MAX_ROWS)
    sql = f"SELECT {_columns()} FROM trajectories WHERE {' AND '.join(conditions)} ORDER BY row DESC LIMIT {limit + 1}"
    rows: list[dict[str, Any]] = []
    cut = False
    try:
        rows.extend(_summary(row) for row in db.execute(sql, values))
    except sqlite3.OperationalError as error:
        if "interrupt" not in str(error):
            raise
        cut = True
    more = len(rows) > limit
    rows = rows[:limit]
    return {"rows": rows, "next": rows[-1]["row"] if more else None, "cut": cut}


def facets(db: sqlite3.Connection) -> dict[str, list[Any]]:
    """Values to filter by, of the newest rows."""
    names = {"env": "env_name", "level": "level", "status": "status", "stop": "stop_reason", "cause": "cause"}
    newest = db.execute(f"SELECT {', '.join(names.values())} FROM trajectories ORDER BY row DESC LIMIT {RECENT}")
    columns = list(zip(*newest, strict=True)) or [()] * len(names)
    return {name: sorted(set(values))[:100] for name, values in zip(names, columns, strict=True)}


def counts(db: sqlite3.Connection) -> dict[str, int]:
    """Rows by status."""
    return dict(db.execute("SELECT status, COUNT(*) FROM trajectories GROUP BY status").fetchall())


def read_row(db: sqlite3.Connection, row: int) -> dict[str, Any]:
    """One episode: the list's columns, the conversation, its group. `too_large`: bytes of one that is not shown."""
    found = db.execute(f"SELECT {_columns()} FROM trajectories WHERE row = ?", (row,)).fetchone()
    if found is None:
        raise NotThere(f"no trajectory {row}")
    episode = _summary(found)
    siblings = db.execute(
        f"SELECT {_columns()} FROM trajectories WHERE group_id = ? AND group_attempt = ? AND eval_step IS ? "
        "ORDER BY member LIMIT 64",
        (episode["group_id"], episode["group_attempt"], episode["eval_step"]),
    )
    episode["siblings"] = [_summary(sibling) for sibling in siblings]
    size = _episode_bytes(db, row)
    if size > MAX_EPISODE_BYTES:
        return episode | {"too_large": size, "prompt": [], "turns": []}
    prompt, turns = db.execute("SELECT prompt, turns FROM trajectories WHERE row = ?", (row,)).fetchone()
    versions = _array(db, row, "policy_versions", "<i4")
    episode["prompt"] = _bounded(json.loads(prompt))
    episode["turns"] = _bounded(json.loads(turns))
    for turn in episode["turns"]:
        turn["versions"] = sorted(set(versions[turn["start"] : turn["end"]].tolist()))
    return episode


def read_tokens(db: sqlite3.Connection, row: int, *, offset: int, limit: int) -> dict[str, Any]:
    """Tokens `offset` to `offset + limit` of an episode, in columns; `learner` is None where it was not computed."""
    facts = db.execute(
        "SELECT num_tokens, status, cause, step, advantage, learner_logprobs IS NOT NULL FROM trajectories "
        "WHERE row = ?",
        (row,),
    ).fetchone()
    if facts is None:
        raise NotThere(f"no trajectory {row}")
    span = {"start": max(offset, 0), "count": min(max(limit, 1), 2000)}
    learner = _array(db, row, "learner_logprobs", "<f4", **span) if facts[5] else None
    return {
        **dict(zip(("num_tokens", "status", "cause", "step", "advantage"), facts[:5], strict=True)),
        "offset": span["start"],
        "id": _array(db, row, "token_ids", "<i4", **span).tolist(),
        "mask": _array(db, row, "loss_mask", "u1", **span).tolist(),
        "rollout": _finite(_array(db, row, "rollout_logprobs", "<f4", **span)),
        "version": _array(db, row, "policy_versions", "<i4", **span).tolist(),
        "learner": None if learner is None else _finite(learner),
    }


def read_image(db: sqlite3.Connection, sha256: str) -> tuple[bytes, str]:
    """An image and its type, told from its first bytes: what the environment claims could be a page with script."""
    found = db.execute("SELECT length(data) FROM images WHERE sha256 = ?", (sha256,)).fetchone()
    if found is None:
        raise NotThere(f"no image {sha256[:64]!r}")
    if found[0] > MAX_IMAGE_BYTES:
        raise Refused(f"the image has {found[0]} bytes; shown are at most {MAX_IMAGE_BYTES}")
    data = db.execute("SELECT data FROM images WHERE sha256 = ?", (sha256,)).fetchone()[0]
    kinds = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
    kind = next((kind for magic, kind in kinds.items() if data.startswith(magic)), "application/octet-stream")
    return data, kind


def worker_rows(db: sqlite3.Connection) -> list[dict[str, Any]]:
    """Per worker, over the newest rows: episodes, tokens, tokens per second of sampling, newest policy version."""
    sql = (
        "SELECT worker, COUNT(*) AS episodes, SUM(num_sampled_tokens) AS tokens, MAX(max_version) AS version, "
        "SUM(num_sampled_tokens) / MAX(SUM(MAX(seconds - COALESCE(env_seconds, 0), 0)), 1e-9) AS tok_s, "
        "SUM(error IS NOT NULL) AS errors, SUM(COALESCE(env_seconds, 0)) AS env_s "
        "FROM (SELECT worker, num_sampled_tokens, max_version, seconds, env_seconds, error FROM trajectories "
        f"ORDER BY row DESC LIMIT {RECENT}) GROUP BY worker ORDER BY worker LIMIT 500"
    )
    return [dict(row) for row in db.execute(sql)]


def ledger_rows(db: sqlite3.Connection, *, state: str, group: str, before: int, limit: int) -> dict[str, Any]:
    """Groups of the ledger, newest first; `state` and `group` "" take all."""
    limit = min(max(limit, 1), MAX_ROWS)
    rows = db.execute(
        "SELECT ordinal, group_id, state, attempt, redispatched, refused_commits, worker, step, reason, last_cause "
        "FROM groups WHERE ordinal < ? AND (? = '' OR state = ?) AND (? = '' OR group_id = ?) "
        "ORDER BY ordinal DESC LIMIT ?",
        (before or 2**62, state, state, group, group, limit + 1),
    ).fetchall()
    shown = [dict(row) for row in rows[:limit]]
    return {"rows": shown, "next": shown[-1]["ordinal"] if len(rows) > limit else None}


def lineage_of_group(db: sqlite3.Connection, group: str) -> dict[str, Any]:
    """Where a group of the ledger stands and how it came there: {"group", "events": oldest first, "story"}.

    `story` is "" where the file does not tell the whole of it: it began before events were kept.
    """
    rows = ledger_rows(db, state="", group=group, before=0, limit=1)["rows"]
    if not rows:
        raise NotThere(f"no group {group[:200]!r} in the ledger")
    events = group_events(db, group)
    whole = bool(events) and events[0].event == "issued"
    return {"group": rows[0], "events": _events(events), "story": _bounded(story(events)) if whole else ""}


def newest_lineage(db: sqlite3.Connection, *, before: int, limit: int) -> dict[str, Any]:
    """Events of all groups, newest first."""
    events = newest_events(db, before=before, limit=limit + 1)
    return {"events": _events(events[:limit]), "next": events[limit - 1].number if len(events) > limit else None}


def _events(events: Sequence[LineageEvent]) -> list[dict[str, Any]]:
    return [_bounded(asdict(event)) for event in events]


def _open(uri: str) -> sqlite3.Connection:
    db = sqlite3.connect(uri, uri=True, timeout=1.0)
    try:
        db.row_factory = sqlite3.Row
        add_missing_columns(db)
        db.execute("PRAGMA query_only=1")
        db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except sqlite3.Error:
        db.close()
        raise
    return db


def _columns() -> str:
    """The list's columns; of those that hold a free text, no more than is shown."""
    wide = (*JSON_COLUMNS, "id", "group_id", "cause")
    named = (f"substr({name}, 1, {MAX_TEXT}) AS {name}" if name in wide else name for name in SUMMARY_COLUMNS)
    return ", ".join([*named, "staleness(step, min_version) AS staleness"])


def _summary(row: sqlite3.Row) -> dict[str, Any]:
    values = dict(row)
    for name in JSON_COLUMNS:
        try:
            values[name] = None if values[name] is None else json.loads(values[name])
        except ValueError:  # cut above
            values[name] = {"cut": values[name][:200]}
    return values


def _staleness(updates_per_step: int, step: Any, version: Any) -> int | None:
    """In versions; None of what was not trained, or of which nothing was sampled."""
    if not (isinstance(step, int) and isinstance(version, int)) or version < 0:
        return None
    now = version_before(step, updates_per_step=updates_per_step)
    return staleness(learner_version=now, sampled_version=version)


def _episode_bytes(db: sqlite3.Connection, row: int) -> int:
    """Of the stored conversation, without reading it, as SQL's length() would."""
    total = 0
    for column in ("prompt", "turns"):
        with db.blobopen("trajectories", column, row, readonly=True) as text:
            total += len(text)
    return total


def _array(db: sqlite3.Connection, row: int, column: str, dtype: str, start: int = 0, count: int = 2**40) -> np.ndarray:
    """A part of an array, read without the rest of it."""
    with db.blobopen("trajectories", column, row, readonly=True) as blob:
        size = np.dtype(dtype).itemsize
        first = min(start * size, len(blob))
        blob.seek(first)
        data = blob.read(min(count * size, len(blob) - first))
    return np.frombuffer(data[: len(data) // size * size], dtype=dtype)


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _bounded(value: Any) -> Any:
    """The same with long texts cut, and saying so."""
    if isinstance(value, str) and len(value) > MAX_TEXT:
        return f"{value[:MAX_TEXT]}\n[{len(value) - MAX_TEXT} more characters]"
    if isinstance(value, list):
        return [_bounded(item) for item in value]
    if isinstance(value, dict):
        return {key[:MAX_TEXT]: _bounded(item) for key, item in value.items()}
    return value
