"""Whoever starts vLLM's processes owns them: when it ends, however it ends, they end too. vLLM's own core does not.

The owner holds a fifo open as long as it lives, and a killed process closes it too. Its path reaches the processes
through their environment, so that they watch it before there is a model in them that could be called.
"""

import contextlib
import functools
import multiprocessing
import os
import select
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "SHOAL_VLLM_OWNER"
POLL_MS = 1000


def owner() -> str:
    """This process as an owner, for `watch`: its id, ":", and a fifo that it holds open until it ends."""
    return _hold(os.getpid())[0]


@functools.cache  # by process: one that was forked holds another
def _hold(pid: int) -> tuple[str, tempfile.TemporaryDirectory]:
    folder = tempfile.TemporaryDirectory(prefix="shoal-owner-")
    pipe = Path(folder.name, "owner")
    os.mkfifo(pipe)
    os.open(pipe, os.O_RDWR)
    return f"{pid}:{pipe}", folder


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """Processes that start meanwhile know their owner."""
    os.environ[VARIABLE] = owner()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)  # of no other child's business; two may have started at once


def watch_announced() -> None:
    """Watch the owner that was announced to this process, if one was."""
    watch(os.environ.get(VARIABLE, ""))


def watch(of: str) -> None:
    """End this process when its owner has ended. Does nothing the second time, and in the owner itself ("" too)."""
    pid, _, pipe = of.partition(":")
    if of and int(pid) != os.getpid():
        _watch(pipe, int(pid), os.getpid())


@functools.cache
def _watch(pipe: str, owner_pid: int, own_pid: int) -> None:
    parent = multiprocessing.parent_process()
    between = parent.pid if parent is not None and parent.pid not in (None, owner_pid) else 0
    threading.Thread(target=_end_with, args=(pipe, between), name="owner-watch", daemon=True).start()


def _end_with(pipe: str, between: int) -> None:
    """End when nobody holds `pipe` open any more, and the core between that process and this one with it."""
    with contextlib.suppress(FileNotFoundError):  # an owner that has ended took it away
        descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while _is_held(descriptor):
            poll.poll(POLL_MS)
    if between and os.getppid() == between:
        os.kill(between, signal.SIGKILL)
    os._exit(1)


def _is_held(descriptor: int) -> bool:
    try:
        return os.read(descriptor, 1) != b""
    except BlockingIOError:
        return True
