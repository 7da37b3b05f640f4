"""ShopDB-v0: questions like "total of ann", answered by SQL on a database generated from the seed.

Tables: orders(id, customer, item, amount), people(name, city). Levels: 0-2 one customer, 3-5 one customer and one item,
6-9 a join on the customers of a city; the database grows inside each band. Names are drawn from 2,205, so level 0 has
8,820 questions, each on any of more than 10^30 databases (the same question on another database is another problem).
"""

import random
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.parts.read_only_sql import ReadOnlySql, small_database
from envs.task import Problem
from envs.tool import tool

AGGREGATE_OF_WORD = {"total": "sum", "count": "count", "most": "max", "least": "min"}
ITEMS = ("pen", "cup", "hat", "map", "bag")
CITIES = ("rome", "oslo", "lima", "cairo", "paris")
CONSONANTS = "bcdfghjklmnpqrstvwxyz"


def draw_name(rng: random.Random) -> str:
    return rng.choice(CONSONANTS) + rng.choice("aeiou") + rng.choice(CONSONANTS)


class ShopDB(AgentEnv):
    """Answer a question about a shop's orders. Reward 1 iff the answer is exactly the queried number."""

    inline: ClassVar[bool] = True
    parallel_calls: ClassVar[bool] = True
    max_turns = 4
    max_result_chars = 500
    database: ReadOnlySql | None = None

    def task(self, rng: random.Random, level: int) -> Problem:
        self._drop_database()
        num_customers, num_rows = 4 + level, 20 * (level + 1)
        names: list[str] = []
        while len(names) < num_customers:
            if (name := draw_name(rng)) not in names:
                names.append(name)
        self.people = [(name, rng.choice(CITIES)) for name in names]
        self.orders = [(i + 1, rng.choice(names), rng.choice(ITEMS), rng.randint(10, 99)) for i in range(num_rows)]
        connection = small_database()
        connection.execute("create table orders(id integer, customer text, item text, amount integer)")
        connection.execute("create table people(name text, city text)")
        connection.executemany("insert into orders values(?,?,?,?)", self.orders)
        connection.executemany("insert into people values(?,?)", self.people)
        self.database = ReadOnlySql(connection, tables={"orders", "people"})
        self.word = rng.choice(list(AGGREGATE_OF_WORD))
        subject, self.condition = self._draw_subject(rng, level)
        self.gold = self.database.run(self.query(AGGREGATE_OF_WORD[self.word]))
        return Problem(prompt=f"{self.word} of {subject}", meta={"needs_tool": True})

    def _draw_subject(self, rng: random.Random, level: int) -> tuple[str, str]:
        """Who is asked about, in words and in SQL; an existing order, so that the answer is a number."""
        _, customer, item, _ = rng.choice(self.orders)
        if level < 3:
            return customer, f"orders where customer='{customer}'"
        if level < 6:
            return f"{customer} {item}", f"orders where customer='{customer}' and item='{item}'"
        city = dict(self.people)[customer]
        return f"city {city}", f"orders join people on customer=name where city='{city}'"

    def query(self, aggregate: str, column: str = "amount") -> str:
        return f"select {aggregate}({column}) from {self.condition}"

    @tool(inline=True)
    def sql(self, query: str) -> str:
        """Run a read-only SQL query on orders(id, customer, item, amount) and people(name, city)."""
        assert self.database is not None
        return self.database.run(query)

    def reward(self, answer: str) -> float:
        return float(answer.strip() == self.gold)

    def hidden_state(self) -> str:
        return repr((self.people, self.orders))

    def close(self) -> None:
        self._drop_database()
        super().close()

    def _drop_database(self) -> None:
        if self.database is not None:
            self.database.close()
            self.database = None

    def oracle(self) -> Oracle:
        return self.ask(self.query(AGGREGATE_OF_WORD[self.word]))

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, 35% a wrong aggregate, 15% the wrong column, 10% another name or city."""
        right = AGGREGATE_OF_WORD[self.word]
        choice = rng.random()
        if choice < 0.40:
            return self.oracle()
        if choice < 0.55 and right != "count":  # count(id) would be right
            return self.ask(self.query(right, column="id"))
        if choice < 0.65:
            head, _, _ = self.query(right).rpartition("'")[0].rpartition("'")
            return self.ask(f"{head}'{draw_name(rng)}'")
        return self.ask(self.query(rng.choice([a for a in AGGREGATE_OF_WORD.values() if a != right])))

    def ask(self, query: str) -> Oracle:
        replies = yield call("sql", query=query)
        yield say(replies[0].text)
