"""GridQuest-v0: fetch the key that fits, mind the doors, walk to the locked exit. Only getting out counts.

What is seen is a list of things with their way from you: "exit k n2 k e1s1 m w1" is an exit with lock k two steps
north, key k one east and one south, key m one west. Keys that you hold stand in front ("+k"). Level 0 is an open field
of 5 x 5 and needs 3 to 5 calls. From level 1 on the grid is a maze (open ways come first, as in "nes|"), things show
within 4 steps only, except the exit, and doors, each with a lock, cut it into parts; a maze of level 9 needs 60 to 230
calls. Level 0 has more than 100,000 problems.
"""

import random
from collections import deque
from functools import cache
from typing import Any, ClassVar, Literal

from envs.base import AgentEnv, Oracle, call, say
from envs.task import Problem
from envs.tool import tool

Cell = tuple[int, int]
"""(steps east, steps south) of the north-western corner."""
Way = Literal["n", "e", "s", "w"]
STEPS: dict[Way, Cell] = {"e": (1, 0), "w": (-1, 0), "n": (0, -1), "s": (0, 1)}
LETTERS = "abcdfghijklmopqrtuvxyz"
"""Of keys and locks: those that are no way."""
SIGHT = 4


class GridQuest(AgentEnv):
    """Walk to the exit. Reward 1 iff the episode ends there."""

    inline: ClassVar[bool] = True

    def __init__(self, *, max_turns: int | None = None, **kwargs: Any) -> None:
        super().__init__(max_turns=max_turns, **kwargs)
        self._given_max_turns = max_turns

    def task(self, rng: random.Random, level: int) -> Problem:
        self.max_turns = self._given_max_turns or 10 + 54 * level
        fewest, most = (3, 5) if level == 0 else (6 * level, 44 * level)
        while True:
            self._draw_grid(rng, level)
            self.calls = self._plan()
            if fewest <= len(self.calls) <= most:
                break
        self._hidden = repr((self.here, self.exit, self.keys, self.locks, sorted(self.passages)))
        return Problem(prompt=self._view(), meta={"needs_tool": True, "fewest_calls": len(self.calls)})

    def _draw_grid(self, rng: random.Random, level: int) -> None:
        """Set `size`, `passages` (pairs of cells), `keys` and `locks` (cell -> letter), `here`, `exit`, `held`."""
        self.size, self.held = 5 if level == 0 else 3 + level, []
        cells = [(x, y) for x in range(self.size) for y in range(self.size)]
        self.passages = draw_maze(rng, cells) if level else open_field(self.size)
        letters = iter(rng.sample(LETTERS, len(LETTERS)))
        self.here = rng.choice(cells)
        free = [cell for cell in cells if cell != self.here and (level > 0 or distance(self.here, cell) <= 3)]
        rng.shuffle(free)
        self.exit = free[0]
        way = self._path(self.here, self.exit, blocked=set())
        doors = [*rng.sample(way[:-1], min(len(way) // 4, level // 2)), self.exit]
        doors.sort(key=way.index)
        self.locks = {door: next(letters) for door in doors}
        self.keys: dict[Cell, str] = {}
        free = [cell for cell in free if cell not in doors]
        for index, door in enumerate(doors):  # its key lies before it
            cell = next((c for c in free if self._path(self.here, c, blocked=set(doors[index:]))), None)
            if cell is not None:
                free.remove(cell)
                self.keys[cell] = self.locks[door]
        for cell in free[: 1 + level // 2]:  # keys that fit nothing
            self.keys[cell] = next(letters)

    @tool(inline=True)
    def go(self, way: Way) -> str:
        """Walk one step; a lock opens for who holds its key. Answers with what you see."""
        there = (self.here[0] + STEPS[way][0], self.here[1] + STEPS[way][1])
        if (self.here, there) not in self.passages:
            raise ValueError("wall")
        if there in self.locks and self.locks[there] not in self.held:
            raise ValueError("locked")
        self.here = there
        return self._view()

    @tool(inline=True)
    def take(self) -> str:
        """Pick up the key that lies here."""
        if self.here not in self.keys:
            raise ValueError("no key here")
        self.held.append(self.keys.pop(self.here))
        return self._view()

    def _view(self) -> str:
        """Open ways, held keys, then the exit and what is near, each with its way from here."""
        seen = [("exit " + self.locks[self.exit], self.exit)]
        seen += [(f"door {letter}", cell) for cell, letter in self.locks.items() if cell != self.exit]
        seen += [(letter, cell) for cell, letter in self.keys.items()]
        shown = [
            f"{name} {offset_text(self.here, cell)}"
            for name, cell in seen
            if cell == self.exit or self.level == 0 or distance(self.here, cell) <= SIGHT
        ]
        open_cells = [cell for cell in around(self.here) if (self.here, cell) in self.passages]
        open_ways = "".join(ways(self.here, [cell])[0] for cell in open_cells) + "|"
        return " ".join([*([open_ways] if self.level else []), *(f"+{letter}" for letter in self.held), *shown])

    def reward(self, answer: str) -> dict[str, float]:
        return {"out": float(self.here == self.exit)}

    def hidden_state(self) -> str:
        return self._hidden

    # --- the way out ---

    def _path(self, start: Cell, end: Cell, *, blocked: set[Cell]) -> list[Cell]:
        """Cells after `start` up to `end` on a shortest way, or nothing where there is none."""
        before: dict[Cell, Cell] = {start: start}
        queue = deque([start])
        while queue and end not in before:
            cell = queue.popleft()
            for there in around(cell):
                if (cell, there) in self.passages and there not in before and there not in blocked:
                    before[there] = cell
                    queue.append(there)
        path = []
        while end in before and end != start:
            path.append(end)
            end = before[end]
        return path[::-1]

    def _plan(self) -> list[str]:
        """Calls that lead out, as "take" and ways; the keys in order of their doors. Empty where a key is missing."""
        here, calls, shut = self.here, [], dict(self.locks)
        cell_of_key = {letter: cell for cell, letter in self.keys.items()}
        for door, letter in self.locks.items():
            if letter not in cell_of_key:
                return []
            cell = cell_of_key[letter]
            path = self._path(here, cell, blocked=set(shut))
            calls += [*ways(here, path), "take"]
            here = cell
            del shut[door]
        return calls + ways(here, self._path(here, self.exit, blocked=set()))

    def oracle(self) -> Oracle:
        return self.follow(self.calls)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right; 20% each take a key that does not fit and stop, stop with the first key, make for the exit."""
        choice = rng.random()
        if choice < 0.40:
            return self.oracle()
        if choice < 0.60:
            fitting = set(self.locks.values())
            wrong = [cell for cell, letter in self.keys.items() if letter not in fitting]
            path = next((path for cell in wrong if (path := self._path(self.here, cell, blocked=set(self.locks)))), [])
            return self.follow([*ways(self.here, path), "take"])
        if choice < 0.80:
            return self.follow(self.calls[: self.calls.index("take") + 1])
        blocked = set(self.locks) - {self.exit}
        return self.follow(ways(self.here, self._path(self.here, self.exit, blocked=blocked)))

    def follow(self, calls: list[str]) -> Oracle:
        for name in calls:
            yield call("take") if name == "take" else call("go", way=name)
        yield say("done")


def around(cell: Cell) -> list[Cell]:
    return [(cell[0] + x, cell[1] + y) for x, y in STEPS.values()]


def distance(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def offset_text(here: Cell, there: Cell) -> str:
    """Example: from (2, 2) to (3, 0) it is "e1n2"; "here" on the spot."""
    east, south = there[0] - here[0], there[1] - here[1]
    text = f"{'e' if east > 0 else 'w'}{abs(east)}" if east else ""
    return text + (f"{'s' if south > 0 else 'n'}{abs(south)}" if south else "") or "here"


def ways(start: Cell, path: list[Cell]) -> list[str]:
    """The steps of a path. Example: from (0, 0) along (1, 0), (1, 1): ["e", "s"]."""
    way_of = {step: way for way, step in STEPS.items()}
    return [way_of[b[0] - a[0], b[1] - a[1]] for a, b in zip([start, *path], path, strict=False)]


@cache
def open_field(size: int) -> frozenset[tuple[Cell, Cell]]:
    cells = {(x, y) for x in range(size) for y in range(size)}
    return frozenset((cell, there) for cell in cells for there in around(cell) if there in cells)


def draw_maze(rng: random.Random, cells: list[Cell]) -> frozenset[tuple[Cell, Cell]]:
    """A random spanning tree, grown depth first: one way between any two cells, so every door cuts the maze."""
    inside, stack = set(cells), [rng.choice(cells)]
    seen, passages = set(stack), set()
    while stack:
        fresh = [there for there in around(stack[-1]) if there in inside and there not in seen]
        if not fresh:
            stack.pop()
            continue
        there = rng.choice(fresh)
        passages |= {(stack[-1], there), (there, stack[-1])}
        seen.add(there)
        stack.append(there)
    return frozenset(passages)
