"""Environments for tests that take their tools from tests/envs/mcp_notes.py."""

import random
import sys
from pathlib import Path
from typing import Any, ClassVar

from envs.adapters.mcp import McpEnv
from envs.base import Oracle, call, say
from tests.envs.mcp_notes import make_server

COMMAND = [sys.executable, str(Path(__file__).parent / "mcp_notes.py")]


class CopyNote(McpEnv):
    """Read a note, write it back urgently, and say what it was. The server's own state is part of the reward."""

    servers: ClassVar = (make_server,)
    hidden: ClassVar = frozenset({"start", "die"})
    max_turns = 6
    tool_timeout_s = 3.0

    async def task(self, rng: random.Random, level: int) -> str:
        self.count = 2 + level
        self.index = rng.randrange(self.count)
        await self.call_server("start", seed=rng.randrange(2**31), count=self.count)
        return f"copy note {self.index}"

    async def reward(self, answer: str) -> float:
        return float((await self.call_server("read", index=self.count)) == answer.upper())

    def oracle(self) -> Oracle:
        note = (yield call("read", index=str(self.index)))[0].text  # as text: coerced by the server's schema
        yield call("write", text=note, urgent="true")
        yield say(note)


class CopyNoteOverStdio(CopyNote):
    servers: ClassVar = (COMMAND,)


class Mortal(CopyNote):
    """Its server can be killed by a call."""

    hidden: ClassVar = frozenset({"start"})

    def __init__(self, *, server: Any) -> None:
        super().__init__()
        self.servers = (server,)
