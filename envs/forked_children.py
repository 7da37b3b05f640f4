"""Processes that an environment's code forked, so that they end with the environment.

A forked child is a copy of the process that hosts hundreds of environments: it holds their sockets and files open, and
nobody else can tell whose it is. Each child therefore says that it is there, as the first thing it does, through a pipe
of the environment whose code runs; so do the children of children. A child that started another program (exec) is no
copy any more and is left to its author, for it may be a server that several environments share.
"""

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_HELLO_TIMEOUT_S = 1.0
_REAP_TIMEOUT_S = 1.0
_START_TIME, _START_STACK = 19, 25
"""Places in /proc/PID/stat, counted from the process's state: when it began, and where its stack did. A number that is
given to another process changes the first, an exec the second."""


class ForkedChildren:
    """What one environment's code forked. Linux alone; elsewhere nothing is known and nothing ended.

    Example: with children.watched(): author_code()     # then: children.end()
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._pipe: tuple[int, int] | None = None
        self._seen: dict[int, str] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whatever is forked meanwhile in this task or thread is ours."""
        _watch_forks()
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def end(self) -> None:
        """Kill those that still run, copies of this process alone, and reap them. Idempotent."""
        if os.getpid() != self._owner:
            return  # a forked child closes its copy of the environment: its sisters are not its own
        self._read_pipe()
        seen, self._seen = self._seen, {}
        pipe, self._pipe = self._pipe, None
        for end in pipe or ():
            os.close(end)
        running = [pid for pid, identity in seen.items() if _identity(pid) == identity]
        for pid in running:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in running:
            _reap(pid)

    def _before(self) -> None:
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _forking.said = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def _in_child(self) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):  # full: nobody reads so many
                os.write(self._pipe[1], f"{os.getpid()} {_identity(os.getpid())}\n".encode())
        os.write(_forking.said[1], b".")
        self._forget_said()

    def _in_parent(self) -> None:
        """Wait until the child has said so, which it does at once: the environment may be closed before it has run."""
        poll = select.poll()
        poll.register(_forking.said[0], select.POLLIN)
        poll.poll(_HELLO_TIMEOUT_S * 1000)
        self._forget_said()

    def _forget_said(self) -> None:
        for end in _forking.said:
            os.close(end)

    def _read_pipe(self) -> None:
        """Lines are short, so that each is written and read whole."""
        if self._pipe is None:
            return
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._pipe[0], 1 << 16):
                for line in data.decode().splitlines():
                    pid, identity = line.split(" ", 1)
                    self._seen[int(pid)] = identity


_current: ContextVar[ForkedChildren | None] = ContextVar("forked_children", default=None)
"""Of the environment whose code runs."""
_forking = threading.local()
"""`said`: the pipe through which the child of a fork tells the thread that forked it to go on."""


def _identity(pid: int) -> str:
    """Tells a process from a later one with the same number, and from itself after an exec; "" = it is gone."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            words = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{words[_START_TIME]}/{words[_START_STACK]}"


def _reap(pid: int) -> None:
    """Collect a killed process, or it would stay in the list of processes. It has ended within milliseconds."""
    until = time.monotonic() + _REAP_TIMEOUT_S
    with contextlib.suppress(ChildProcessError):  # a child's child is collected by the system
        while os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < until:
            time.sleep(0.001)


@functools.cache
def _watch_forks() -> None:
    """Once for a process, and only where an environment runs: a fork of ours costs one look at a variable."""
    if hasattr(os, "pipe2") and os.path.exists("/proc/self/stat"):
        os.register_at_fork(
            before=lambda: _tell(ForkedChildren._before),
            after_in_child=lambda: _tell(ForkedChildren._in_child),
            after_in_parent=lambda: _tell(ForkedChildren._in_parent),
        )


def _tell(moment: Callable[[ForkedChildren], None]) -> None:
    children = _current.get()
    if children is not None:
        moment(children)
