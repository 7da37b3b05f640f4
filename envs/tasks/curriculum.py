"""Which environment and level each training task has: a deterministic state machine without I/O or clock.

    draw(counter) --task--> dispatched(counter, ...) --group ends--> record(counter, outcome)

Statistics are kept per (environment, level) over every dispatched group: one that failed, was dropped or timed out
counts as not solved, for leaving it out would flatter hard levels. A decision never depends on the order of arrival
(short episodes come first): groups are looked at in the order of their dispatch, and one that is still out holds up
those behind it. What was decided is therefore a function of (groups dispatched, their outcomes) alone, and a run that
is resumed from an older state and told again what happened since stands where it stood.

Samplers
- fixed    the entry's own level
- uniform  all levels from min_level to max_level alike
- levels   60% frontier, 20% the level above, 20% those below; `floor` of the draws go to all levels alike. The frontier
           rises when the last `window` groups dispatched at it, since it stands there, succeed in `promote` or more of
           their trajectories, and falls at `demote` or less. A group dispatched at another level, or before the
           group that decided, never counts for the new frontier. Where the last `window` groups of the level above
           all came to nothing it is out of reach: the frontier does not rise, and three of four of its draws go to the
           frontier, until one succeeds. With `probe` all levels are drawn alike until that many groups of each are
           known; then the frontier is the highest level above `demote`.
- pool     `pool_size` problems of the entry's level in three classes by the success of their last group: hard (<= 0.25,
           weight 0.2), normal (<= 0.75 or not seen, weight 1), easy (weight 0.2)
"""

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.schema import CurriculumConfig

FRONTIER, NEXT, BELOW = 0.6, 0.2, 0.2
OUT_OF_REACH = 0.05
"""Share of the level above in place of NEXT while nothing succeeds there."""
HARD, EASY = 0.25, 0.75
OUTER_WEIGHT = 0.2
"""Weight of a hard or easy problem against a normal one."""
RECENT = 20
"""Groups per (environment, level) that metrics are taken from."""
FORMAT = 2
"""1 had neither probes nor levels out of reach; it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEntry:
    """One environment tasks are drawn from."""

    name: str
    env_id: str
    weight: float
    level: int
    kwargs: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What the next task shall be."""

    entry: TaskEntry
    level: int
    problem: int | None = None
    """Its place in the pool; None = a problem of its own, made from the counter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a dispatched group.

    Example: 16 trajectories, 4 solved, 2 failed: Outcome(success=0.25, flat=False)
    """

    success: float = 0.0
    """Solved trajectories / all its trajectories, failed ones included; 0 where the group came to nothing."""
    flat: bool = False
    """Its rewards are equal: nothing to learn from it."""


@dataclass(slots=True)
class _Group:
    counter: int
    outcome: Outcome | None = None
    """None while it is out."""


@dataclass(slots=True)
class _Climb:
    """Where an environment stands."""

    frontier: int
    seen: int = -1
    """Counter of the last group that was looked at; the frontier's groups behind it come next."""
    window: list[float] = field(default_factory=list)
    """Success of the frontier's last groups, at most `window` of them."""
    above: list[float] = field(default_factory=list)
    """Success of the last groups of the level above, at most `window` of them."""
    probing: bool = False
    """It is not known yet where the policy stands."""


