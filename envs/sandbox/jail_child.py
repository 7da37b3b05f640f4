"""Inside the sandbox: a zygote that forks a child for every run, watches it, and reports what happened.

    parent (envs/sandbox/zygotes.py)  --request-->  zygote  --fork-->  child: gives up its rights, runs the source
                           <--reply----          <--pipes--

Started without site packages and with an empty environment but for a fixed hash seed, so it holds no secret, has one
thread, and forking is safe and cheap. It never runs untrusted code itself and never believes the child: how a run ended
comes from the kernel. Only `value` comes from the child; it says what the code says and is no verdict.

Frames on both pipes: 4 bytes of length, then JSON; bytes are base64 in it. End of input ends the zygote and its child.
"""

import ast
import base64
import contextlib
import functools
import gc
import importlib
import json
import linecache
import os
import random
import resource
import select
import selectors
import shutil
import signal
import stat
import struct
import sys
import sysconfig
import time
import traceback
import types
from collections.abc import Iterator
from typing import Any, NoReturn

from envs.sandbox import confinement

VALUE_FD = 3
VALUE_BYTES = 1 << 20
"""Longest report of a value."""
SHOWN_CHARS = 4000
"""Longest repr of a value that is reported."""
MEMORY_EXIT = 77
"""Exit status for MemoryError."""
_TICK_S = 0.05
_MAX_FILES = 256
_SOURCE_NAME = "<code>"
_WARM = "bisect collections csv datetime decimal fractions functools heapq io itertools json math operator random re"
_WARM_TOO = "sqlite3 statistics string textwrap typing unicodedata"


def main() -> None:
    """The zygote; argv[1] is JSON: {"confine": "require" | "try" | "off", "base": folder}."""
    settings = json.loads(sys.argv[1])
    missing = confinement.missing_features() if settings["confine"] == "require" else []
    if missing:
        send(1, {"error": "; ".join(missing)})
        return
    os.makedirs(settings["base"], mode=0o700, exist_ok=True)
    for name in (_WARM + " " + _WARM_TOO).split():
        with contextlib.suppress(ImportError):  # a Python built without sqlite3, say
            importlib.import_module(name)
    readable_paths()  # this and the next are kept: no child has to work them out again
    confinement.landlock_abi()
    if confinement.has_seccomp():
        confinement.filter_program(confinement.machine())
    gc.collect()
    gc.freeze()  # or the child's first collection would copy every page
    send(1, {})
    try:
        while (request := receive(0)) is not None:
            send(1, serve(request, settings))
    finally:
        shutil.rmtree(settings["base"], ignore_errors=True)


