"""Calculator-v0: "47*385=?" must be answered through tools, of which one fits each operator.

Levels: 0-2 one operation, 3-5 two, 6-9 three, evaluated from left to right as bracketed; digits grow inside each band.
Level 0 has 19,905 problems.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.task import Problem
from envs.tool import tool

TOOL_OF_SYMBOL = {"+": "add", "-": "sub", "*": "mul"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """A chain of operations. Example: first=47, steps=(("*", 385), ("-", 12)), text "(47*385)-12", value 18083."""

    first: int
    steps: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        text = str(self.first)
        for index, (symbol, operand) in enumerate(self.steps):
            text = f"({text})" if index else text
            text += f"{symbol}{operand}"
        return text

    @property
    def value(self) -> int:
        value = self.first
        for symbol, operand in self.steps:
            value = apply(symbol, value, operand)
        return value


def apply(symbol: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[symbol]


def draw_expression(rng: random.Random, level: int) -> Expression:
    """Draw one whose value is positive and does not stand in its own text."""
    num_steps = 1 if level < 3 else 2 if level < 6 else 3
    largest = 10 ** (2 + level if level < 3 else 2 + level % 3) - 1
    while True:
        value = first = rng.randint(10, largest)
        steps = []
        for _ in range(num_steps):
            symbol, operand = rng.choice("+-*"), rng.randint(10, largest)
            if symbol == "-" and operand >= value:
                symbol = "+"
            steps.append((symbol, operand))
            value = apply(symbol, value, operand)
        expression = Expression(first=first, steps=tuple(steps))
        if str(value) not in expression.text:
            return expression


def wrong_number(rng: random.Random, right: int) -> int:
    """A wrong number with as many digits."""
    digits = len(str(right))
    while (guess := rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)) == right:
        pass
    return guess


class Calculator(AgentEnv):
    """Compute an expression. Reward 1 iff the answer is exactly the result."""

    inline: ClassVar[bool] = True
    parallel_calls: ClassVar[bool] = True
    max_turns = 6
    expression: Expression

    def task(self, rng: random.Random, level: int) -> Problem:
        self.expression = draw_expression(rng, level)
        return Problem(prompt=f"{self.expression.text}=?", meta={"needs_tool": True})

    @tool(inline=True)
    def add(self, a: int, b: int) -> int:
        """a + b"""
        return a + b

    @tool(inline=True)
    def sub(self, a: int, b: int) -> int:
        """a - b"""
        return a - b

    @tool(inline=True)
    def mul(self, a: int, b: int) -> int:
        """a * b"""
        return a * b

    def reward(self, answer: str) -> float:
        return float(answer.strip() == str(self.expression.value))

    def oracle(self) -> Oracle:
        return self.work_out([TOOL_OF_SYMBOL[symbol] for symbol, _ in self.expression.steps])

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% guess without a tool, 15% take one wrong operation, 45% right."""
        choice = rng.random()
        if choice < 0.40:
            return self.guess(rng)
        return self.slip(rng) if choice < 0.55 else self.oracle()

    def work_out(self, tool_names: list[str]) -> Oracle:
        """Call these tools one after the other, then say the last result."""
        text = str(self.expression.first)
        for name, (_, operand) in zip(tool_names, self.expression.steps, strict=True):
            replies = yield call(name, a=int(text), b=operand)
            text = replies[0].text
        yield say(text)

    def guess(self, rng: random.Random) -> Oracle:
        yield say(str(wrong_number(rng, self.expression.value)))

    def slip(self, rng: random.Random) -> Oracle:
        names = [TOOL_OF_SYMBOL[symbol] for symbol, _ in self.expression.steps]
        index = rng.randrange(len(names))
        names[index] = rng.choice([name for name in TOOL_OF_SYMBOL.values() if name != names[index]])
        return self.work_out(names)
