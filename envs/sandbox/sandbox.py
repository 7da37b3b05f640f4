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
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from envs.sandbox.limits import Execution, Limits, SandboxUnavailable
from envs.sandbox.zygotes import ZygotePool, launcher_of
from envs.worker_thread import run_sync

KINDS = ("jail", "bwrap", "container", "none")
_GRACE_S = 60.0
"""How long a run may wait for a free slot, in synchronous code."""


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
