"""Workers, logs and spans of a run."""

from pathlib import Path
from typing import Any

from rl.dashboard import database
from rl.dashboard.folders import NotThere, Refused, confined
from rl.dashboard.metrics import Cursor, read_new_lines
from rl.runs.run_folder import RunFolder, RunFolderError, RunStatus

MAX_LOG_BYTES = 256 * 1024
TAIL_BYTES = 4 * 2**20
"""Of events.jsonl and spans.jsonl, what is looked at from the end."""

STATES = {
    "worker_lost": "lost",
    "worker_restart_timeout": "lost",
    "worker_restarted": "healthy",
    "worker_retired": "retired",
    "weights_refused": "stale",
}
"""Event -> state of its worker from then on."""
ENDS_WITH_THE_RUN = ("healthy", "stale")
"""States of a process that is there."""


def list_logs(folder: RunFolder) -> list[dict[str, Any]]:
    """Name and bytes of every log file that is really one."""
    if not folder.logs.is_dir():
        return []
    found = []
    for path in sorted(folder.logs.iterdir())[:500]:
        if path.suffix == ".log" and path.is_file() and not path.is_symlink():
            found.append({"name": path.name, "bytes": path.stat().st_size})
    return found


def read_log(folder: RunFolder, name: str, offset: int) -> dict[str, Any]:
    """`offset` -1: the end of the file. `next` is the offset to follow from."""
    if "/" in name or not name.endswith(".log"):
        raise Refused(f"no log {name[:100]!r}: a log's name ends in .log")
    path = confined(folder, folder.logs / name)
    size = path.stat().st_size
    start = max(0, size - MAX_LOG_BYTES) if offset < 0 or offset > size else offset
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(MAX_LOG_BYTES)
    return {
        "name": name,
        "bytes": size,
        "offset": start,
        "next": start + len(data),
        "text": data.decode("utf-8", "replace"),
    }


def last_rows(folder: RunFolder, path: Path, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` rows of a file of JSON lines, oldest first; fewer where they are long."""
    return last_rows_and_cursor(folder, path, limit)[0]


def last_rows_and_cursor(folder: RunFolder, path: Path, limit: int) -> tuple[list[dict[str, Any]], Cursor]:
    """The same, and where the file was read to."""
    try:
        size = confined(folder, path).stat().st_size
    except NotThere:
        return [], Cursor()
    start = max(0, size - TAIL_BYTES)
    new = read_new_lines(path, Cursor(offset=start), TAIL_BYTES)  # the broken first line is passed over as a bad one
    return list(new.rows[-limit:]), new.cursor


def workers(folder: RunFolder) -> dict[str, Any]:
    """Every process that left a trace: what it did last, how often it started, what it made, its last error."""
    found: dict[str, dict[str, Any]] = {}
    for span in last_rows(folder, folder.spans, 20_000):
        name = str(span.get("process"))[:200]
        known, end_s = found.setdefault(name, {"process": name}), span.get("end_s")
        if isinstance(end_s, int | float) and end_s >= known.get("last_s", -1.0):
            known |= {"activity": span.get("activity"), "last_s": end_s}
        if isinstance(end_s, int | float) and span.get("activity") == "sync":
            known["synced_s"] = max(end_s, known.get("synced_s", 0.0))
    for event in last_rows(folder, folder.events, 5_000):
        name = event.get("worker")
        if isinstance(name, str):
            known = found.setdefault(name[:200], {"process": name[:200]})
            told = event.get("error") or event.get("cause") or event.get("reason")
            known |= {"event": event.get("kind"), "error": told or known.get("error")}  # a restart tells no error
            known["state"] = _state_after(event, known)
            known["restarts"] = known.get("restarts", 0) + (event.get("kind") == "worker_restarted")
    if folder.trajectories.is_file():
        with database.reading(confined(folder, folder.trajectories)) as db:
            for row in database.worker_rows(db):
                found.setdefault(row["worker"], {"process": row["worker"]}).update(row)
    is_running = _is_running(folder)
    for known in found.values():  # who made episodes and never got into trouble
        state = known.get("state") or ("healthy" if known.get("episodes") else None)
        known["state"] = f"was {state}" if state in ENDS_WITH_THE_RUN and not is_running else state
    return {"workers": [found[name] for name in sorted(found)], "episodes_of": database.RECENT}


def _state_after(event: dict[str, Any], known: dict[str, Any]) -> str | None:
    """No event tells that a worker took weights after it refused some: its newest "sync" does."""
    kind, at_s = str(event.get("kind")), event.get("time_s")
    if kind == "weights_refused" and isinstance(at_s, int | float) and at_s < known.get("synced_s", 0.0):
        return "healthy"
    return STATES.get(kind, known.get("state"))


def _is_running(folder: RunFolder) -> bool:
    try:
        return folder.state().status == RunStatus.RUNNING
    except RunFolderError:
        return False
