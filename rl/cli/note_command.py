"""`shoal note`: write a note and tags into a run's folder, or read them."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rl.monitor.progress import visible
from rl.runs.notes import Notes, read_notes, write_notes
from rl.runs.usage import resolve_run


def annotate(
    run: str, text: str | None, *, tag: Sequence[str] = (), untag: Sequence[str] = (), root: str, as_json: bool = False
) -> int:
    """Replace the note where `text` is given ("" removes it), add and remove tags, print what stands then."""
    folder = resolve_run(root, run)
    had = read_notes(folder.path)
    tags = tuple(sorted((set(had.tags) | set(tag)) - set(untag)))
    notes = Notes(note=had.note if text is None else text, tags=tags)
    if notes != had:
        write_notes(folder.path, notes)
    if as_json:
        print(json.dumps({"run": folder.name, **asdict(notes)}))
    else:
        print(f"{folder.name}  tags: {' '.join(notes.tags) or 'none'}")
        print(visible(notes.note) or "no note")
    return 0
