"""Running code that nobody has read: what a run is, what it may use, and which isolation does it.

    sandbox = open_sandbox()                      # "auto": the jail, else bubblewrap; never nothing
    done = await sandbox.run("print(6 * 7)\\n2 ** 5")
    done.exit, done.stdout, done.value            # "ok", "42\\n", 32
    sandbox.close()

A run sees a fresh empty folder with the given files, the standard library, and nothing else of the machine: no
network, no other process, no environment variables, nothing of the run before it. What it reports as `value` is what
the code says; a grader keeps the right answers outside and compares here (`same_data`).
"""

import atexit
import functools
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from envs.errors import InfraFault
from envs.worker_thread import run_sync

ExitKind = Literal["ok", "error", "timeout", "cpu", "memory", "output", "disk", "signal"]
KINDS = ("jail", "bwrap", "container", "none")
_GRACE_S = 60.0
"""How long a run may wait for a free slot, in synchronous code."""


class SandboxUnavailable(RuntimeError):
    """No isolation that was asked for works here; the text says why for each, and what to do."""


class SandboxFault(InfraFault):
    """The sandbox itself broke (its process died). The machine's fault, not that of the code or of the policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one run may use. Past one it is ended, and `Execution.exit` names which."""

    wall_s: float = 5.0
    """Seconds on the clock, the start included."""
    cpu_s: int = 1
    """Seconds of processor time, whole ones. Unlike the clock it does not depend on the machine's load."""
    memory_bytes: int = 256 << 20
    """Address space beyond that of an idle interpreter."""
    output_bytes: int = 64 << 10
    """Of standard output, and again of standard error."""
    disk_bytes: int = 8 << 20
    """Of all files in the run's folder, and of each."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.wall_s) and self.wall_s > 0 and self.cpu_s >= 1):
            raise ValueError(f"wall_s must be > 0 and cpu_s >= 1, not {self.wall_s} and {self.cpu_s}")
        if min(self.memory_bytes, self.output_bytes, self.disk_bytes) <= 0:
            raise ValueError(f"limits must be > 0: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How a run ended."""

    exit: ExitKind
    """"ok" | "error" (an exception or a status other than 0) | the limit it went past | "signal"."""
    stdout: str
    stderr: str
    value: Any = None
    """JSON data of the last line, where that is an expression; None where it is none or no such data."""
    shown: str = ""
    """repr of the same; empty = no value."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The folder's plain files afterwards, where `collect` was asked for."""
    seconds: float = 0.0
    """From the fork to the end."""

    @property
    def text(self) -> str:
        """What an interactive session would show: output, value, and of an error its last line. Without addresses."""
        parts = [self.stdout.rstrip("\n"), re.sub(r" at 0x[0-9a-f]+", "", self.shown)]
        if self.exit == "error":
            parts.append(next(reversed(self.stderr.strip().splitlines()), "error")[:200])
        elif self.exit != "ok":
            parts.append(f"stopped: {self.exit}")
        return "\n".join(part for part in parts if part)


class Sandbox(Protocol):
    """Where untrusted code runs. Safe to use from any thread and any event loop."""

    kind: str
    """One of KINDS."""

    async def run(
        self,
        source: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        stdin: str = "",
        limits: Limits | None = None,
        collect: bool = False,
    ) -> Execution:
        """Run Python. `files` are put into its folder by plain name. Raises SandboxFault, ValueError (a bad name)."""
        ...

    def close(self) -> None:
        """End the processes and remove the folders. Idempotent."""
        ...


class _Shared:
    """One sandbox of this process with its users; it ends with the last of them."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox, self.users = sandbox, 0


class _Lease:
    """A user's hold on the shared sandbox."""

    def __init__(self, shared: _Shared) -> None:
        self.kind = shared.sandbox.kind
        self._shared: _Shared | None = shared
        with _lock:
            shared.users += 1

    async def run(
        self,
        source: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        stdin: str = "",
        limits: Limits | None = None,
        collect: bool = False,
    ) -> Execution:
        if self._shared is None:
            raise RuntimeError("this sandbox is closed")
        return await self._shared.sandbox.run(source, files=files, stdin=stdin, limits=limits, collect=collect)

    def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is None:
            return
        with _lock:
            shared.users -= 1
            if shared.users == 0:
                shared.sandbox.close()


_lock = threading.Lock()


def open_sandbox(choice: str = "auto") -> Sandbox:
    """A sandbox of the first kind in `choice` that works here; processes start with the first run.

    `choice`: "auto" (= "jail,bwrap"), or kinds in order, separated by commas: "jail", "bwrap", "container:IMAGE", or
    "none", which isolates nothing and must be typed. All users in a process share one. The first call probes (0.1 s).
    Raises ValueError for an unknown kind, SandboxUnavailable where none works.
    """
    return _Lease(_shared(choice))


def run_code(
    source: str,
    *,
    files: Mapping[str, str | bytes] | None = None,
    stdin: str = "",
    limits: Limits | None = None,
    sandbox: str = "auto",
) -> Execution:
    """As `Sandbox.run`, once, from synchronous code."""
    opened = open_sandbox(sandbox)
    try:
        wait_s = (limits or Limits()).wall_s + _GRACE_S
        return run_sync(opened.run(source, files=files, stdin=stdin, limits=limits), wait_s)
    finally:
        opened.close()


def same_data(a: Any, b: Any) -> bool:
    """Equal JSON data of equal types: True is not 1, 1 is not 1.0. Numbers compare exactly, NaN equals nothing."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_data, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_data(a[key], b[key]) for key in a)
    return a == b


def kinds_of(choice: str) -> list[tuple[str, str]]:
    """(kind, argument) in order. Example: "jail,container:a:3" -> [("jail", ""), ("container", "a:3")]."""
    parsed = []
    for word in ("jail,bwrap" if choice == "auto" else choice).split(","):
        kind, _, argument = word.strip().partition(":")
        if kind not in KINDS:
            raise ValueError(f"unknown sandbox {kind!r} in {choice!r}: choose from auto, {', '.join(KINDS)}")
        if bool(argument) != (kind == "container"):
            raise ValueError(
                f"bad sandbox {word!r}: only a container takes an image, as container:IMAGE, and needs one"
            )
        parsed.append((kind, argument))
    return parsed


@functools.cache
def _shared(choice: str) -> _Shared:
    from envs.sandbox.zygotes import ZygotePool, launcher_of

    reasons = []
    for kind, argument in kinds_of(choice):
        try:
            sandbox = ZygotePool(launcher_of(kind, argument))
            sandbox.probe()
        except SandboxUnavailable as error:
            reasons.append(f"{kind}: {error}")
        else:
            atexit.register(sandbox.close)
            return _Shared(sandbox)
    tried = "; ".join(reasons)
    raise SandboxUnavailable(
        f"no sandbox works here ({tried}). Install bubblewrap, name a container image with sandbox=container:IMAGE, or "
        "type sandbox=none to run code without any isolation."
    )
