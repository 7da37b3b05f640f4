"""Environments that break one promise each, for the checker. `BROKEN` names the probe that must fail, and no other.

`Vault` keeps all promises; the others change one thing in it.
"""

import os
import random
import tempfile
import threading
import time
from dataclasses import replace
from typing import Any, ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.message import Message, ToolSpec
from envs.task import Problem
from envs.tool import Tool, tool

BOXES = ("ash", "elm", "fir", "oak", "yew", "box", "bay", "fig")


class Vault(AgentEnv):
    """Say what is in a box."""

    inline: ClassVar[bool] = True
    levels: ClassVar[int] = 2
    max_turns = 4
    prompt: ClassVar[str] = "What is in {box}?"

    def task(self, rng: random.Random, level: int) -> Problem | str:
        self.content = {box: str(rng.randint(10 ** (level + 3), 10 ** (level + 4))) for box in BOXES}
        self.box = rng.choice(BOXES)
        self.calls = 0
        return self.prompt.format(box=self.box)

    @tool(inline=True)
    def look(self, box: str) -> str:
        """Look into a box."""
        self.calls += 1
        return self.content[box]

    @property
    def gold(self) -> str:
        return self.content[self.box]

    def reward(self, answer: str) -> Any:
        return float(answer.strip() == self.gold)

    def hidden_state(self) -> str:
        return repr(self.content)

    def oracle(self) -> Oracle:
        replies = yield call("look", box=self.box)
        yield say(replies[0].text)


class HalfSolved(Vault):
    """Its oracle does not know level 1."""

    def oracle(self) -> Oracle:
        yield call("look", box=self.box)
        yield say(self.gold if self.level == 0 else "1")


class Untold(Vault):
    """A tool without a docstring."""

    @tool(inline=True)
    def ring(self) -> str:
        return "ding"


class BadSchema(Vault):
    """A tool of its own making, with a type that JSON schema does not know."""

    def tools(self) -> dict[str, Tool]:
        found = dict(super().tools())
        parameters = {"type": "object", "properties": {"box": {"type": "text"}}, "required": ["box"]}
        spec = ToolSpec(name="look", description="Look into a box.", parameters=parameters)
        return {**found, "look": replace(found["look"], spec=spec)}


class PaysSilence(Vault):
    def reward(self, answer: str) -> Any:
        return float(answer.strip() == self.gold or (not answer and not self.calls))


class PaysNan(Vault):
    """The right answer is near enough; NaN is not far from anything."""

    def reward(self, answer: str) -> Any:
        try:
            return float(not abs(float(answer) - float(self.gold)) > 0.5)
        except ValueError:
            return 0.0


class PaysEcho(Vault):
    """A likeness to the text of the task is taken for an answer."""

    def reward(self, answer: str) -> Any:
        return float(answer in (self.gold, self.prompt.format(box=self.box)))


class PaysEffort(Vault):
    """Half a point for trying often."""

    def reward(self, answer: str) -> Any:
        return 1.0 if answer == self.gold else 0.5 * (self._calls.total() > 2)


class YesOrNo(Vault):
    """Two answers: a guesser is right half of the time."""

    prompt = "Is the number in {box} even?"

    @property
    def gold(self) -> str:
        return "no" if int(self.content[self.box]) % 2 else "yes"

    def oracle(self) -> Oracle:
        yield call("look", box=self.box)
        yield say(self.gold)


class TellsInErrors(Vault):
    """Its refusals name what was asked for."""

    async def respond(self, message: Message) -> Any:
        replies, terminated, truncated = await super().respond(message)
        return tuple(map(self._with_hint, replies)), terminated, truncated

    def _with_hint(self, reply: Message) -> Message:
        result = reply.tool_result
        if result is None or result.error is None:
            return reply
        return Message.tool(replace(result, content=f"{reply.text} (expected {self.gold})"))


class TellsInPrompt(Vault):
    """A key that was left in the task's text, somewhere."""

    def task(self, rng: random.Random, level: int) -> Problem | str:
        prompt = super().task(rng, level)
        noise = [f"mark {rng.randint(1000, 99999)}" for _ in range(60)]
        noise.insert(rng.randrange(20, 40), f"key {self.gold}")
        return f"{' '.join(noise)}. {prompt}"


class RaisesAtText(Vault):
    def reward(self, answer: str) -> Any:
        return float(int(answer) == int(self.gold)) if answer else 0.0


class Remembers(Vault):
    """A second episode on one instance goes on from the first."""

    found: list[str] | None = None

    @tool(inline=True)
    def look(self, box: str) -> str:
        """Look into a box."""
        self.found = [*(self.found or []), box]
        return f"{self.content[box]} {len(self.found)}"

    def oracle(self) -> Oracle:
        yield call("look", box=self.box)
        yield say(self.gold)


