"""A second process for the checker: `python -m envs.check.probe_process ID LEVELS NUM_SEEDS KWARGS`.

It plays the oracle under another PYTHONHASHSEED, and counts what closed instances leave behind, away from whatever else
runs in the checker's process. Its last line of output is a JSON object.
"""

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from envs.check.scripted_policies import always_call
from envs.check.subject import Hung, Subject

_WARM_INSTANCES = 3
"""Played before counting starts: what a library makes once for a process is no leak."""
INSTANCES = 8
_SETTLE_S = 3.0
"""How long threads and processes may take to end after close()."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphans of an environment become our children, so that they are counted


async def transcripts(subject: Subject) -> dict[str, list[str]]:
    """What the oracle's episodes look like here, by "level/seed"."""
    return {f"{level}/{seed}": (await subject.play(None, seed, level)).lines() for seed, level in subject.sampled_tasks}


async def leaks(subject: Subject) -> dict[str, int]:
    """What is left of INSTANCES closed environments, by kind; half of them were closed half-way."""
    for seed in range(_WARM_INSTANCES):
        await _use(subject, seed)
    before = await _settled(None)
    for seed in range(INSTANCES):
        await _use(subject, seed)
    after = await _settled(before)
    return {kind: after[kind] - before[kind] for kind in after}


async def _use(subject: Subject, seed: int) -> None:
    level = subject.levels[seed % len(subject.levels)]
    if seed % 2:
        await subject.play(None, seed, level)
        await subject.play(always_call(None), seed, level)
        return
    env = await subject.open()
    try:
        await subject.reset(env, seed, level)
        await subject.step(env, next(env.oracle()))
    except Hung:
        raise
    except Exception:  # the author's code: other probes tell of it
        return
    finally:
        await subject.close(env)


async def _settled(wanted: dict[str, int] | None) -> dict[str, int]:
    """Counts, once they are as low as wanted, or after a while."""
    deadline = time.monotonic() + (_SETTLE_S if wanted else 0.3)
    while True:
        gc.collect()
        counts = _counts()
        if time.monotonic() > deadline or (wanted and all(counts[kind] <= wanted[kind] for kind in counts)):
            return counts
        await asyncio.sleep(0.02)


def _counts() -> dict[str, int]:
    return {
        "open files": len(os.listdir("/dev/fd")),
        "threads": threading.active_count(),
        "processes": len(child_processes()),
        "temporary files": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


def child_processes() -> list[int]:
    """Process ids of our children. Empty where there is no /proc."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if int(parent) == os.getpid() and state != "Z":
            children.append(int(entry.parent.name))
    return children


async def _report(subject: Subject) -> dict[str, Any]:
    return {"transcripts": await transcripts(subject), "leaks": await leaks(subject)}


def main(words: list[str]) -> None:
    env_id, levels, num_seeds, kwargs = words
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    subject = Subject(
        env_id, levels=tuple(map(int, levels.split(","))), num_seeds=int(num_seeds), kwargs=json.loads(kwargs)
    )
    try:
        report = asyncio.run(_report(subject))
    finally:
        for child in child_processes():
            os.kill(child, signal.SIGKILL)
    print("\n" + json.dumps(report), flush=True)
    os._exit(0)  # leaked threads must not hold the process


if __name__ == "__main__":
    main(sys.argv[1:])
