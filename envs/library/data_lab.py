"""DataLab-v0: query a database, save rows to a file, compute on it with Python, and use the result in the next query.

"median of kor" is one step: sql("select amount from sales where who='kor'", save="a") saves rows, and
python("median_low(load('a'))") computes. More steps are chained: "r = median of kor; r = xor of bin r%5; r?". Levels:
0-2 one step, 3-5 two, 6-7 three, 8-9 four; the table grows inside each band. Level 0 has 8,820 questions, each on any
of countless databases.
"""

import functools
import math
import operator
import random
import sqlite3
from typing import Any, ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.parts.read_only_sql import ReadOnlySql
from envs.library.shop_db import draw_name
from envs.sandbox.sandbox import Limits, open_sandbox
from envs.task import Problem
from envs.tool import tool

STATISTICS = {
    "median": "median_low({})",
    "second": "sorted({})[-2]",
    "xor": "reduce(xor,{})",
    "product%997": "prod({})%997",
}
"""Word of a question -> Python on the list of values."""
STEPS_OF_LEVEL = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4)
NUM_BINS = 5
MAX_FILES = 8
LIMITS = Limits(wall_s=10.0, cpu_s=1, disk_bytes=1 << 18)

PREAMBLE = """
from functools import reduce
from math import *
from operator import xor
from statistics import *
def load(name):
    rows = [[int(v) if v.lstrip('-').isdigit() else v for v in line.split(',')] for line in open(name).read().split()]
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else rows
"""


class DataLab(AgentEnv):
    """Answer a question that needs SQL and Python. Reward 1 iff the answer is exactly the number."""

    inline: ClassVar[bool] = True
    max_turns = 14
    max_result_chars = 500

    def __init__(self, *, sandbox: str = "auto", **kwargs: Any) -> None:
        """`sandbox` as in envs.sandbox.sandbox.open_sandbox. Raises SandboxUnavailable."""
        super().__init__(**kwargs)
        self.sandbox = open_sandbox(sandbox)
        self.database: ReadOnlySql | None = None
        self.files: dict[str, bytes] = {}

    def task(self, rng: random.Random, level: int) -> Problem:
        self._drop_database()
        self.files = {}
        names: list[str] = []
        while len(names) < 4 + level:
            if (name := draw_name(rng)) not in names:
                names.append(name)
        self.rows = [(name, i % NUM_BINS, rng.randint(10, 99)) for name in names for i in range(5)]
        self.rows += [
            (rng.choice(names), rng.randrange(NUM_BINS), rng.randint(10, 99)) for _ in range(10 * (level + 1))
        ]
        rng.shuffle(self.rows)
        connection = sqlite3.connect(":memory:", check_same_thread=False)
        connection.execute("create table sales(who text, bin integer, amount integer)")
        connection.executemany("insert into sales values(?,?,?)", self.rows)
        self.database = ReadOnlySql(connection, tables={"sales"}, max_rows=1000)
        self.who = rng.choice(names)
        self.words = [rng.choice(list(STATISTICS)) for _ in range(STEPS_OF_LEVEL[level])]
        return Problem(prompt=self._question(), meta={"needs_tool": True})

    def _question(self) -> str:
        if len(self.words) == 1:
            return f"{self.words[0]} of {self.who}"
        later = "".join(f"; r = {word} of bin r%{NUM_BINS}" for word in self.words[1:])
        return f"r = {self.words[0]} of {self.who}{later}; r?"

    @tool(inline=True)
    def sql(self, query: str, save: str = "") -> str:
        """Run a read-only SQL query on sales(who, bin, amount); `save` names a file for the rows."""
        assert self.database is not None
        text = self.database.run(query)
        if not save:
            return text
        if not (save.isidentifier() and len(save) <= 32):
            raise ValueError("save must be a plain name")
        if len(self.files) >= MAX_FILES and save not in self.files:
            raise ValueError("too many files")
        rows = "" if text == "no rows" else text
        self.files[save] = rows.encode()
        return f"{len(rows.splitlines())} rows"

    @tool
    async def python(self, code: str) -> str:
        """Run Python in a folder with the saved files; `load(name)` reads one; shows the value of the last line.

        It knows the names of `math` and `statistics`, `reduce` and `xor`. Files it writes are kept.
        """
        done = await self.sandbox.run(PREAMBLE + code, files=self.files, limits=LIMITS, collect=True)
        kept = {name: content for name, content in done.files.items() if len(name) <= 32}
        self.files = dict(list(kept.items())[:MAX_FILES])
        return done.text or "no output"

    def reward(self, answer: str) -> float:
        return float(answer.strip() == str(self.gold))

    @property
    def gold(self) -> int:
        values = [amount for who, _, amount in self.rows if who == self.who]
        result = statistic(self.words[0], values)
        for word in self.words[1:]:
            result = statistic(word, [amount for _, place, amount in self.rows if place == result % NUM_BINS])
        return result

    def hidden_state(self) -> str:
        return repr(self.rows)

    def close(self) -> None:
        self._drop_database()
        self.sandbox.close()
        super().close()

    def _drop_database(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

    def oracle(self) -> Oracle:
        return self.work_out(self.words)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, 45% a wrong statistic somewhere, 15% another column of the right rows."""
        choice = rng.random()
        if choice < 0.40:
            return self.oracle()
        if choice < 0.55:
            return self.work_out(self.words, column="bin")
        words = list(self.words)
        index = rng.randrange(len(words))
        words[index] = rng.choice([word for word in STATISTICS if word != words[index]])
        return self.work_out(words)

    def work_out(self, words: list[str], column: str = "amount") -> Oracle:
        """One query and one computation for each word; the last result is the answer."""
        condition, result = f"who='{self.who}'", ""
        for word in words:
            yield call("sql", query=f"select {column} from sales where {condition}", save="a")
            replies = yield call("python", code=STATISTICS[word].format("load('a')"))
            result = replies[0].text
            condition = f"bin={int(result) % NUM_BINS}"
        yield say(result)


def statistic(word: str, values: list[int]) -> int:
    """What the oracle's Python gives, worked out here."""
    ordered, count = sorted(values), len(values)
    if word == "median":
        return ordered[(count - 1) // 2]
    if word == "second":
        return ordered[-2]
    return functools.reduce(operator.xor, values) if word == "xor" else math.prod(values) % 997