def serve(request: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """One run, from its folder to its reply."""
    folder = os.path.join(settings["base"], "run")
    os.mkdir(folder, 0o700)
    try:
        for name, content in request["files"].items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(base64.b64decode(content))
        return run(request, folder, settings)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # never follows a symbolic link


def run(request: dict[str, Any], folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    limits = request["limits"]
    pipes = [os.pipe() for _ in range(3)]
    source_of_input = _input_file(request["stdin"])
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            become_child(source_of_input, [write for _, write in pipes], folder)
            if settings["confine"] != "off":
                set_limits(limits)
                confine_child(folder)
            run_source(request["source"], request["nonce"])
        except BaseException:  # the child must never go on as a second zygote
            traceback.print_exc()
            os._exit(1)
    os.setpgid(pid, pid)
    os.close(source_of_input)
    for _, write in pipes:
        os.close(write)
    caps = [limits["output_bytes"], limits["output_bytes"], VALUE_BYTES]
    watch = Watch([read for read, _ in pipes], caps, folder, limits["disk_bytes"])
    reason = watch.until_exit(pid, started + limits["wall_s"])
    kill_group(pid)
    _, status, usage = os.wait4(pid, 0)
    stdout, stderr, value = watch.finish()
    cpu_s = usage.ru_utime + usage.ru_stime
    return {
        "exit": reason or watch.flooded() or exit_kind(status, cpu_s, limits["cpu_s"]),
        "status": os.waitstatus_to_exitcode(status),
        "stdout": as_text(stdout),
        "stderr": as_text(stderr),
        "value": as_text(value),
        "files": collect_files(folder, limits["disk_bytes"]) if request["collect"] else {},
        "seconds": time.monotonic() - started,
        "cpu_seconds": cpu_s,
    }


class Watch:
    """Reads a child's pipes up to their caps, and ends it where it goes past a limit that the kernel does not know."""

    def __init__(self, pipes: list[int], caps: list[int], folder: str, disk_bytes: int) -> None:
        self._pipes, self._caps, self._folder, self._disk_bytes = pipes, caps, folder, disk_bytes
        self._read = [bytearray() for _ in pipes]
        self._selector = selectors.DefaultSelector()
        for index, pipe in enumerate(pipes):
            os.set_blocking(pipe, False)
            self._selector.register(pipe, selectors.EVENT_READ, index)

    def until_exit(self, pid: int, deadline: float) -> str:
        """Wait until the child ended; why it must be ended, or "" where it ended by itself. It is not reaped here."""
        with contextlib.suppress(OSError):  # no pidfd: the tick finds the end
            self._exit = os.pidfd_open(pid)
            self._selector.register(self._exit, selectors.EVENT_READ, None)
        parent = select.poll()
        parent.register(0, 0)  # tells of HUP alone: the parent is gone
        next_scan = 0.0
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            for key, _ in self._selector.select(min(_TICK_S, deadline - now)):
                if key.data is not None:
                    self._take(key.data)
            if self.flooded():
                return "output"
            if time.monotonic() >= next_scan:
                next_scan = time.monotonic() + _TICK_S
                if disk_use(self._folder) > self._disk_bytes:
                    return "disk"
            if parent.poll(0):
                return "timeout"
        return ""

    def flooded(self) -> str:
        return "output" if any(len(r) > cap for r, cap in zip(self._read, self._caps, strict=True)) else ""

    def finish(self) -> list[bytes]:
        """What is left in the pipes, cut at the caps. Somebody may still hold them open: never waits."""
        for index in range(len(self._pipes)):
            while self._take(index) and len(self._read[index]) <= self._caps[index]:
                pass
        self._selector.close()
        for pipe in self._pipes:
            os.close(pipe)
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._exit)
        return [bytes(r[:cap]) for r, cap in zip(self._read, self._caps, strict=True)]

    def _take(self, index: int) -> bool:
        """Read once; False where there is nothing more."""
        try:
            chunk = os.read(self._pipes[index], 65536)
        except BlockingIOError:
            return False
        if not chunk:
            with contextlib.suppress(KeyError):
                self._selector.unregister(self._pipes[index])
            return False
        if len(self._read[index]) <= self._caps[index]:
            self._read[index] += chunk
        return True


def exit_kind(status: int, cpu_s: float, cpu_limit_s: float) -> str:
    if os.WIFSIGNALED(status):
        return (
            "cpu" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) and cpu_s > cpu_limit_s - 0.2 else "signal"
        )
    return {0: "ok", MEMORY_EXIT: "memory"}.get(os.WEXITSTATUS(status), "error")


