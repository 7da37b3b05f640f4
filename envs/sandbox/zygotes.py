"""The parent's side of a sandbox: zygote processes, one run at a time in each, started when first needed.

Every kind of isolation runs the same zygote (jail_child.py); they differ in the command in front of it, and in
whether a zygote may serve a second run. The jail's may: each of its children gives up its own rights. Behind
bubblewrap or in a container every run gets a zygote of its own, so that nothing can be left behind in the namespaces.

Invariants: at most `slots` runs at once, the rest queue. A zygote that does not start, dies, hangs or answers nonsense
is killed and replaced, and its run is tried once more. Waits: a run waits for a slot, then for a reply until its own
`wall_s` plus a grace for a loaded machine.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import secrets
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from envs.sandbox import bubblewrap, container
from envs.sandbox.boot import BOOT, ENVIRONMENT, FLAGS
from envs.sandbox.limits import Execution, Limits, SandboxFault, SandboxUnavailable

logger = logging.getLogger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
MAX_SLOTS = 8
_START_TIMEOUT_S = 20.0
_REPLY_GRACE_S = 10.0
_PROBE_SOURCE = """
import os, socket
def refused(function, *args):
    try:
        function(*args)
    except OSError:
        return True
    return False
attempts = [(os.listdir, "/"), (os.fork,), (socket.socket, socket.AF_INET), (open, "/proc/self/environ")]
[refused(*attempt) for attempt in attempts]
"""
"""Asked of a jail before its first use: all four must be refused. (A fork that is not refused ends with its parent.)"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launcher:
    """How a kind of isolation starts a zygote."""

    kind: str
    confine: str
    """What the child does itself: "require" | "try" | "off"."""
    reusable: bool
    """Whether one zygote may serve more than one run."""
    command: Callable[[str, Path], list[str]]
    """(settings of the zygote as JSON, folder of ours) -> command line. Raises SandboxUnavailable."""
    inner_base: str = ""
    """Where the zygote makes its folders as seen from inside; empty = in the folder of ours."""


def launcher_of(kind: str, argument: str) -> Launcher:
    """`kind` as in envs.sandbox.sandbox.KINDS; `argument` is the image of a container."""
    if kind == "bwrap":
        return Launcher(kind=kind, confine="try", reusable=False, command=bubblewrap.command, inner_base="/tmp/runs")
    if kind == "container":
        command = container.command_for(argument)
        return Launcher(kind=kind, confine="try", reusable=False, command=command, inner_base="/tmp/runs")
    return Launcher(kind=kind, confine="require" if kind == "jail" else "off", reusable=True, command=_plain)


def _plain(settings: str, folder: Path) -> list[str]:
    return [sys.executable, *FLAGS, "-c", BOOT, str(_ROOT), settings]


