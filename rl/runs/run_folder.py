"""The folder of a run: its name, its paths, its life signs, and how a user's RUN finds it.

runs/20261123-150207-calculator-tiny-hybrid-7f3a/
  run.json  manifest.json  config.yaml  summary.json             written whole, by atomic rename
  metrics.jsonl  events.jsonl  spans.jsonl                       appended to (rl/monitor/monitor.py)
  ledger.sqlite  trajectories.db  checkpoints/  wandb/  logs/
runs/latest -> the newest run
"""

import difflib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

LATEST = "latest"
SILENT_AFTER_S = 120.0
"""A run on another machine counts as crashed when its heartbeat is older than this."""
PACKAGES = ("shoal", "torch", "transformers", "ray", "gymnasium", "numpy", "safetensors", "hydra-core", "wandb")
"""Versions that the manifest names."""
_NAME = re.compile(r"[a-z0-9-]+")


class RunFolderError(RuntimeError):
    """Raised when a run's folder cannot be made, written, read or found; the message names the path."""


class RunStatus(StrEnum):
    """Where a run stands."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    CRASHED = "crashed"
    """Never written: says running, but its process is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """run.json."""

    status: RunStatus
    step: int
    """Learner steps done."""
    pid: int
    pid_started: str
    """When the process started, as its system tells it; a number used again does not pass for the run."""
    host: str
    started_s: float
    """Unix time."""
    heartbeat_s: float
    """Unix time of the last sign of life."""
    error: str = ""
    """Why it failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A line of `shoal ls`."""

    name: str
    path: Path
    state: RunState | None
    """None where run.json cannot be read; `fault` then says why."""
    fault: str = ""
    summary: dict[str, Any]
    """summary.json; empty until the run has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """One run's folder.

    Example: folder = RunFolder.create(Path("runs"), "calculator", "tiny_hybrid"); folder.heartbeat(step=7);
    RunFolder.resolve(Path("runs"), "latest").trajectories -> runs/20261123-150207-.../trajectories.db
    """

    path: Path

    @staticmethod
    def create(
        root: Path | str,
        env: str,
        policy: str,
        name: str = "",
        *,
        fill: "Callable[[RunFolder], None]" = lambda folder: None,
        clock: Callable[[], float] = time.time,
    ) -> "RunFolder":
        """Make a new folder (mode 0700), its run.json and the `latest` link. `name` "" makes a unique one.

        `fill` writes what else it must hold from the start. Raises `RunFolderError`, with nothing left behind, for a
        bad or used name, no space, or no permission; and what `fill` raises.
        """
        now = clock()
        if not name:
            utc = datetime.fromtimestamp(now, UTC).strftime("%Y%m%d-%H%M%S")
            name = f"{utc}-{slug(env)}-{slug(policy)}-{secrets.token_hex(2)}"
        if not _NAME.fullmatch(name) or name == LATEST:
            raise RunFolderError(f"a run's name is made of a-z, 0-9 and '-', and is not {LATEST!r}: got {name!r}")
        folder = RunFolder(path=Path(root) / name)
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            folder.path.mkdir(mode=0o700)
        except OSError as error:
            raise _explain(folder.path, error) from error
        try:
            folder.checkpoints.mkdir()
            folder.logs.mkdir()
            folder.begin(clock=clock)
            fill(folder)
            _link(Path(root) / LATEST, name)
        except BaseException as error:  # interrupted too: nothing half written stays
            shutil.rmtree(folder.path, ignore_errors=True)
            if isinstance(error, OSError):
                raise _explain(folder.path, error) from error
            raise
        return folder

    @staticmethod
    def resolve(root: Path | str, run: str) -> "RunFolder":
        """The run that a user means by "latest", an id, a unique prefix of one, or a path.

        Raises `RunFolderError` naming what there is instead.
        """
        root = Path(root)
        if os.sep in run or run in (".", ".."):
            path = Path(run)
        elif run == LATEST:
            path = (root / LATEST).resolve()
        else:
            path = root / _match(run, _names(root), root)
        if not (path / "run.json").is_file():
            raise RunFolderError(f"no run at {path}: it has no run.json")
        return RunFolder(path=path)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories.db"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def spans(self) -> Path:
        return self.path / "spans.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.path / "wandb"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def begin(self, *, step: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Say that this process runs it, for the first time or after a resume.

        Raises `RunFolderError` if another living process does.
        """
        now = clock()
        if self.run_json.exists():
            state = self.state(clock=clock)
            if state.status == RunStatus.RUNNING and state.pid != os.getpid():
                raise RunFolderError(f"run {self.path} is still running, as process {state.pid} on {state.host}")
        state = RunState(
            status=RunStatus.RUNNING,
            step=step,
            pid=os.getpid(),
            pid_started=_process_started(os.getpid()),
            host=socket.gethostname(),
            started_s=now,
            heartbeat_s=now,
        )
        self._write_state(state)

    def heartbeat(self, *, step: int, clock: Callable[[], float] = time.time) -> None:
        """Note in run.json that the run lives, and its learner steps so far."""
        self._write_state(replace(self._read_state(), step=step, heartbeat_s=clock()))

    def finish(self, status: str, error: str = "", *, clock: Callable[[], float] = time.time) -> None:
        """Note how the run ended: "finished", "failed" or "interrupted"."""
        ended = replace(self._read_state(), status=RunStatus(status), error=error, heartbeat_s=clock())
        self._write_state(ended)

    def state(self, *, clock: Callable[[], float] = time.time) -> RunState:
        """run.json, "crashed" where it says running and the process is gone. Raises `RunFolderError`."""
        state = self._read_state()
        if state.status == RunStatus.RUNNING and not _is_alive(state, clock()):
            return replace(state, status=RunStatus.CRASHED)
        return state

    def write_config(self, yaml_text: str) -> None:
        self._write(self.config, yaml_text)

    def write_summary(self, values: Mapping[str, Any]) -> None:
        self._write(self.summary, json.dumps(values, indent=2) + "\n")

    def write_manifest(
        self,
        *,
        seed: int,
        environments: Any,
        argv: Sequence[str] | None = None,
        sweep: Mapping[str, Any] | None = None,
    ) -> None:
        """Facts to make the run again: code, versions, hardware, seed; `environments`: versions and digests by id.

        `sweep`: {"id", "number", "of", "settings"} of a run that is one of a sweep.
        """
        manifest = {
            "argv": list(sys.argv if argv is None else argv),
            "seed": seed,
            "sweep": sweep,
            "environments": environments,
            "packages": _package_versions(),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "machine": platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "git": _git_state(Path(__file__).resolve().parent),
        }
        self._write(self.manifest, json.dumps(manifest, indent=2) + "\n")

    def _read_state(self) -> RunState:
        try:
            values = json.loads(self.run_json.read_text())
            return RunState(**values | {"status": RunStatus(values["status"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RunFolderError(f"cannot read {self.run_json}: {error!r}") from error

    def _write_state(self, state: RunState) -> None:
        self._write(self.run_json, json.dumps(asdict(state), indent=2) + "\n")

    def _write(self, path: Path, text: str) -> None:
        try:
            write_atomic(path, text)
        except OSError as error:
            raise _explain(path, error) from error


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that readers see the old or the new text, never a part. Raises OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename may leave an empty file
        partial.replace(path)
    except BaseException:  # interrupted too
        partial.unlink(missing_ok=True)
        raise


def list_runs(root: Path | str, *, clock: Callable[[], float] = time.time) -> list[RunSummary]:
    """Every run under `root`, newest first."""
    runs = [_summarise(RunFolder(path=Path(root) / name), clock) for name in _names(Path(root))]
    return sorted(runs, key=lambda run: (run.state.started_s if run.state else 0.0, run.name), reverse=True)


def slug(name: str) -> str:
    """`name` in a-z, 0-9 and '-': "Tiny_Hybrid" -> "tiny-hybrid"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"


def _summarise(folder: RunFolder, clock: Callable[[], float]) -> RunSummary:
    try:
        summary = json.loads(folder.summary.read_text()) if folder.summary.exists() else {}
    except (OSError, ValueError):
        summary = {}
    try:
        state, fault = folder.state(clock=clock), ""
    except RunFolderError as error:
        state, fault = None, str(error)
    return RunSummary(name=folder.name, path=folder.path, state=state, fault=fault, summary=summary)


def _names(root: Path) -> list[str]:
    if not root.is_dir():
        return []
    return sorted(p.name for p in root.iterdir() if not p.is_symlink() and (p / "run.json").is_file())


def _match(run: str, names: list[str], root: Path) -> str:
    """The one id that `run` is or begins."""
    if run in names:
        return run
    matches = [name for name in names if run and name.startswith(run)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RunFolderError(f"{run!r} begins {len(matches)} runs in {root}: {', '.join(matches[:5])}")
    if not names:
        raise RunFolderError(f"no run {run!r}: there is none in {root}")
    near = difflib.get_close_matches(run, names, n=1, cutoff=0.0)[0]
    raise RunFolderError(f"no run {run!r} in {root}; the nearest of {len(names)} is {near!r}")


def _link(link: Path, target: str) -> None:
    """Point `link` at `target` in one step: readers see the old run or the new one."""
    partial = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    partial.symlink_to(target)
    partial.replace(link)


def _is_alive(state: RunState, now_s: float) -> bool:
    if state.host != socket.gethostname():
        return now_s - state.heartbeat_s < SILENT_AFTER_S
    try:
        os.kill(state.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, under another user
    return _process_started(state.pid) == state.pid_started


def _process_started(pid: int) -> str:
    """Start time of a process in ticks since boot; "" where the system has no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before it may hold spaces


def _package_versions() -> dict[str, str | None]:
    """Without importing any: torch and ray take seconds."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the checkout that holds `folder`; None outside one or without git."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit.strip(), "dirty": bool(_git(folder, "status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout


def _explain(path: Path, error: OSError) -> RunFolderError:
    if isinstance(error, FileExistsError):
        return RunFolderError(f"{path} exists already")
    return RunFolderError(f"cannot write the run folder {path}: {error.strerror or error}")