def kill_group(pid: int) -> None:
    """Before the leader is reaped: as long as it is a zombie its number cannot belong to anyone else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def disk_use(folder: str) -> int:
    """Bytes of the files in a folder; too many files count as too many bytes."""
    total = 0
    with os.scandir(folder) as entries:
        for count, entry in enumerate(entries):
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
            if count >= _MAX_FILES:
                return sys.maxsize
    return total


def collect_files(folder: str, limit_bytes: int) -> dict[str, str]:
    """Plain files of a run by name, base64, as many as fit. The run is over: nobody changes them any more."""
    files: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        # a FIFO would block, a link would read for the child what it may not read itself
        with contextlib.suppress(OSError, UnicodeError):
            name.encode()
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:
                status = os.fstat(descriptor)
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= limit_bytes:
                    limit_bytes -= status.st_size
                    files[name] = as_text(file.read(status.st_size))
    return files


# --- the child, before it gives up its rights ---


def become_child(stdin: int, writes: list[int], folder: str) -> None:
    os.setpgid(0, 0)
    confinement.die_with_parent()
    # the pipes' own numbers may be among 0..3: move everything out of the way first
    high = [os.dup(fd) for fd in (stdin, *writes)]
    while min(high) <= VALUE_FD:
        high = [os.dup(fd) for fd in high]
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(VALUE_FD + 1, 1 << 16)
    os.chdir(folder)
    os.umask(0o077)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [""]
    os.environ.clear()


def set_limits(limits: dict[str, Any]) -> None:
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    cpu_s = max(1, round(limits["cpu_s"]))
    for kind, value in {
        resource.RLIMIT_AS: mapped + limits["memory_bytes"],
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: limits["disk_bytes"],
        resource.RLIMIT_NOFILE: 16,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_STACK: 8 << 20,
        resource.RLIMIT_NPROC: 64,  # of the whole user, and not for root: matters where seccomp is missing
    }.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine_child(folder: str) -> None:
    """The zygote of a jail stands only where all of this can be done; elsewhere it adds to what is outside."""
    confinement.forbid_new_privileges()
    if confinement.landlock_abi() >= confinement.MIN_LANDLOCK_ABI:
        confinement.restrict_files(readable_paths(), folder)
    if confinement.has_seccomp():
        confinement.drop_capabilities()
        confinement.restrict_calls()


@functools.cache
def readable_paths() -> list[str]:
    """What Python reads while it runs: its library, shared objects, time zones."""
    paths = sysconfig.get_paths()
    return [
        *{paths["stdlib"], paths["platstdlib"]},
        *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo"),
        *("/dev/urandom", "/dev/zero"),
    ]


# --- the child, without rights ---


def run_source(source: str, nonce: str) -> NoReturn:
    """Run `source`, report the value of its last expression, and leave without a way back into our frames."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.cache[_SOURCE_NAME] = (len(source), None, source.splitlines(keepends=True), _SOURCE_NAME)
    status = 0
    random.seed(0)  # the same run gives the same transcript
    try:
        report(nonce, evaluate(source, module.__dict__))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except MemoryError:
        status = MEMORY_EXIT
        print("MemoryError", file=sys.stderr)
    except BaseException as error:  # untrusted code: whatever it raised is the run's result
        status = 1
        print_traceback(error)
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(status & 0xFF)


def evaluate(source: str, space: dict[str, Any]) -> Any:
    """Run it; the value of its last line where that is an expression, else None."""
    tree = ast.parse(source, _SOURCE_NAME)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, _SOURCE_NAME, "exec"), space)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), _SOURCE_NAME, "eval"), space)


def report(nonce: str, value: Any) -> None:
    """Write nonce, then {"shown": repr, "data": JSON data where it is such}."""
    if value is None:
        return
    shown = repr(value)
    if len(shown) > SHOWN_CHARS:
        shown = f"{shown[:SHOWN_CHARS]}... ({len(shown)} chars)"
    try:
        text = json.dumps({"shown": shown, "data": value})
    except (TypeError, ValueError, RecursionError):
        text = json.dumps({"shown": shown})
    data = memoryview((nonce + text).encode())
    while data:
        data = data[os.write(VALUE_FD, data) :]


def print_traceback(error: BaseException) -> None:
    """Without our own frames."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != _SOURCE_NAME:
        frames = frames.tb_next
    with contextlib.suppress(BaseException):  # hostile __str__
        traceback.print_exception(type(error), error, frames)
        sys.stderr.flush()


# --- frames ---


def receive(fd: int) -> dict[str, Any] | None:
    """The next request; None at the end of input."""
    header = b"".join(_exactly(fd, 4))
    if len(header) < 4:
        return None
    body = b"".join(_exactly(fd, struct.unpack("!I", header)[0]))
    return json.loads(body)


def send(fd: int, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    data = memoryview(struct.pack("!I", len(body)) + body)
    while data:
        data = data[os.write(fd, data) :]


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _exactly(fd: int, count: int) -> Iterator[bytes]:
    while count:
        chunk = os.read(fd, min(count, 1 << 20))
        if not chunk:
            return
        count -= len(chunk)
        yield chunk


def _input_file(content: str) -> int:
    """A descriptor to read a run's standard input from, without a writer that could block."""
    if not content:
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.memfd_create("stdin")
    os.write(descriptor, base64.b64decode(content))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
