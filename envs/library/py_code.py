"""PyCode-v0: "add 7, mul 3" must be answered with Python that does it: `lambda x:(x+7)*3`.

The answer is an expression whose value is a function of one argument, or source that defines `f`. It is run in a fresh
sandbox on hidden inputs; the sandbox never holds the outputs that are wanted, they are compared here. Levels: 0-2 two
to four steps on a number, 3-5 three to five on a list, 6-7 three and four on a text, 8-9 one of two branches with two
and three steps. Level 0 has 86,436 specifications, the others more.
"""

import json
import random
import re
from typing import Any, ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.sandbox.sandbox import Limits, open_sandbox, same_data
from envs.task import Problem
from envs.tool import tool

NUM_TESTS = 12
MAX_ANSWER_CHARS = 4000
LIMITS = Limits(wall_s=10.0, cpu_s=1)

# words -> code; {} is what the steps before give, # a number from 2 to 99, @ three letters
NUMBER = {"add #": "({}+#)", "sub #": "({}-#)", "mul #": "{}*#"}
MORE_NUMBER = {**NUMBER, "mod #": "{}%#", "square": "({})**2"}
FILTER = {
    "keep over #": "[v for v in {} if v>#]",
    "keep under #": "[v for v in {} if v<#]",
    "drop multiples of #": "[v for v in {} if v%#]",
}
EACH = {"each add #": "[v+# for v in {}]", "each sub #": "[v-# for v in {}]", "each mul #": "[v*# for v in {}]"}
TOTAL = {"sum": "sum({})", "sort": "sorted({})", "reverse": "{}[::-1]", "count different": "len(set({}))"}
TEXT = {
    "append @": "({}+'@')",
    "prepend @": "('@'+{})",
    "reverse": "{}[::-1]",
    "upper case": "{}.upper()",
    "surround with @": "('@'+{}+'@')",
    "join with @": "'@'.join({})",
}
PLANS = (
    [NUMBER] * 2,
    [MORE_NUMBER] * 3,
    [MORE_NUMBER] * 4,
    [FILTER, EACH, TOTAL],
    [FILTER, EACH, FILTER, TOTAL],
    [FILTER, EACH, FILTER, EACH, TOTAL],
    [TEXT] * 3,
    [TEXT] * 4,
    [MORE_NUMBER] * 4,
    [MORE_NUMBER] * 6,
)
"""By level, where each step is drawn from; at levels 8 and 9 half of them is for each branch."""

GRADER = """
import json
def outputs():
    space = {"__name__": "answer"}
    source = open("answer.py", encoding="utf-8").read()
    inputs = json.load(open("inputs.json"))
    try:
        function = eval(compile(source.strip(), "answer", "eval"), space)
    except SyntaxError:
        exec(compile(source, "answer", "exec"), space)
        function = space["f"]
    results = []
    for x in inputs:
        try:
            results.append([function(x)])
        except Exception:
            results.append([])
    return results
outputs()
"""
_FENCE = re.compile(r"\s*```(?:python|py)?\n(.*?)\n?```\s*", re.DOTALL)


