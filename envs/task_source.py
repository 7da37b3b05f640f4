"""Endless training tasks and fixed held-out tasks, deterministic by seed and disjoint by content.

Training task i of a run is a pure function of (run seed, i), so a restart repeats nothing. Held-out tasks depend on the
evaluation seed alone. Their problems are compared by digest: a training candidate whose problem is held out is passed
over, whatever its seed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from envs.outcome import EnvHost
from envs.task import Task

_BATCH = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEntry:
    """One environment tasks are drawn from."""

    name: str
    env_id: str
    weight: float
    level: int
    kwargs: Mapping[str, object]


def stable_hash(*parts: object) -> int:
    """A 63-bit integer that is the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def make_task(entries: tuple[TaskEntry, ...], *, split: str, seed: int, counter: int) -> Task:
    """Task `counter` of a split: the entry is drawn by weight, the problem's seed by hash."""
    point = stable_hash(split, seed, counter, "entry") / 2**63 * sum(entry.weight for entry in entries)
    chosen = entries[-1]
    for entry in entries:
        point -= entry.weight
        if point < 0:
            chosen = entry
            break
    return Task(
        task_id=f"{split}/{chosen.name}/{counter}",
        env_id=chosen.env_id,
        env_name=chosen.name,
        seed=stable_hash(split, seed, chosen.name, chosen.level, counter) % 2**31,
        level=chosen.level,
        kwargs=dict(chosen.kwargs),
    )


async def held_out_tasks(entries: tuple[TaskEntry, ...], host: EnvHost, *, count: int, seed: int) -> dict[str, Task]:
    """`count` held-out tasks with distinct problems, by digest, in order.

    Raises ValueError where an environment has too few distinct problems.
    """
    found: dict[str, Task] = {}
    counter = 0
    while len(found) < count:
        if counter > 20 * count + 1000:
            raise ValueError(
                f"only {len(found)} distinct problems in {counter} draws, {count} held-out ones asked for; "
                f"lower evaluation.tasks and evaluation.final_tasks or raise the level"
            )
        batch = [make_task(entries, split="eval", seed=seed, counter=counter + i) for i in range(_BATCH)]
        counter += _BATCH
        for task, digest in zip(batch, await host.digests(batch), strict=True):
            if len(found) < count:
                found.setdefault(digest, task)
    return found


class TaskSource:
    """Training tasks of a run, in order, none of them held out.

    Example: source = TaskSource(entries, host, seed=1, held_out=digests); task = await source.next()
    """

    def __init__(
        self, entries: tuple[TaskEntry, ...], host: EnvHost, *, seed: int, held_out: frozenset[str], counter: int = 0
    ) -> None:
        self._entries = entries
        self._host = host
        self._seed = seed
        self._held_out = held_out
        self._fetched = counter
        self._ready: list[tuple[int, Task]] = []
        self.counter = counter
        """Candidates given out or passed over so far: what a checkpoint stores."""
        self.passed_over = 0
        """Candidates whose problem is held out."""

    async def next(self) -> Task:
        """The next task. Raises ValueError when everything drawn is held out (the problem space is too small)."""
        draws = 0
        while not self._ready:
            batch = [
                make_task(self._entries, split="train", seed=self._seed, counter=self._fetched + i)
                for i in range(_BATCH)
            ]
            digests = await self._host.digests(batch)
            for i, (task, digest) in enumerate(zip(batch, digests, strict=True)):
                if digest in self._held_out:
                    self.passed_over += 1
                else:
                    self._ready.append((self._fetched + i + 1, task))
            self._fetched += _BATCH
            draws += 1
            if draws > 100:
                raise ValueError(f"{draws * _BATCH} tasks in a row are held out: the environment has too few problems")
        self.counter, task = self._ready.pop(0)
        return task