def stable_hash(*parts: object) -> int:
    """A 63-bit integer that is the same in every process and on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def choose_entry(entries: Sequence[TaskEntry], *, split: str, seed: int, counter: int) -> TaskEntry:
    """One entry of a mix by weight; a function of its arguments alone."""
    point = stable_hash(split, seed, counter, "entry") / 2**63 * sum(entry.weight for entry in entries)
    for entry in entries:
        point -= entry.weight
        if point < 0:
            return entry
    return entries[-1]


class Curriculum:
    """Draws training tasks and learns from what became of them.

    Example: curriculum = Curriculum(entries, CurriculumConfig(sampler="levels"), seed=1); draw = curriculum.draw(0);
    curriculum.dispatched(0, draw.entry.name, draw.level); curriculum.record(0, Outcome(success=0.5))
    """

    def __init__(self, entries: Sequence[TaskEntry], config: CurriculumConfig, *, seed: int) -> None:
        self._entries = tuple(entries)
        self._config = config
        self._seed = seed
        self.levels = range(config.min_level, config.max_level + 1)
        """Levels that "uniform" and "levels" draw from."""
        self.next_counter = 0
        """One more than the counter of the last group dispatched."""
        probing = config.sampler == "levels" and config.probe > 0
        self._climbs = {entry.name: _Climb(self._first_level(entry), probing=probing) for entry in self._entries}
        self._groups: dict[tuple[str, int], deque[_Group]] = {}
        self._out: dict[int, tuple[str, int]] = {}
        self._problems: dict[tuple[str, int], dict[int, tuple[int, float]]] = {}  # problem -> (counter, success)
        self._problem_of: dict[int, int] = {}

    @property
    def adapts(self) -> bool:
        """Draws depend on outcomes, so they should be made as late as can be."""
        return self._config.sampler in ("levels", "pool")

    def frontier(self, name: str) -> int:
        """The environment's own level, but for sampler "levels"."""
        return self._climbs[name].frontier

    # --- a group's way ----------------------------------------------------------------------------------------------

    def draw(self, counter: int) -> Draw:
        """What task `counter` shall be; changes nothing."""
        entry = choose_entry(self._entries, split="train", seed=self._seed, counter=counter)
        if self._config.sampler == "uniform":
            return Draw(entry=entry, level=self.levels[self._pick(len(self.levels), counter, "level")])
        if self._config.sampler == "levels":
            return Draw(entry=entry, level=self._climbing_level(entry.name, counter))
        if self._config.sampler == "pool":
            return Draw(entry=entry, level=entry.level, problem=self._pooled_problem(entry, counter))
        return Draw(entry=entry, level=entry.level)

    def dispatched(self, counter: int, name: str, level: int, problem: int | None = None) -> None:
        """Count on the outcome of a group. Counters rise; one that is known already is passed over."""
        if counter < self.next_counter:
            return
        self.next_counter = counter + 1
        self._out[counter] = (name, level)
        self._groups.setdefault((name, level), deque()).append(_Group(counter))
        if problem is not None:
            self._problem_of[counter] = problem

    def record(self, counter: int, outcome: Outcome) -> None:
        """The end of a dispatched group; anything but its first outcome is passed over."""
        cell = self._out.pop(counter, None)
        if cell is None:
            return
        group = next(group for group in reversed(self._groups[cell]) if group.counter == counter)
        group.outcome = outcome
        if (problem := self._problem_of.pop(counter, None)) is not None:
            known = self._problems.setdefault(cell, {})
            known[problem] = max(known.get(problem, (-1, 0.0)), (counter, outcome.success))
        if self._config.sampler == "levels" and cell[0] in self._climbs:
            self._climb(cell[0])
        self._forget(cell)

    @property
    def awaited(self) -> frozenset[int]:
        """Counters of groups whose outcome is not known."""
        return frozenset(self._out)

    def pool(self, name: str) -> list[Draw]:
        """Every problem that "pool" draws for an environment; none with another sampler."""
        size = self._config.pool_size if self._config.sampler == "pool" else 0
        entries = [entry for entry in self._entries if entry.name == name]
        return [Draw(entry=entry, level=entry.level, problem=i) for entry in entries for i in range(size)]

    # --- levels -----------------------------------------------------------------------------------------------------

    def _first_level(self, entry: TaskEntry) -> int:
        return max(entry.level, self._config.min_level) if self._config.sampler == "levels" else entry.level

    def _climbing_level(self, name: str, counter: int) -> int:
        low, high, frontier = self.levels[0], self.levels[-1], self._climbs[name].frontier
        if self._climbs[name].probing:
            return self.levels[counter % len(self.levels)]
        point = self._point(counter, "role")
        if point < self._config.floor:
            return self.levels[self._pick(len(self.levels), counter, "level")]
        point = (point - self._config.floor) / (1 - self._config.floor)
        if point < (OUT_OF_REACH if self._is_capped(name) else NEXT):
            return min(frontier + 1, high)
        if NEXT <= point < NEXT + BELOW and frontier > low:
            return low + self._pick(frontier - low, counter, "level")
        return frontier

    def _climb(self, name: str) -> None:
        """Look at groups in the order of dispatch, as far as they are settled, and move the frontier."""
        climb, config = self._climbs[name], self._config
        if climb.probing and not self._place(name):
            return
        ahead = [
            (group.counter, level, group.outcome)
            for (entry, level), groups in self._groups.items()
            if entry == name
            for group in groups
            if group.counter > climb.seen
        ]
        for counter, level, outcome in sorted(ahead, key=lambda group: group[0]):
            if level not in (climb.frontier, climb.frontier + 1):
                continue
            if outcome is None:
                return
            climb.seen = counter
            if level > climb.frontier:
                climb.above = [*climb.above, outcome.success][-config.window :]
                continue
            climb.window = [*climb.window, outcome.success][-config.window :]
            if len(climb.window) < config.window:
                continue
            success = sum(climb.window) / config.window
            if success >= config.promote and climb.frontier + 1 in self.levels and not self._is_capped(name):
                climb.frontier, climb.window, climb.above = climb.frontier + 1, [], []
            elif success <= config.demote and climb.frontier - 1 in self.levels:
                climb.frontier, climb.window, climb.above = climb.frontier - 1, [], climb.window

    def _place(self, name: str) -> bool:
        """End the probe where the first `probe` groups of every level are settled, and tell."""
        climb, probe = self._climbs[name], self._config.probe
        first = {level: list(self._groups.get((name, level), ()))[:probe] for level in self.levels}
        if any(len(groups) < probe or any(g.outcome is None for g in groups) for groups in first.values()):
            return False
        climb.frontier = self.levels[0]
        for level, groups in first.items():
            if sum(g.outcome.success for g in groups if g.outcome) / probe > self._config.demote:
                climb.frontier = level
        climb.seen = max(group.counter for groups in first.values() for group in groups)
        climb.probing = False
        return True

    def _is_capped(self, name: str) -> bool:
        """The level above the frontier is out of reach."""
        above = self._climbs[name].above
        return len(above) == self._config.window and not any(above)

    def _forget(self, cell: tuple[str, int]) -> None:
        """Drop old groups that no decision will look at and no metric shows."""
        groups, seen = self._groups[cell], self._climbs[cell[0]].seen if cell[0] in self._climbs else -1
        decides = self._config.sampler == "levels"
        known = sum(group.outcome is not None for group in groups)
        while known > RECENT and groups[0].outcome is not None and (groups[0].counter <= seen or not decides):
            groups.popleft()
            known -= 1

    # --- pool -------------------------------------------------------------------------------------------------------

    def _pooled_problem(self, entry: TaskEntry, counter: int) -> int:
        known = self._problems.get((entry.name, entry.level), {})
        outer = sorted(problem for problem, (_, success) in known.items() if not HARD < success <= EASY)
        num_normal = self._config.pool_size - len(outer)
        normal_share = num_normal / (num_normal + OUTER_WEIGHT * len(outer))
        if self._point(counter, "class") >= normal_share:
            return outer[self._pick(len(outer), counter, "problem")]
        problem = self._pick(num_normal, counter, "problem")
        for other in outer:  # the problem-th one that is not in `outer`
            problem += other <= problem
        return problem

    # --- chance -----------------------------------------------------------------------------------------------------

    def _point(self, counter: int, what: str) -> float:
        return stable_hash("train", self._seed, counter, what) / 2**63

    def _pick(self, count: int, counter: int, what: str) -> int:
        return stable_hash("train", self._seed, counter, what) % count

    # --- metrics and checkpoints ------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Frontier, and success and share of flat groups by level over the last groups dispatched there."""
        found: dict[str, float] = {}
        for name, climb in self._climbs.items():
            found[f"curriculum/{name}/frontier"] = float(climb.frontier)
        for (name, level), groups in sorted(self._groups.items()):
            outcomes = [group.outcome for group in groups if group.outcome is not None][-RECENT:]
            if outcomes:
                found[f"curriculum/{name}/success/{level}"] = sum(o.success for o in outcomes) / len(outcomes)
                found[f"curriculum/{name}/zero_variance/{level}"] = sum(o.flat for o in outcomes) / len(outcomes)
        return found

    def state(self) -> dict[str, Any]:
        """All that draws and decisions depend on, as JSON."""
        return {
            "format": FORMAT,
            "next_counter": self.next_counter,
            "climbs": {name: [c.frontier, c.seen, c.window, c.above, c.probing] for name, c in self._climbs.items()},
            "groups": [
                [
                    name,
                    level,
                    [[g.counter, *([g.outcome.success, g.outcome.flat] if g.outcome else [])] for g in groups],
                ]
                for (name, level), groups in self._groups.items()
            ],
            "problems": [
                [name, level, [[problem, *last] for problem, last in known.items()]]
                for (name, level), known in self._problems.items()
            ],
            "problem_of": list(self._problem_of.items()),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Environments that left the mix and problems that left the pool are forgotten,
        a frontier outside the levels that the config names now moves inside."""
        if state["format"] not in (1, FORMAT):
            raise ValueError(f"curriculum state of format {state['format']!r}, this version reads 1 and {FORMAT}")
        self.next_counter = state["next_counter"]
        if self._config.sampler == "levels":
            for name, (frontier, seen, window, *later) in state["climbs"].items():
                if name in self._climbs:
                    above, probing = later or ([], False)  # older states have neither
                    inside = min(max(frontier, self.levels[0]), self.levels[-1])
                    if inside != frontier:
                        window, above = [], []
                    self._climbs[name] = _Climb(inside, seen, window, above, probing and self._config.probe > 0)
        for name, level, groups in state["groups"]:
            if name in self._climbs:
                self._groups[name, level] = deque(
                    _Group(counter, Outcome(success=known[0], flat=known[1]) if known else None)
                    for counter, *known in groups
                )
        self._out = {g.counter: cell for cell, groups in self._groups.items() for g in groups if g.outcome is None}
        self._problems = {
            (name, level): {p: (counter, success) for p, counter, success in rows if p < self._config.pool_size}
            for name, level, rows in state["problems"]
        }
        self._problem_of = {counter: problem for counter, problem in state["problem_of"] if counter in self._out}
