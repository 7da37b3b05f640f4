"""The two shared tasks of `benchmarks.peers.task` as environments: same problems, same tool latency, same reward."""

import random
from typing import ClassVar

import gymnasium

from benchmarks.peers import task as shared
from envs.base import AgentEnv, Observation, say
from envs.message import Message
from envs.tool import tool


class _SharedTask(AgentEnv):
    """A problem of the shared module, scored by its reward."""

    kind: ClassVar[str]
    """Name of the task in the shared module."""
    inline: ClassVar[bool] = True
    levels: ClassVar[int] = 1
    num_results = 0
    """Tool messages so far."""

    def task(self, rng: random.Random, level: int) -> str:
        problem = shared.problem(self.kind, rng)
        self.right_answer: str = problem["answer"]
        self.num_results = 0
        return problem["prompt"]

    def reward(self, answer: str) -> float:
        return shared.reward(self.kind, self.right_answer, answer, self.num_results)

    async def respond(self, message: Message) -> tuple[Observation, bool, bool]:
        """As the peer does, take a call that cannot be read for plain text, which ends the episode."""
        if any(call.error for call in message.tool_calls):
            message = say(message.text)
        self.num_results += len(message.tool_calls)
        return await super().respond(message)


class Reverse(_SharedTask):
    """One turn: write three to five digits backwards."""

    kind = "reverse"
    max_turns = 1


class SumTool(_SharedTask):
    """Several turns: add two to five digits by calls of a slow tool, then say the sum.

    At most 5 rounds of calls, as the peer allows (max_tool_calling_iterations): with the answer 6 turns.
    """

    kind = "tool"
    max_turns = 6

    def __init__(self, *, latency: float = 1.0) -> None:
        """`latency` scales the shared module's distribution (median 150 ms) in this process; 0 = off."""
        super().__init__()
        shared.LAT.scale = latency

    @tool
    async def add(self, a: int, b: int) -> int:
        """Adds two integers."""
        return await shared.add_async(a, b)


gymnasium.register("Reverse-v0", entry_point="benchmarks.peers.shoal_env:Reverse")
gymnasium.register("SumTool-v0", entry_point="benchmarks.peers.shoal_env:SumTool")
