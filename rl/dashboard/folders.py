"""Which folder a run's name means, and no path out of it: names and files come from a browser."""

import functools
import hashlib
import re
from pathlib import Path

from rl.runs.run_folder import LATEST, RunFolder

MAX_CONFIG_BYTES = 2**20
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


def config_group(folder: RunFolder) -> str:
    """The same for runs whose settings differ in the seed and the run's name alone; "" without readable settings."""
    try:
        path = confined(folder, folder.config)
        stat = path.stat()
    except (NotThere, OSError):
        return ""
    return _config_group(path, stat.st_mtime_ns) if stat.st_size <= MAX_CONFIG_BYTES else ""


@functools.lru_cache(maxsize=1000)
def _config_group(path: Path, _: int) -> str:
    """Lines are compared, not values: config.yaml is written in one order, and reading YAML takes 10 ms a run."""
    kept, section = [], ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith(" "):
            section = line
        if not line.startswith("seed:") and not (section == "run:" and line.startswith("  name:")):
            kept.append(line)
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]