class Zygote:
    """One process that serves runs one after the other. Used by one thread at a time."""

    def __init__(self, launcher: Launcher) -> None:
        """Raises SandboxUnavailable where it says why it cannot work, SandboxFault where it does not start."""
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-sandbox-"))
        base = launcher.inner_base or str(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        try:
            command = launcher.command(json.dumps({"confine": launcher.confine, "base": base}), self._folder)
            self._errors = (self._folder / "stderr").open("w+b")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
            hello = self._receive(time.monotonic() + _START_TIMEOUT_S)
        except (OSError, SandboxFault, SandboxUnavailable) as error:
            said = self._said()
            self.close()
            kind = SandboxUnavailable if isinstance(error, SandboxUnavailable) else SandboxFault
            raise kind(f"{error}{said}") from error
        if "error" in hello:
            self.close()
            raise SandboxUnavailable(hello["error"])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exchange(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout_s
        self._send(request, deadline)
        return self._receive(deadline)

    def close(self) -> None:
        """Kill it; its child dies with it. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()
            self._errors.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _said(self) -> str:
        """The end of what it wrote to standard error, for messages."""
        try:
            text = (self._folder / "stderr").read_text(errors="replace").strip()
        except OSError:
            return ""
        return f": {text[-300:]}" if text else ""

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        assert self._process is not None and self._process.stdin is not None
        body = json.dumps(message).encode()
        data, pipe = memoryview(struct.pack("!I", len(body)) + body), self._process.stdin.fileno()
        while data:
            self._wait(pipe, select.POLLOUT, deadline)
            try:
                data = data[os.write(pipe, data) :]
            except BrokenPipeError:
                raise SandboxFault("the sandbox's process ended") from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        (length,) = struct.unpack("!I", self._exactly(4, deadline))
        try:
            message = json.loads(self._exactly(length, deadline))
        except ValueError:
            raise SandboxFault("the sandbox's process answered nonsense") from None
        return message

    def _exactly(self, count: int, deadline: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        pipe, data = self._process.stdout.fileno(), bytearray()
        while len(data) < count:
            self._wait(pipe, select.POLLIN, deadline)
            chunk = os.read(pipe, min(count - len(data), 1 << 20))
            if not chunk:
                raise SandboxFault("the sandbox's process ended")
            data += chunk
        return bytes(data)

    def _wait(self, pipe: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise SandboxFault("the sandbox's process did not answer in time")


class ZygotePool:
    """A `Sandbox`: as many zygotes as runs at once, at most `slots`. Closed, it starts anew with the next run."""

    def __init__(self, launcher: Launcher, slots: int | None = None) -> None:
        self.kind = launcher.kind
        self.num_faults = 0
        """Zygotes that did not start, or that died or hung under a run."""
        self._launcher = launcher
        self._slots = min(MAX_SLOTS, max(2, os.cpu_count() or 1)) if slots is None else slots
        self._lock = threading.Lock()
        self._idle: list[Zygote] = []
        self._busy: set[Zygote] = set()
        self._threads: ThreadPoolExecutor | None = None

    def probe(self) -> None:
        """Start a zygote, and of a jail ask whether it really refuses. Raises SandboxUnavailable."""
        try:
            done = self._run(_PROBE_SOURCE, {}, b"", Limits(), False)
        except SandboxFault as fault:
            raise SandboxUnavailable(str(fault)) from fault
        finally:
            self.close()
        if self._launcher.confine == "require" and done.value != [True] * 4:
            raise SandboxUnavailable(f"it does not confine here: {done.value} {done.text[:200]}")
        if done.exit != "ok":
            raise SandboxUnavailable(f"a first run ended with {done.exit}: {done.stderr[-300:]}")

    async def run(
        self,
        source: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        stdin: str = "",
        limits: Limits | None = None,
        collect: bool = False,
    ) -> Execution:
        contents = {name: _as_bytes(content) for name, content in (files or {}).items()}
        for name in contents:
            if name in ("", ".", "..") or "/" in name or "\0" in name or len(name.encode("utf-8", "replace")) > 200:
                raise ValueError(f"{name!r} is no plain file name")
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._slots, thread_name_prefix="shoal-sandbox")
            job = self._threads.submit(self._run, source, contents, _as_bytes(stdin), limits or Limits(), collect)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        with self._lock:
            zygotes = [*self._idle, *self._busy]
            self._idle.clear()
            threads, self._threads = self._threads, None
        for zygote in zygotes:
            zygote.close()
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    # --- on a thread of the pool ---

    def _run(self, source: str, files: dict[str, bytes], stdin: bytes, limits: Limits, collect: bool) -> Execution:
        nonce = secrets.token_hex(16)
        request = {
            # json must be able to encode it, and the child to compile it: half surrogate pairs are no source
            "source": source.encode("utf-8", "replace").decode(),
            "files": {name: base64.b64encode(content).decode() for name, content in files.items()},
            "stdin": base64.b64encode(stdin).decode(),
            "limits": asdict(limits),
            "nonce": nonce,
            "collect": collect,
        }
        for attempt in (1, 2):
            zygote: Zygote | None = None
            try:
                zygote = self._take()
                reply = zygote.exchange(request, limits.wall_s + _REPLY_GRACE_S)
                self._give_back(zygote)
                return _execution(reply, nonce)
            except SandboxFault as fault:
                self.num_faults += 1
                self._drop(zygote)
                logger.warning("sandbox: %s (attempt %d)", fault, attempt)
                if attempt == 2:
                    raise
            except BaseException:  # cancelled too: a zygote in the middle of a run is of no use to the next
                self._drop(zygote)
                raise
        raise AssertionError("unreachable")

    def _take(self) -> Zygote:
        with self._lock:
            zygote = self._idle.pop() if self._idle else None
        zygote = zygote or Zygote(self._launcher)
        with self._lock:
            self._busy.add(zygote)
        return zygote

    def _give_back(self, zygote: Zygote) -> None:
        if not self._launcher.reusable:
            return self._drop(zygote)
        with self._lock:
            self._busy.discard(zygote)
            self._idle.append(zygote)

    def _drop(self, zygote: Zygote | None) -> None:
        """None where it did not even start."""
        if zygote is None:
            return
        with self._lock:
            self._busy.discard(zygote)
        zygote.close()


def _execution(reply: dict[str, Any], nonce: str) -> Execution:
    """Raises SandboxFault where the zygote's reply has not the agreed form."""
    try:
        shown, value = _value(base64.b64decode(reply["value"]), nonce.encode())
        return Execution(
            exit=reply["exit"],
            stdout=base64.b64decode(reply["stdout"]).decode("utf-8", "replace"),
            stderr=base64.b64decode(reply["stderr"]).decode("utf-8", "replace"),
            value=value,
            shown=shown,
            files={name: base64.b64decode(content) for name, content in reply["files"].items()},
            seconds=reply["seconds"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SandboxFault(f"the sandbox's process answered nonsense: {error}") from error


def _value(report: bytes, nonce: bytes) -> tuple[str, Any]:
    """(repr, data) of a child's report; whatever the child wrote there, this does not raise."""
    if not report.startswith(nonce):
        return "", None
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(report[len(nonce) :])
        if isinstance(said, dict):
            return str(said.get("shown", "")), said.get("data")
    return "", None


def _as_bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "replace")
