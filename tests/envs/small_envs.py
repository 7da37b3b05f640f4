"""Small environments for tests of the contract, the pool and the registry: good ones, and faults of authors.

Named "tests.envs.small_envs:Class". Those that the checker is tried on are in tests/envs/checker_envs.py.
"""

import asyncio
import math
import random
import sqlite3
import threading
import time
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.task import Problem
from envs.tool import tool


class Doubling(AgentEnv):
    """Blocking author code on purpose: not inline, so everything runs on the environment's thread."""

    max_turns = 4
    parallel_calls: ClassVar[bool] = True

    def task(self, rng: random.Random, level: int) -> Problem | str:
        self.number = rng.randint(1, 10 ** (level + 2))
        self.threads = {threading.current_thread()}
        return f"double {self.number}"

    @tool
    def add(self, a: int, b: int = 0) -> int:
        """Add two integers."""
        self.threads.add(threading.current_thread())
        return a + b

    @tool
    def fail(self) -> str:
        raise KeyError("shelf")

    @tool
    async def nap(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return f"slept {seconds:g}"

    @tool(timeout_s=0.05)
    def hang(self) -> str:
        time.sleep(1.0)
        return "never seen"

    @tool
    def shout(self) -> str:
        return "x" * 5000

    @tool
    def odd(self, function: str, inline: bool, args: int) -> str:
        return f"{function} {inline} {args}"

    def reward(self, answer: str) -> object:
        self.threads.add(threading.current_thread())
        return {"answer": float(answer == str(2 * self.number)), "style": -0.25}

    def oracle(self) -> Oracle:
        replies = yield call("add", a=self.number, b=self.number)
        yield say(replies[0].text)


class LeavesAThread(Doubling):
    """Holds a usual end of its process up for five minutes."""

    def task(self, rng: random.Random, level: int) -> Problem | str:
        threading.Thread(target=time.sleep, args=(300,)).start()
        return super().task(rng, level)


class OneAtATime(Doubling):
    parallel_calls: ClassVar[bool] = False


class SketchShop(AgentEnv):
    """sqlite made in task() with its default of one thread, as an author would write it."""

    def task(self, rng: random.Random, level: int) -> str:
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table orders(amount int)")
        self.db.execute("insert into orders values (?)", (rng.randint(1, 9),))
        self.gold = self.db.execute("select sum(amount) from orders").fetchone()[0]
        return "total?"

    @tool
    def sql(self, query: str) -> list:
        return [list(row) for row in self.db.execute(query)]

    def reward(self, answer: str) -> float:
        return float(answer == str(self.gold))

    def oracle(self) -> Oracle:
        replies = yield call("sql", query="select sum(amount) from orders")
        yield say(replies[0].text.strip("[]"))

    def close(self) -> None:
        self.db.close()
        super().close()


class Chatty(AgentEnv):
    """A scripted user who answers once."""

    def task(self, rng: random.Random, level: int) -> str:
        self.told = False
        return "hello"

    def on_message(self, text: str) -> str | None:  # type: ignore[override]
        if self.told:
            return None
        self.told = True
        return "and now?"

    async def reward(self, answer: str) -> float:
        await asyncio.sleep(0)
        return float(answer == "bye")


class RaisesInTask(AgentEnv):
    def task(self, rng: random.Random, level: int) -> str:
        print("this environment prints")
        return str({}["missing shelf"])

    def reward(self, answer: str) -> float:
        return 0.0


class RaisesInInit(RaisesInTask):
    def __init__(self) -> None:
        raise OSError("no such data set")


class GarbageTask(RaisesInTask):
    def task(self, rng: random.Random, level: int) -> str:
        return None  # type: ignore[return-value]


class UnsendableMeta(RaisesInTask):
    def task(self, rng: random.Random, level: int) -> Problem:
        return Problem(prompt="?", meta={"lock": threading.Lock()})


class HangsInTask(RaisesInTask):
    def task(self, rng: random.Random, level: int) -> str:
        time.sleep(1.0)
        return "late"


class HangsForGood(RaisesInTask):
    """Its thread is not free again before its process is to be."""

    tool_timeout_s = 0.05

    def __init__(self, *, in_task: bool = True) -> None:
        super().__init__()
        self.in_task = in_task

    def task(self, rng: random.Random, level: int) -> str:
        return self.hang() if self.in_task else "?"

    @tool
    def hang(self) -> str:
        time.sleep(60.0)
        return "late"


class Asks(AgentEnv):
    """Base of the ones below: a good task."""

    inline: ClassVar[bool] = True

    def task(self, rng: random.Random, level: int) -> str:
        return "?"

    def reward(self, answer: str) -> object:
        return 1.0


class ExitsInTask(Asks):
    def task(self, rng: random.Random, level: int) -> str:
        raise SystemExit(3)


class ExitsInTool(Asks):
    @tool
    def leave(self) -> str:
        raise SystemExit(3)


class CancelsInTool(Asks):
    @tool
    async def give_up(self) -> str:
        raise asyncio.CancelledError


class StubbornTool(Asks):
    @tool
    async def wait(self) -> str:
        while True:
            try:
                await asyncio.sleep(0.5)
                return "late"
            except asyncio.CancelledError:
                continue


class SlowTool(Asks):
    @tool
    async def wait(self) -> str:
        await asyncio.sleep(30)
        return "late"


class HangsInReward(Asks):
    inline: ClassVar[bool] = False

    def reward(self, answer: str) -> object:
        time.sleep(1.0)
        return 1.0


class SlowAsyncReward(Asks):
    async def reward(self, answer: str) -> object:
        await asyncio.sleep(30)
        return 1.0


class RewardOf(Asks):
    """Its reward is whatever the test asks for, by name."""

    def __init__(self, *, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def reward(self, answer: str) -> object:
        values = {"none": None, "nan": math.nan, "inf": math.inf, "text": "1.0", "empty": {}, "list": [1.0]}
        if self.kind == "raises":
            raise RuntimeError("judge is down")
        if self.kind == "nan part":
            return {"answer": 1.0, "style": math.nan}
        return values[self.kind]


class Submits(Asks):
    @tool
    def submit(self, answer: str) -> str:
        return answer


class NoTask(AgentEnv):
    def reward(self, answer: str) -> float:
        return 0.0


class NoReward(AgentEnv):
    def task(self, rng: random.Random, level: int) -> str:
        return "?"


class WrongTaskSignature(NoTask):
    def task(self, seed: int) -> str:  # type: ignore[override]
        return "?"


class UntypedTool(Asks):
    @tool
    def look(self, where) -> str:  # type: ignore[no-untyped-def]
        return where


class NotAnEnvironment:
    pass
