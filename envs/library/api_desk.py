"""ApiDesk-v0: orders like "finish ticket 47, pin 382", carried out through 15 operations of an office's web API.

Log in first; every other operation takes the token. Levels: 0-1 one order on a row that is given by number; from 2 on
rows are given by title and found by listing pages, and every second level adds an order (five at 8); from 6 on values
stand in other rows and tokens expire. From level 1 on requests fail with 429 or 500 and have to be repeated. Level 0
has more than 400,000 problems. With http=true the operations are served over HTTP on loopback.
"""

import random
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from envs.base import AgentEnv, Observation, Oracle, call, say
from envs.library.parts.api_desk_server import ACTIONS, Office, OfficeServer
from envs.library.shop_db import CONSONANTS, draw_name
from envs.message import Message
from envs.task import Problem
from envs.tool import tool

Number = Annotated[int, Field(ge=0, le=9999)]
Day = Annotated[int, Field(ge=1, le=28)]
TABLE_OF = {action: table for table, action in ACTIONS}
WORDS_OF_VALUE = {"assign": ("to", "mails", "sender"), "move": ("to day", "events", "day")}
"""Operation with a value -> how an order says it, and the table and field that hold such values."""
MAX_TOKEN_CHARS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One thing to do. Example: Order(action="move", row=31, value="9") for "move event 31 to day 9"."""

    action: str
    row: int
    value: str = ""
    source: int | None = None
    """Row that the value has to be read from; None = the order says it."""


class ApiDesk(AgentEnv):
    """Change an office's records as ordered. Reward 1 iff they end as ordered and nothing else has changed."""

    inline: ClassVar[bool] = True

    def __init__(self, *, http: bool = False, max_turns: int | None = None, **kwargs: Any) -> None:
        """`http`: serve the operations over HTTP on loopback; transcripts are the same."""
        super().__init__(max_turns=max_turns, **kwargs)
        self._http, self._given_max_turns, self._prefix = http, max_turns, ""

    def task(self, rng: random.Random, level: int) -> Problem:
        self._stop_serving()
        self.max_turns = self._given_max_turns or 8 + 18 * level
        self.office = draw_office(rng, level)
        self.before = self.office.snapshot()
        self.by_title = level >= 2
        self.orders: list[Order] = []
        used: set[int] = set()
        while len(self.orders) < 1 + level // 2:
            order = self._draw_order(rng, with_source=level >= 6)
            rows = {order.row, order.source} - {None}
            if not rows & used and self.before[TABLE_OF[order.action]][order.row] != self._after(order):
                self.orders.append(order)
                used |= rows
        text = "; ".join(self._in_words(order) for order in self.orders)
        return Problem(prompt=f"{text}, pin {self.office.pin}", meta={"needs_tool": True})

    def _draw_order(self, rng: random.Random, *, with_source: bool) -> Order:
        action = rng.choice(list(TABLE_OF))
        row = rng.choice(list(self.before[TABLE_OF[action]]))
        if action not in WORDS_OF_VALUE:
            return Order(action=action, row=row)
        _, table, field = WORDS_OF_VALUE[action]
        source = rng.choice([other for other in self.before[table] if other != row])
        value = self.before[table][source][field]
        return Order(action=action, row=row, value=value, source=source if with_source else None)

    def _after(self, order: Order) -> dict[str, str]:
        table = TABLE_OF[order.action]
        field, text = ACTIONS[table, order.action]
        return self.before[table][order.row] | {field: text or order.value}

    def _in_words(self, order: Order) -> str:
        text = f"{order.action} {self._name(TABLE_OF[order.action], order.row)}"
        if order.action not in WORDS_OF_VALUE:
            return text
        word, table, field = WORDS_OF_VALUE[order.action]
        if order.source is None:
            return f"{text} {word} {order.value}"
        return f"{text} to the {field} of {self._name(table, order.source)}"

    def _name(self, table: str, row: int) -> str:
        return f"{table[:-1]} {self.before[table][row]['title'] if self.by_title else row}"

    # --- the operations ---

    @tool
    async def login(self, pin: str) -> str:
        """Get the token that the other operations take."""
        return await self._send("POST", "/login", "", pin=pin)

    @tool
    async def tickets(self, token: str, page: Number = 1) -> str:
        """List tickets, five a page."""
        return await self._send("GET", f"/tickets?page={page}", token)

    @tool
    async def ticket(self, token: str, row: Number) -> str:
        """Read a ticket."""
        return await self._send("GET", f"/tickets/{row}", token)

    @tool
    async def finish(self, token: str, row: Number) -> str:
        """Set a ticket to finished."""
        return await self._send("POST", f"/tickets/{row}/finish", token)

    @tool
    async def reopen(self, token: str, row: Number) -> str:
        """Set a ticket to open."""
        return await self._send("POST", f"/tickets/{row}/reopen", token)

    @tool
    async def assign(self, token: str, row: Number, person: str) -> str:
        """Give a ticket to a person."""
        return await self._send("POST", f"/tickets/{row}/assign", token, value=person)

    @tool
    async def events(self, token: str, page: Number = 1) -> str:
        """List events, five a page."""
        return await self._send("GET", f"/events?page={page}", token)

    @tool
    async def event(self, token: str, row: Number) -> str:
        """Read an event."""
        return await self._send("GET", f"/events/{row}", token)

    @tool
    async def move(self, token: str, row: Number, day: Day) -> str:
        """Move an event to a day."""
        return await self._send("POST", f"/events/{row}/move", token, value=str(day))

    @tool
    async def cancel(self, token: str, row: Number) -> str:
        """Call an event off."""
        return await self._send("POST", f"/events/{row}/cancel", token)

    @tool
    async def mails(self, token: str, page: Number = 1) -> str:
        """List mails, five a page."""
        return await self._send("GET", f"/mails?page={page}", token)

    @tool
    async def mail(self, token: str, row: Number) -> str:
        """Read a mail."""
        return await self._send("GET", f"/mails/{row}", token)

    @tool
    async def archive(self, token: str, row: Number) -> str:
        """Put a mail into the archive."""
        return await self._send("POST", f"/mails/{row}/archive", token)

    @tool
    async def delete(self, token: str, row: Number) -> str:
        """Put a mail into the trash."""
        return await self._send("POST", f"/mails/{row}/delete", token)

    @tool
    async def people(self, token: str, page: Number = 1) -> str:
        """List people, five a page."""
        return await self._send("GET", f"/people?page={page}", token)

    async def _send(self, method: str, path: str, token: str, **body: str) -> str:
        """The text of a good answer. Raises RuntimeError("STATUS text") otherwise."""
        token = token[:MAX_TOKEN_CHARS]
        if self._http:
            self._prefix = self._prefix or OfficeServer.add(self.office)
            reply = await OfficeServer.request(method, self._prefix + path, token, body)
        else:
            reply = self.office.handle(method, path, token, body)
        if reply.status != 200:
            raise RuntimeError(f"{reply.status} {reply.text}")
        return reply.text

    # --- reward and oracles ---

    def reward(self, answer: str) -> dict[str, float]:
        """Part "orders": all are carried out; "damage": takes that back where anything else has changed."""
        changes = self.office.changes(self.before)
        wanted = {}
        for order in self.orders:
            field, text = ACTIONS[TABLE_OF[order.action], order.action]
            wanted[order.row, field] = text or order.value
        carried_out = wanted.items() <= changes.items()
        return {"orders": float(carried_out), "damage": -float(carried_out and len(changes) > len(wanted))}

    def hidden_state(self) -> str:
        return repr(self.office)

    def close(self) -> None:
        self._stop_serving()
        super().close()

    def _stop_serving(self) -> None:
        if self._prefix:
            OfficeServer.remove(self._prefix)
            self._prefix = ""

    def oracle(self) -> Oracle:
        return self.work(self.orders)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right; on one order 20% another operation, 10% another row; 15% take the pin for the token; 15% stop
        once logged in."""
        choice, index = rng.random(), rng.randrange(len(self.orders))
        order = self.orders[index]
        if 0.40 <= choice < 0.60:
            has_value = order.action in WORDS_OF_VALUE
            others = [a for a in TABLE_OF if (a in WORDS_OF_VALUE) == has_value and a != order.action]
            order = replace(order, action=rng.choice(others))
        elif 0.60 <= choice < 0.70:
            order = replace(order, row=rng.choice([row for row in range(10, 100) if row != order.row]))
        orders = [*self.orders[:index], order, *self.orders[index + 1 :]]
        return self.work(orders if choice < 0.85 else [], with_pin=0.70 <= choice < 0.85)

    def work(self, orders: list[Order], *, with_pin: bool = False) -> Oracle:
        """Log in, find rows and values where the orders do not give them, carry out, say "done"."""
        self._token = self.office.pin if with_pin else ""
        for order in orders:
            if self.by_title:
                yield from self._find(TABLE_OF[order.action], order.row)
            if order.source is not None:
                _, table, _ = WORDS_OF_VALUE[order.action]
                yield from self._find(table, order.source)
                yield from self._ask(table[:-1], row=order.source)
            value = {"assign": {"person": order.value}, "move": {"day": order.value}}.get(order.action, {})
            yield from self._ask(order.action, row=order.row, **value)
        if not orders:
            yield from self._ask("login", pin=self.office.pin)
        yield say("done")

    def _find(self, table: str, row: int) -> Generator[Message, Observation, None]:
        """List pages until the row is seen, or they end."""
        page, text = 0, ""
        while f"{row} " not in f"{text} " and not text.startswith("error: 404"):
            page += 1
            text = yield from self._ask(table, page=page)

    def _ask(self, name: str, **arguments: Any) -> Generator[Message, Observation, str]:
        """One request, repeated while the server fails, with a login where it is needed."""
        while True:
            if not self._token and name != "login":
                self._token = yield from self._ask("login", pin=self.office.pin)
            replies = yield call(name, **({} if name == "login" else {"token": self._token}), **arguments)
            text = replies[0].text
            if text == "error: 401 token expired":
                self._token = ""
            elif not text.startswith(("error: 429", "error: 500")):
                return text


def draw_office(rng: random.Random, level: int) -> Office:
    """Rows with numbers and titles that are unique in the whole office."""
    num_rows = 4 + 2 * level
    drawn: dict[str, None] = {}
    while len(drawn) < 4 * num_rows:
        drawn[draw_name(rng)] = None
    titles, people = iter(list(drawn)[num_rows:]), list(drawn)[:num_rows]
    numbers = iter(rng.sample(range(10, 100), 3 * num_rows))

    def rows(fields: dict[str, list[str]]) -> dict[int, dict[str, str]]:
        return {
            next(numbers): {"title": next(titles)} | {field: rng.choice(texts) for field, texts in fields.items()}
            for _ in range(num_rows)
        }

    fault_rate = 0.05 + 0.03 * level if level else 0.0
    return Office(
        tables={
            "tickets": rows({"state": ["open", "finished"], "owner": people}),
            "events": rows({"state": ["on", "off"], "day": [str(day) for day in range(1, 29)]}),
            "mails": rows({"sender": people, "box": ["inbox", "archive", "trash"]}),
        },
        people=people,
        pin=str(rng.randint(100, 999)),
        tokens=[f"{rng.choice(CONSONANTS)}{rng.randint(2, 9)}{rng.choice(CONSONANTS)}" for _ in range(20)],
        token_requests=0 if level < 6 else 32 - 2 * level,
        faults=[rng.choice([429, 500]) if rng.random() < fault_rate else 0 for _ in range(100)],
    )
