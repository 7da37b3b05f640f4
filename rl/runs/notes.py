"""What people write about a run, beside what the run wrote itself: a note and tags, in notes.json of its folder."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from rl.runs.run_folder import write_atomic
from rl.runs.usage import UsageError

MAX_NOTE_CHARS = 4_000
MAX_TAGS = 50
MAX_FILE_BYTES = 64 * 1024
"""A larger notes.json was not written by us and is not read."""
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Notes:
    """Example: Notes(note="the seed that diverged", tags=("baseline",))."""

    note: str = ""
    tags: tuple[str, ...] = ()
    """In order of the alphabet, none twice."""


def read_notes(run: Path) -> Notes:
    """Of a run's folder; empty where notes.json is missing, a link, or not ours."""
    path = run / "notes.json"
    try:
        if path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
            return Notes()
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Notes()
    if not isinstance(values, dict):
        return Notes()
    note, tags = values.get("note"), values.get("tags")
    kept = {tag for tag in tags if isinstance(tag, str) and _TAG.fullmatch(tag)} if isinstance(tags, list) else set()
    return Notes(note=note[:MAX_NOTE_CHARS] if isinstance(note, str) else "", tags=tuple(sorted(kept))[:MAX_TAGS])


def write_notes(run: Path, notes: Notes) -> None:
    """Raises `UsageError` for a long note, too many tags or one that is no tag."""
    for tag in notes.tags:
        if not _TAG.fullmatch(tag):
            raise UsageError(f"a tag is 1 to 40 letters, digits, '.', '_' or '-', no sign first; got {tag[:60]!r}")
    if len(notes.tags) > MAX_TAGS:
        raise UsageError(f"a run has at most {MAX_TAGS} tags; got {len(notes.tags)}")
    if len(notes.note) > MAX_NOTE_CHARS:
        raise UsageError(f"a note has at most {MAX_NOTE_CHARS} characters; got {len(notes.note)}")
    write_atomic(run / "notes.json", json.dumps(asdict(notes), indent=2) + "\n")