class PyCode(AgentEnv):
    """Write a function to a specification. Reward 1 iff it gives every hidden output."""

    inline: ClassVar[bool] = True
    max_turns = 4
    max_result_chars = 1000

    def __init__(self, *, sandbox: str = "auto", **kwargs: Any) -> None:
        """`sandbox` as in envs.sandbox.sandbox.open_sandbox. Raises SandboxUnavailable."""
        super().__init__(**kwargs)
        self.sandbox = open_sandbox(sandbox)
        self.passed = 0.0

    def task(self, rng: random.Random, level: int) -> Problem:
        self.passed = 0.0
        while True:
            self.steps = [draw_step(rng, choices) for choices in PLANS[level]]
            self.divisor = rng.randint(2, 9) if level >= 8 else 0
            self.inputs = draw_inputs(rng, level)
            self.code = self.code_of(self.steps)
            self.outputs = results(self.code, self.inputs)
            # neither a constant nor the identity may pass
            if len({json.dumps(o) for o in self.outputs}) > NUM_TESTS // 2 and self.outputs != self.inputs:
                return Problem(prompt=self.specification(), meta={"needs_tool": False})

    def specification(self) -> str:
        words = [word for word, _ in self.steps]
        if self.divisor:
            half = len(words) // 2
            return f"if x%{self.divisor}==0: {', '.join(words[:half])}; else: {', '.join(words[half:])}"
        return ", ".join(words)

    def code_of(self, steps: list[tuple[str, str]]) -> str:
        templates = [template for _, template in steps]
        if self.divisor:
            half = len(templates) // 2
            return f"lambda x:{compose(templates[:half])} if x%{self.divisor}==0 else {compose(templates[half:])}"
        return f"lambda x:{compose(templates)}"

    @tool
    async def python(self, code: str) -> str:
        """Run Python code in a sandbox; shows what it prints and the value of its last line.

        The answer to a task is one Python function of x, for example: lambda x: x + 1
        """
        return (await self.sandbox.run(code, limits=LIMITS)).text or "no output"

    async def reward(self, answer: str) -> dict[str, float]:
        fenced = _FENCE.fullmatch(answer)
        source = fenced[1] if fenced else answer
        if source.strip() and len(source) <= MAX_ANSWER_CHARS:
            files = {"answer.py": source, "inputs.json": json.dumps(self.inputs)}
            done = await self.sandbox.run(GRADER, files=files, limits=LIMITS)
            given = done.value if isinstance(done.value, list) else []
            right = [same_data(g, [o]) for g, o in zip(given, self.outputs, strict=False)]
            self.passed = sum(right) / NUM_TESTS if len(given) == NUM_TESTS else 0.0
        return {"tests": float(self.passed == 1.0)}

    def meta(self) -> dict[str, Any]:
        return {**super().meta(), "tests_passed": self.passed}

    def hidden_state(self) -> str:
        return repr(self.inputs)

    def close(self) -> None:
        self.sandbox.close()
        super().close()

    def oracle(self) -> Oracle:
        yield say(self.code)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, of these a tenth tries the code first; else a wrong order, number or bracket."""
        choice = rng.random()
        if choice < 0.04:
            yield call("python", code=f"({self.code})({self.inputs[0]!r})")
        yield say(self.code if choice < 0.40 else self.wrong_code(rng))

    def wrong_code(self, rng: random.Random) -> str:
        """Code like the right one that gives other outputs."""
        while True:
            steps = list(self.steps)
            i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
            mistake = rng.random()
            if mistake < 0.4:
                steps[i], steps[j] = steps[j], steps[i]
            elif mistake < 0.8:
                steps[i] = (steps[i][0], re.sub(r"(?<!\*\*)\d\d?", str(rng.randint(2, 99)), steps[i][1], count=1))
            else:
                steps[i] = draw_step(rng, PLANS[self.level][i])
            code = self.code_of(steps)
            # not with powers: x**2**2**2**2 would take for ever
            if isinstance(self.inputs[0], int) and "**" not in code and rng.random() < 0.3:
                code = code.replace("(", "").replace(")", "")
            if results(code, self.inputs) != self.outputs:
                return code


def draw_step(rng: random.Random, choices: dict[str, str]) -> tuple[str, str]:
    """(words, code) with numbers and letters filled in."""
    words = rng.choice(list(choices))
    number, letters = str(rng.randint(2, 99)), "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3))
    return words.replace("#", number).replace("@", letters), choices[words].replace("#", number).replace("@", letters)


def draw_inputs(rng: random.Random, level: int) -> list[Any]:
    if 3 <= level <= 5:
        return [[rng.randint(-20, 120) for _ in range(rng.randint(4, 9))] for _ in range(NUM_TESTS)]
    if 6 <= level <= 7:
        return ["".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(NUM_TESTS)]
    return [rng.randint(-99, 99) for _ in range(NUM_TESTS)]


def compose(templates: list[str]) -> str:
    """Example: ["({}+7)", "{}*3"] -> "(x+7)*3"."""
    code = "x"
    for template in templates:
        code = template.replace("{}", code)
    whole = templates[-1][0] == "(" and templates[-1][-1] == ")"
    return code[1:-1] if whole else code


def results(code: str, inputs: list[Any]) -> list[Any]:
    """Outputs of code that this file wrote; None where it fails."""
    function = eval(code)
    outputs = []
    for x in inputs:
        try:
            outputs.append(function(x))
        except (ArithmeticError, TypeError, ValueError, IndexError):
            outputs.append(None)
    return outputs
