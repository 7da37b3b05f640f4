"""Endless training tasks and fixed held-out tasks, deterministic by seed and disjoint by content.

Training task i of a run is a pure function of (run seed, i), so a restart repeats nothing. Held-out tasks depend on the
evaluation seed alone. Their problems are compared by digest: a training candidate whose problem is held out is passed
over, whatever its seed.
"""

from collections.abc import Sequence

from conf.schema import CurriculumConfig
from envs.outcome import EnvHost
from envs.task import Task
from envs.tasks.curriculum import Curriculum, Draw, Outcome, TaskEntry, choose_entry, stable_hash

_BATCH = 64
_MOST_HELD_OUT = 100 * _BATCH


def make_task(
    entries: tuple[TaskEntry, ...], *, split: str, seed: int, counter: int, levels: Sequence[int] = ()
) -> Task:
    """Task `counter` of a split: the entry is drawn by weight, the problem's seed by hash. `levels`: the task has one
    of them, all alike; empty = the entry's own."""
    entry = choose_entry(entries, split=split, seed=seed, counter=counter)
    level = levels[stable_hash(split, seed, counter, "level") % len(levels)] if levels else entry.level
    return _task(Draw(entry=entry, level=level), split=split, seed=seed, counter=counter)


def _task(draw: Draw, *, split: str, seed: int, counter: int) -> Task:
    name = draw.entry.name
    source = counter if draw.problem is None else f"pool {draw.problem}"
    return Task(
        task_id=f"{split}/{name}/{counter}",
        env_id=draw.entry.env_id,
        env_name=name,
        seed=stable_hash(split, seed, name, draw.level, source) % 2**31,
        level=draw.level,
        kwargs=dict(draw.entry.kwargs),
    )


def counter_of(task: Task) -> int:
    """Its place among the candidates of its split: ids end in it."""
    return int(task.task_id.rsplit("/", 1)[1])


async def held_out_tasks(
    entries: tuple[TaskEntry, ...], host: EnvHost, *, count: int, seed: int, levels: Sequence[int] = ()
) -> dict[str, Task]:
    """`count` held-out tasks with distinct problems, by digest, in order. `levels`: see `make_task`.

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
        batch = [make_task(entries, split="eval", seed=seed, counter=counter + i, levels=levels) for i in range(_BATCH)]
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
        self,
        entries: tuple[TaskEntry, ...],
        host: EnvHost,
        *,
        seed: int,
        held_out: frozenset[str],
        counter: int = 0,
        curriculum: Curriculum | None = None,
    ) -> None:
        """`counter`: of the first candidate. Without a `curriculum` each task has its entry's own level."""
        self.curriculum = curriculum or Curriculum(entries, CurriculumConfig(), seed=seed)
        self._host = host
        self._seed = seed
        self._held_out = held_out
        self._fetched = counter
        self._ready: list[tuple[int, Draw, Task]] = []
        self._problems: dict[str, dict[int, int | None]] = {}
        self.counter = counter
        """Candidates given out or passed over so far."""
        self.passed_over = 0
        """Candidates whose problem is held out."""

    async def next(self) -> Task:
        """The next task, counted as dispatched. Raises ValueError when everything drawn is held out (the problem space
        is too small)."""
        candidates = 0
        while not self._ready:
            if candidates > _MOST_HELD_OUT:
                raise ValueError(f"{candidates} tasks in a row are held out: the environment has too few problems")
            candidates += await self._fetch()
        counter, draw, task = self._ready.pop(0)
        self.counter = counter + 1
        self.curriculum.dispatched(counter, task.env_name, task.level, draw.problem)
        return task

    async def _fetch(self) -> int:
        """Draw candidates and keep those that are not held out; returns how many were drawn. Draws that go by outcomes
        are made one at a time, with all the outcomes there are."""
        counters = range(self._fetched, self._fetched + (1 if self.curriculum.adapts else _BATCH))
        draws = [self.curriculum.draw(counter) for counter in counters]
        tasks = [
            _task(draw, split="train", seed=self._seed, counter=counter)
            for counter, draw in zip(counters, draws, strict=True)
        ]
        digests = await self._host.digests(tasks)
        for counter, draw, task, digest in zip(counters, draws, tasks, digests, strict=True):
            if digest in self._held_out:
                self.passed_over += 1
            else:
                self._ready.append((counter, draw, task))
        self._fetched = counters.stop
        return len(counters)

    def adopt(self, task: Task) -> None:
        """Count a task as dispatched that an earlier process was given. Tasks come in the order of their counters."""
        self.curriculum.dispatched(counter_of(task), task.env_name, task.level, self._problem_of(task))

    def _problem_of(self, task: Task) -> int | None:
        """Its place in the pool, found by its seed; None for a task of no pool."""
        if task.env_name not in self._problems:
            self._problems[task.env_name] = {
                _task(draw, split="train", seed=self._seed, counter=0).seed: draw.problem
                for draw in self.curriculum.pool(task.env_name)
            }
        return self._problems[task.env_name].get(task.seed)

    def settled(self, task: Task, outcome: Outcome) -> None:
        """A task given out by `next` has come to its end: trained on, dropped or failed."""
        self.curriculum.record(counter_of(task), outcome)
