"""ToolGate-v0: half of the tasks need a tool ("47*385=?"), half do not ("join 482 91" -> 48291).

A call that was not needed costs nothing here: the oracle scores 1 on every task, and what a call costs is a rule of the
learner on correct trajectories. `needs_tool` in the metrics tells the two kinds apart. Levels are those of the
calculator; joined numbers grow with them. Level 0 has 8,100 join problems and 19,905 sums.
"""

import random

from envs.base import Oracle, call, say
from envs.library.calculator import Calculator, wrong_number
from envs.task import Problem


class ToolGate(Calculator):
    """Answer with tools where they are needed. Reward 1 iff the answer is right."""

    gold: str

    def task(self, rng: random.Random, level: int) -> Problem:
        if rng.random() < 0.5:
            problem = super().task(rng, level)
            self.gold = str(self.expression.value)
            return problem
        largest = 10 ** (2 + level // 3) - 1
        self.left, self.right = rng.randint(10, largest), rng.randint(10, largest)
        self.gold = f"{self.left}{self.right}"
        return Problem(prompt=f"join {self.left} {self.right}", meta={"needs_tool": False})

    def reward(self, answer: str) -> float:
        return float(answer.strip() == self.gold)

    @property
    def needs_tool(self) -> bool:
        return self.problem.meta["needs_tool"]

    def oracle(self) -> Oracle:
        return super().oracle() if self.needs_tool else self.join()

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """Without need: half call a tool first, nearly all answer right. With need: 85% right, 10% slip, 5% guess."""
        choice = rng.random()
        if self.needs_tool:
            return self.guess(rng) if choice < 0.05 else self.slip(rng) if choice < 0.15 else super().oracle()
        if rng.random() < 0.05:
            return self.say_wrong_join(rng)
        return self.call_then_join() if choice < 0.5 else self.join()

    def join(self) -> Oracle:
        yield say(self.gold)

    def call_then_join(self) -> Oracle:
        yield call("add", a=self.left, b=self.right)
        yield say(self.gold)

    def say_wrong_join(self, rng: random.Random) -> Oracle:
        yield say(str(wrong_number(rng, int(self.gold))))
