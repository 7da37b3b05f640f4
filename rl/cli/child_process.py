"""Runs this Python on a script or module of the project, and passes signals on."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130
STOP_DEADLINE_S = 180.0
"""A child that was told to stop may write its checkpoint for this long before it is killed."""


def run_python(arguments: Sequence[str]) -> int:
    """Wait for `python *arguments` and return its exit code, 130 after Ctrl-C.

    The child has a process group of its own, so that each Ctrl-C reaches it exactly once: a second means "at once".
    There is no deadline while nobody stops it: a run has its own.
    """
    checkout = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (checkout, os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.Popen([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path}, process_group=0)
    previous = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
    try:
        return _code(process.wait())
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        return _wait_for_stop(process)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _wait_for_stop(process: subprocess.Popen[bytes]) -> int:
    try:
        process.wait(STOP_DEADLINE_S)
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        process.kill()
        process.wait(10.0)
    return INTERRUPTED


def _code(returned: int) -> int:
    """As a shell tells it: 128 + n where signal n ended the child."""
    return returned if returned >= 0 else 128 - returned
