"""Probes of repetition: the same seed, another one, another process, a hundred at once; and what is left behind."""

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice, takewhile

from envs.check.probe_process import INSTANCES
from envs.check.scripted_policies import replay
from envs.check.subject import Failure, Hung, Subject

CONCURRENT = 100
"""Instances that are played at once."""
_PROCESS_TIMEOUT_S = 180.0


async def same_seed(subject: Subject) -> Failure | None:
    """One instance: a task, another one, the first one again."""
    for seed, level in subject.sampled_tasks:
        env = await subject.open()
        try:
            first = await subject.play_on(env, None, seed, level)
            await subject.play_on(env, None, seed + 1, level)
            again = await subject.play_on(env, None, seed, level)
        finally:
            await subject.close(env)
        difference = _difference(first.lines(), again.lines())
        if difference:
            return Failure(seed=seed, level=level, seen=f"reset a second time, {difference}")
    return None


async def replay_equals_live(subject: Subject) -> Failure | None:
    for seed, level in subject.sampled_tasks:
        live = await subject.oracle_episode(seed, level)
        again = await subject.play(replay(live.actions), seed, level)
        difference = "" if live.error else _difference(live.lines(), again.lines())
        if difference:
            return Failure(seed=seed, level=level, seen=f"the same messages on a new instance: {difference}")
    return None


async def other_seed(subject: Subject) -> Failure | None:
    seeds = range(max(20, len(subject.seeds)))
    for level in subject.levels:
        digests = [digest for seed in seeds if (digest := await _digest(subject, seed, level))]
        if len(set(digests)) < 0.8 * len(digests):
            times = f"{len(digests)} seeds gave {len(set(digests))} problems"
            return Failure(seed=0, level=level, seen=f"{times}; does hidden_state() tell what the prompt does not?")
    return None


async def _digest(subject: Subject, seed: int, level: int) -> str:
    """The problem's digest, or "" where reset raises."""
    env = await subject.open()
    try:
        return (await subject.reset(env, seed, level))[1]
    except Hung:
        raise
    except Exception:  # the author's code: `oracle` tells of it
        return ""
    finally:
        await subject.close(env)


async def isolation(subject: Subject) -> Failure | None:
    """Many oracles at once, their messages interleaved, beside what all environments of a process share."""
    tasks = list(islice(cycle(subject.sampled_tasks), CONCURRENT))
    alone = {task: (await subject.oracle_episode(*task)).lines() for task in tasks}
    with _shared_state() as changed, subject.untimed():
        episodes = await asyncio.gather(*(subject.play(None, seed, level) for seed, level in tasks))
    if changed:
        return Failure(seed=tasks[0][0], level=tasks[0][1], seen=f"it changed {changed[0]}")
    for (seed, level), episode in zip(tasks, episodes, strict=True):
        difference = _difference(alone[seed, level], episode.lines())
        if difference:
            return Failure(seed=seed, level=level, seen=f"among {len(tasks)} instances {difference}")
    return None


@contextmanager
def _shared_state() -> Iterator[list[str]]:
    """Yields a list that names, afterwards, what changed. A changed working directory is set back."""
    changed: list[str] = []
    before, folder = _snapshot(), os.getcwd()
    try:
        yield changed
    finally:
        after = _snapshot()
        changed += [what for what, value in after.items() if before.get(what, value) != value]
        os.chdir(folder)


def _snapshot() -> dict[str, object]:
    shared: dict[str, object] = {
        "the working directory": os.getcwd(),
        "the global random generator (use the rng that task() is given)": random.getstate(),
        "environment variables": dict(os.environ),
        "files in the working directory": sorted(os.listdir()),
    }
    if "numpy" in sys.modules:
        import numpy as np

        shared["numpy's global random generator"] = repr(np.random.get_state())
    return shared


def _difference(expected: list[str], found: list[str]) -> str:
    """The first line that differs, or ""."""
    if expected == found:
        return ""
    for one, other in zip(expected, found, strict=False):
        if one != other:
            return f"{_around(one, other)!r} became {_around(other, one)!r}"
    return f"{len(expected)} lines became {len(found)}"


def _around(text: str, other: str) -> str:
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))
    return text[max(0, start - 20) : start + 60]


# --- another process ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessReport:
    """What envs.check.probe_process said."""

    transcripts: dict[str, list[str]]
    leaks: dict[str, int]
    error: str


async def process_report(subject: Subject) -> ProcessReport:
    return await asyncio.to_thread(_ask_process, subject)


def _ask_process(subject: Subject) -> ProcessReport:
    levels, num_seeds = ",".join(map(str, subject.levels)), str(len(subject.seeds))
    command = [sys.executable, "-m", "envs.check.probe_process", subject.env_id, levels, num_seeds]
    with tempfile.TemporaryDirectory(prefix="shoal-check-") as folder:
        settings = {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1",
            "TMPDIR": folder,
        }
        try:
            done = subprocess.run(
                [*command, json.dumps(subject.kwargs)],
                env={**os.environ, **settings},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PROCESS_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return ProcessReport(transcripts={}, leaks={}, error=f"no end after {_PROCESS_TIMEOUT_S:g} s")
    if done.returncode != 0:
        return ProcessReport(transcripts={}, leaks={}, error=" ".join(done.stderr.split())[-300:])
    return ProcessReport(**json.loads(done.stdout.splitlines()[-1]), error="")


async def new_process(subject: Subject) -> Failure | None:
    report = await subject.once(process_report)
    if report.error:
        return Failure(seen=f"the new process failed: {report.error}")
    for seed, level in subject.sampled_tasks:
        here = (await subject.oracle_episode(seed, level)).lines()
        difference = _difference(here, report.transcripts[f"{level}/{seed}"])
        if difference:
            return Failure(seed=seed, level=level, seen=f"under another PYTHONHASHSEED {difference}")
    return None


async def close_leaves_nothing(subject: Subject) -> Failure | None:
    report = await subject.once(process_report)
    if report.error:
        return Failure(seen=f"the new process failed: {report.error}")
    left = {kind: count for kind, count in report.leaks.items() if count >= INSTANCES // 2}
    told = ", ".join(f"{count} more {kind}" for kind, count in left.items())
    return Failure(seen=f"{INSTANCES} closed instances left {told}") if left else None
