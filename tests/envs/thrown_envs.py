"""What an author's code may throw, wherever an author's code is run. Named "tests.envs.thrown_envs:Class"."""

import asyncio
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from envs.base import AgentEnv, Oracle, call, say
from envs.tool import tool


class Panic(BaseException):
    """As PyO3's PanicException: a Rust panic is no Exception."""


def _fail() -> None:
    pytest.fail("not an Exception either")


def _raising(error: type[BaseException]) -> Callable[[], None]:
    def throw() -> None:
        raise error("thrown")

    return throw


THROWS: dict[str, Callable[[], None]] = {
    "panic": _raising(Panic),
    "pytest": _fail,
    "exit": _raising(SystemExit),
    "interrupt": _raising(KeyboardInterrupt),
    "generator": _raising(GeneratorExit),
    "cancel": _raising(asyncio.CancelledError),
    "base": _raising(BaseException),
}
PLACES = ("construct", "task", "tools", "hidden_state", "tool", "on_message", "reward", "meta", "close")


class Thrower(AgentEnv):
    """Throws `what` at `where`, on its thread."""

    def __init__(self, *, where: str, what: str) -> None:
        super().__init__()
        self.where, self.what = where, what
        self._throw_at("construct")

    def _throw_at(self, where: str) -> None:
        if where == self.where:
            THROWS[self.what]()

    def task(self, rng: random.Random, level: int) -> str:
        self._throw_at("task")
        return f"say {rng.random()}"

    def tools(self) -> Any:
        self._throw_at("tools")
        return super().tools()

    def hidden_state(self) -> str:
        self._throw_at("hidden_state")
        return ""

    @tool
    def pull(self) -> str:
        """Pull."""
        self._throw_at("tool")
        return "pulled"

    def on_message(self, text: str) -> None:  # type: ignore[override]
        self._throw_at("on_message")

    def reward(self, answer: str) -> float:
        self._throw_at("reward")
        return float(answer == "yes")

    def meta(self) -> dict[str, Any]:
        self._throw_at("meta")
        return super().meta()

    def oracle(self) -> Oracle:
        yield call("pull")
        yield say("yes")

    def close(self) -> None:
        self._throw_at("close")
        super().close()


class InlineThrower(Thrower):
    """The same on the event loop."""

    inline: ClassVar[bool] = True


class AsyncThrower(Thrower):
    """The same from coroutines."""

    @tool
    async def pull(self) -> str:
        """Pull."""
        await asyncio.sleep(0)
        self._throw_at("tool")
        return "pulled"

    async def reward(self, answer: str) -> float:  # type: ignore[override]
        await asyncio.sleep(0)
        self._throw_at("reward")
        return float(answer == "yes")


class LeavesByExit(AgentEnv):
    """Its tool ends the program, as a script would."""

    levels: ClassVar[int] = 1

    def task(self, rng: random.Random, level: int) -> str:
        self.number = rng.randrange(10**6)
        return "guess"

    @tool
    def leave(self) -> str:
        """Leave."""
        raise SystemExit

    def reward(self, answer: str) -> float:
        return float(answer == str(self.number))

    def hidden_state(self) -> str:
        return str(self.number)

    def oracle(self) -> Oracle:
        yield call("leave")
        yield say(str(self.number))


class ThreadBound(AgentEnv):
    """sqlite as an author writes it: bound to the thread that made it. `nap` outlives its deadline by a while."""

    parallel_calls: ClassVar[bool] = True

    def task(self, rng: random.Random, level: int) -> str:
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table notes(text)")
        self.threads = {threading.get_ident()}
        self.running = self.most_running = 0
        return "?"

    @tool(timeout_s=0.05)
    def nap(self, seconds: float) -> str:
        """Sleep."""
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        time.sleep(seconds)
        self.running -= 1
        return "rested"

    @tool
    def note(self, text: str) -> int:
        """Write a note."""
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        self.threads.add(threading.get_ident())
        self.db.execute("insert into notes values (?)", (text,))
        self.running -= 1
        return self.db.execute("select count(*) from notes").fetchone()[0]

    def reward(self, answer: str) -> float:
        self.threads.add(threading.get_ident())
        return float(self.db.execute("select count(*) from notes").fetchone()[0] == 1)

    def close(self) -> None:
        self.db.close()
        super().close()


class ThreadGone(ThreadBound):
    """The thread never comes back within the environment's patience."""

    tool_timeout_s = 0.2


def sleeping_child() -> int:
    pid = os.fork()
    if pid == 0:
        time.sleep(300)
        os._exit(0)
    return pid


class Forks(AgentEnv):
    """Forks at `where` and forgets it; `pids` are told in the prompt, the tool's text and the reward's parts."""

    def __init__(self, *, where: str) -> None:
        super().__init__()
        self.where = where
        self.pids = [sleeping_child()] if where == "construct" else []

    def task(self, rng: random.Random, level: int) -> str:
        if self.where == "task":
            self.pids.append(sleeping_child())
        return "?"

    @tool
    def fork(self) -> str:
        """Fork."""
        if self.where == "tool":
            self.pids.append(sleeping_child())
        return self._told()

    @tool
    async def fork_async(self) -> str:
        """Fork on the event loop."""
        if self.where == "async tool":
            self.pids.append(sleeping_child())
        return self._told()

    @tool
    def daemon(self) -> str:
        """Fork twice, as daemons do: the child's child is nobody's."""
        if self.where != "daemon":
            return self._told()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.write(write, f"{sleeping_child()}".encode())
            os._exit(0)
        self.pids.append(int(os.read(read, 64)))
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        return self._told()

    def reward(self, answer: str) -> float:
        return 1.0

    def _told(self) -> str:
        return " ".join(map(str, self.pids))


class InlineForks(Forks):
    inline: ClassVar[bool] = True


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class SaysNothing(AgentEnv):
    """Its error has no text; its coroutine does not let itself be cancelled."""

    inline: ClassVar[bool] = True
    tool_timeout_s = 0.05

    def task(self, rng: random.Random, level: int) -> str:
        return "?"

    @tool
    def fail(self) -> str:
        """Fail."""
        raise Unspeakable

    @tool
    async def cling(self) -> str:
        """Never let go."""
        until = time.monotonic() + 20.0
        while time.monotonic() < until:
            try:
                await asyncio.sleep(0.5)
            except asyncio.CancelledError:
                continue
        return "late"

    def reward(self, answer: str) -> float:
        if answer == "fail":
            raise Unspeakable
        return 1.0