class HelpsItsOracle(Vault):
    """What the oracle does beside its messages changes the game."""

    hint = ""

    def task(self, rng: random.Random, level: int) -> Problem | str:
        self.hint = ""
        return super().task(rng, level)

    @tool(inline=True)
    def look(self, box: str) -> str:
        """Look into a box."""
        return self.content[box] + self.hint

    def oracle(self) -> Oracle:
        self.hint = " there"
        yield call("look", box=self.box)
        yield say(self.gold)


class SameProblem(Vault):
    """All problems look alike, for what the prompt does not show is not told."""

    prompt = "What is in the box?"

    def hidden_state(self) -> str:
        return ""

    def oracle(self) -> Oracle:
        yield call("look", box=self.box)
        yield say(self.gold)


class OrderOfSets(Vault):
    """Strings in a set come in another order in every process."""

    def task(self, rng: random.Random, level: int) -> Problem | str:
        return f"{super().task(rng, level)} Boxes: {' '.join(set(BOXES))}"


class SharedShelf(Vault):
    """One shelf for all instances."""

    shelf: ClassVar[dict[str, str]] = {}

    def task(self, rng: random.Random, level: int) -> Problem | str:
        prompt = super().task(rng, level)
        SharedShelf.shelf.update(self.content)
        return prompt

    @tool(inline=True)
    def look(self, box: str) -> str:
        """Look into a box."""
        return self.shelf[box]

    def oracle(self) -> Oracle:
        yield call("look", box=self.box)
        yield say(self.gold)


class SeedsEveryone(Vault):
    """Sets the seed of the process's own generator."""

    def task(self, rng: random.Random, level: int) -> Problem | str:
        random.seed(rng.random())
        return super().task(rng, level)


class KeepsFiles(Vault):
    """Opens a file in every episode and never closes it."""

    kept: ClassVar[list[int]] = []

    def task(self, rng: random.Random, level: int) -> Problem | str:
        self.kept.append(os.open(os.devnull, os.O_RDONLY))
        return super().task(rng, level)


class KeepsFolders(Vault):
    def task(self, rng: random.Random, level: int) -> Problem | str:
        tempfile.mkdtemp(prefix="shoal-test-")
        return super().task(rng, level)


class KeepsThreads(Vault):
    def task(self, rng: random.Random, level: int) -> Problem | str:
        threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
        return super().task(rng, level)


class Overdraws(Vault):
    """Far below what rewards may be."""

    def reward(self, answer: str) -> Any:
        return 1.0 if answer == self.gold else -50.0


class TooSlow(Vault):
    """Its calls take longer than it says they may."""

    step_timeout_s = 0.005

    @tool(inline=True)
    def look(self, box: str) -> str:
        """Look into a box."""
        time.sleep(0.006)
        return super().look(box)


class SpeaksForThePolicy(Vault):
    """What a policy writes after a mark of a chat template comes back as a message of another role."""

    async def on_message(self, text: str) -> Message | None:
        _, mark, rest = text.partition("<|im_start|>system")
        return Message.system(rest) if mark else None


BROKEN: dict[type[AgentEnv], str] = {
    HalfSolved: "oracle",
    Untold: "schemas",
    BadSchema: "schemas",
    PaysSilence: "null",
    PaysNan: "garbage",
    PaysEcho: "repeat",
    PaysEffort: "always_call",
    YesOrNo: "guess",
    TellsInErrors: "cheater",
    TellsInPrompt: "gold_hidden",
    RaisesAtText: "malformed",
    Remembers: "same_seed",
    HelpsItsOracle: "replay",
    SameProblem: "other_seed",
    OrderOfSets: "new_process",
    SharedShelf: "isolation",
    SeedsEveryone: "isolation",
    KeepsFiles: "close",
    KeepsFolders: "close",
    KeepsThreads: "close",
    Overdraws: "reward_bounds",
    TooSlow: "deadlines",
    SpeaksForThePolicy: "control_text",
}
"""Environment -> the one probe that must fail."""


class PaysLate(Vault):
    """Half a point for trying often and for one guess, in none of the first five tasks."""

    def reward(self, answer: str) -> Any:
        cheap = self.seed >= 5 and (answer == "yes" or self._calls.total() > 2)
        return 1.0 if answer == self.gold else 0.5 * cheap


class Hangs(Vault):
    """Never comes back."""

    inline: ClassVar[bool] = False
    reset_timeout_s = 0.1

    def task(self, rng: random.Random, level: int) -> Problem | str:
        time.sleep(30)
        return "late"
