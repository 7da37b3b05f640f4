"""Which folder a run's name means, and no path out of it: names and files come from a browser."""

import re
from pathlib import Path

from rl.run_folder import LATEST, RunFolder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class NotThere(LookupError):
    """Raised for a run, a file or a row that is not there; the message goes to the browser."""


class Refused(ValueError):
    """Raised for a request that cannot be answered; the message names the value and what is allowed."""


def find_run(root: Path, name: str) -> RunFolder:
    """The run `name` of `root`, or its latest. Raises `NotThere` for anything else, links out of `root` included."""
    if name == LATEST and (root / LATEST).is_symlink():
        name = (root / LATEST).resolve().name
    folder = RunFolder(path=root / name)
    if not _NAME.fullmatch(name) or folder.path.resolve().parent != root.resolve() or not folder.run_json.is_file():
        raise NotThere(f"no run {name[:200]!r}")
    return folder


def confined(folder: RunFolder, path: Path) -> Path:
    """`path`, where it is a plain file inside the run's folder. A copied folder may hold links to anywhere."""
    real = path.resolve()
    if not real.is_relative_to(folder.path.resolve()) or not real.is_file():
        raise NotThere(f"run {folder.name} has no {path.name[:200]!r}")
    return real


def read_text(folder: RunFolder, path: Path, max_bytes: int) -> str:
    """A small text file of a run; "" where it is missing. Raises `Refused` over `max_bytes`."""
    try:
        real = confined(folder, path)
    except NotThere:
        return ""
    size = real.stat().st_size
    if size > max_bytes:
        raise Refused(f"{path.name} has {size} bytes; shown are at most {max_bytes}")
    return real.read_text(encoding="utf-8", errors="replace")
