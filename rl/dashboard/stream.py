"""What a run writes, as server-sent events.

An event's id says how far metrics.jsonl and events.jsonl were sent. A browser that reconnects, to this server or to one
started anew, sends it back (Last-Event-ID), and the stream goes on with the next line: nothing twice, nothing lost.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

from rl.dashboard.folders import NotThere
from rl.dashboard.metrics import Cursor, read_new_lines
from rl.runs.run_folder import RunFolder, RunFolderError

POLL_S = 0.5
"""How long a new line waits at most."""
SILENT_S = 15.0
"""A comment is sent after that long: a dead connection is noticed by writing to it."""
MAX_STREAMS = 32


def parse_cursors(text: str) -> tuple[Cursor, Cursor]:
    """Of metrics and events, from an event's id."""
    metrics, _, events = text.partition("-")
    return Cursor.parse(metrics), Cursor.parse(events)


async def follow(folder: RunFolder, last_id: str, ended: Callable[[], bool]) -> AsyncIterator[str]:
    """Events "metrics", "event", "state" and "reset" (the file was replaced: load anew) until `ended()`."""
    metrics, events = parse_cursors(last_id)
    state, quiet_s = "", 0.0
    yield "retry: 1000\n\n"
    while not ended():
        new, happened = await asyncio.to_thread(
            lambda at=metrics, then=events: (read_new_lines(folder.metrics, at), read_new_lines(folder.events, then))
        )
        metrics = new.cursor
        identity = f"{metrics}-{events}"  # of the first event, so that a connection lost after it loses no second one
        if new.restarted:
            yield _event("reset", identity, {})
        elif new.rows:
            yield _event("metrics", identity, {"rows": new.rows})
        events = happened.cursor
        identity = f"{metrics}-{events}"
        if happened.rows:
            yield _event("event", identity, {"rows": happened.rows})
        sent = bool(new.rows or happened.rows or new.restarted)
        now = await asyncio.to_thread(_state, folder)
        if now != state:
            state, sent = now, True
            yield _event("state", identity, json.loads(now))
        quiet_s = 0.0 if sent else quiet_s + POLL_S
        if quiet_s >= SILENT_S:
            quiet_s = 0.0
            yield ": quiet\n\n"
        if not (new.more or happened.more):
            await asyncio.sleep(POLL_S)


def _state(folder: RunFolder) -> str:
    try:
        state = folder.state()
    except (RunFolderError, NotThere) as error:
        return json.dumps({"status": "unreadable", "step": None, "error": str(error)})
    return json.dumps({"status": state.status, "step": state.step, "error": state.error})


def _event(name: str, identity: str, data: object) -> str:
    return f"id: {identity}\nevent: {name}\ndata: {json.dumps(data)}\n\n"
