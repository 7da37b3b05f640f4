"""Environments for whole runs that fail now and then, fail always, teach nothing or are slow; policies to play them."""

import asyncio
import math
import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from envs.base import AgentEnv
from policy.model.tokenizer import ByteTokenizer

HANG_S = 60.0


async def _raise() -> None:
    raise KeyError("missing shelf")


async def _exit() -> None:
    raise SystemExit(3)


async def _hang() -> None:
    await asyncio.sleep(HANG_S)


async def _nan() -> float:
    return math.nan


async def _none() -> None:
    return None


FAULTS: dict[str, Callable[[], Any]] = {"raises": _raise, "exits": _exit, "hangs": _hang, "nan": _nan, "none": _none}


class Fragile(AgentEnv):
    """Pays for "yes". Every fourth problem fails at `where` in the way of `how`, and every "crash" in its step."""

    inline: ClassVar[bool] = True
    every: ClassVar[int] = 4

    def __init__(self, *, where: str, how: str) -> None:
        super().__init__()
        self.where, self.how = where, how

    async def task(self, rng: random.Random, level: int) -> str:  # type: ignore[override]
        self.number = rng.randrange(10**9)
        if self.where == "reset" and self.number % self.every == 0:
            await FAULTS[self.how]()
        return str(self.number)

    async def on_message(self, text: str) -> None:
        if text == "crash":
            await _raise()
        if self.where == "step" and self.number % self.every == 0:
            await FAULTS[self.how]()

    async def reward(self, answer: str) -> Any:
        if self.where == "reward" and self.number % self.every == 0:
            return await FAULTS[self.how]()
        return float(answer == "yes")


class Hopeless(Fragile):
    """Fails on every problem."""

    every: ClassVar[int] = 1


class OneProblem(AgentEnv):
    """Far too few problems to hold any out; and only one level."""

    inline: ClassVar[bool] = True
    levels: ClassVar[int] = 1

    def task(self, rng: random.Random, level: int) -> str:
        return "always the same"

    def reward(self, answer: str) -> float:
        return 0.5


class Indifferent(OneProblem):
    """Pays the same for every answer."""

    def task(self, rng: random.Random, level: int) -> str:
        return str(rng.randrange(10**9))


class Wordy(OneProblem):
    """The problem is longer than the model's context."""

    def task(self, rng: random.Random, level: int) -> str:
        return "word " * 100 + str(rng.randrange(10**9))


class Slow(OneProblem):
    """The larger the problem's number the slower: up to 9 ms, and 50 times that for the problem of one seed."""

    def __init__(self, *, straggler_seed: int) -> None:
        super().__init__()
        self.straggler_seed = straggler_seed

    def task(self, rng: random.Random, level: int) -> str:
        self.number = rng.randrange(10**9)
        return str(self.number)

    async def on_message(self, text: str) -> None:
        latency_s = self.number % 10 / 1000
        await asyncio.sleep(0.45 if self.seed == self.straggler_seed else latency_s)

    def reward(self, answer: str) -> float:
        return float(len(answer) % 2)


def answers(*words: str) -> Callable[[np.ndarray, np.random.Generator], list[int]]:
    """A policy that answers with one of the words by chance."""
    tokenizer = ByteTokenizer()

    def script(prompt_ids: np.ndarray, rng: np.random.Generator) -> list[int]:
        return [*tokenizer.encode(str(rng.choice(words))), tokenizer.special_id("<end>")]

    return script


def answers_longer_for_larger_numbers(prompt_ids: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Length goes with the problem's latency in `Slow`, with some chance."""
    tokenizer = ByteTokenizer()
    last_digit = int(tokenizer.decode(prompt_ids.tolist()[1:-1])[-1])
    return [*tokenizer.encode("a" * (1 + 2 * last_digit + int(rng.integers(2)))), tokenizer.special_id("<end>")]


def broken_advantage(rewards: list[float | None]) -> list[float | None]:
    """A user's function with a bug."""
    raise TypeError("unsupported operand")
