"""All spans of a run as trace events, the file that Perfetto and chrome://tracing open."""

import json
import math
from collections.abc import Iterator
from typing import Any

from rl.dashboard.folders import NotThere, confined
from rl.dashboard.metrics import CHUNK_BYTES, Cursor, read_new_lines
from rl.runs.run_folder import RunFolder

MAX_LANES = 10_000
"""Processes with a lane of their own; the file is of foreign making, and names are what this keeps in memory."""
MAX_NAME = 200


def trace_json(folder: RunFolder, chunk_bytes: int = CHUNK_BYTES) -> Iterator[str]:
    """One JSON object in pieces, each of one chunk of spans.jsonl: a long run's spans do not fit in memory."""
    yield '{"traceEvents":['
    lanes: dict[str, int] = {}
    comma = ""
    for rows in _chunks(folder, chunk_bytes):
        events = [event for row in rows for event in _events(row, lanes)]
        if events:
            yield comma + ",\n".join(json.dumps(event, separators=(",", ":")) for event in events)
            comma = ",\n"
    yield "]}\n"


def _chunks(folder: RunFolder, chunk_bytes: int) -> Iterator[tuple[dict[str, Any], ...]]:
    """To where the file ended when it was asked for: a live run writes on."""
    try:
        path = confined(folder, folder.spans)
        size = path.stat().st_size
    except (NotThere, OSError):
        return
    cursor = Cursor()
    while cursor.offset < size:
        new = read_new_lines(path, cursor, chunk_bytes)
        if new.restarted:  # a resumed run replaced it: what was sent is of the old one
            return
        yield new.rows
        if not new.more:
            return
        cursor = new.cursor


def _events(row: dict[str, Any], lanes: dict[str, int]) -> list[dict[str, Any]]:
    """Of one span, and before the first of a process its name; none for what is no span."""
    process, activity = row.get("process"), row.get("activity")
    start, end = _micros(row.get("start_s")), _micros(row.get("end_s"))
    if not (isinstance(process, str) and isinstance(activity, str)) or start is None or end is None:
        return []
    name, events = process[:MAX_NAME] if len(lanes) < MAX_LANES or process[:MAX_NAME] in lanes else "others", []
    if name not in lanes:
        lanes[name] = len(lanes)
        events.append({"ph": "M", "name": "process_name", "pid": lanes[name], "args": {"name": name}})
    span = {"ph": "X", "name": activity, "pid": lanes[name], "tid": 0, "ts": start, "dur": end - start}
    return [*events, span]


def _micros(seconds: Any) -> float | None:
    """None for what is no number that JSON has."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        return None
    try:
        micros = seconds * 1e6
    except OverflowError:
        return None
    return micros if math.isfinite(micros) else None
