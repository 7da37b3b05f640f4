"""HelpDesk-v0: a shop's customer says bit by bit what to do, has changes of mind, and hears a code for what is done.

The user is scripted. It waits for a question (any text with "?") where it has not said everything, then for the code
of what was done, alone; to anything else it hangs up. Some users correct themselves: inside a sentence, by another
wish, or after the thing was done, which must then be undone. Judged are the orders at the end and what was said.

Levels: requests of a conversation grow from 1 to 4; from 1 the wish may change and may be to move an order to a city,
from 2 orders may be named by their item, from 4 "i do not want it" means cancel or refund by what has happened to the
order, from 6 things must be undone. Level 0 has millions of conversations, which their first line does not tell apart.
Levels 3 and above need engine.max_model_tokens=1024.
"""

import copy
import hashlib
import json
import random
import re
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.shop_db import CITIES, CONSONANTS
from envs.message import Message
from envs.task import Problem
from envs.tool import tool

NEEDS = {"cancel": "open", "refund": "sent", "resend": "sent", "move": "open"}
BECOMES = {"cancel": "cancelled", "refund": "refunded", "resend": "resent", "move": "open"}
PHRASES = {
    "cancel": ("cancel please", "please stop it"),
    "refund": ("refund please", "my money back"),
    "resend": ("send it again", "it never came"),
    "move": ("wrong address", "i have moved"),
}
ITEMS = ("pen", "cup", "hat", "map", "bag", "mug", "jar", "rug", "fan", "net", "box", "kit", "pan", "tie", "bow", "axe")
QUESTION = "which?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One order of the shop's books."""

    item: str
    status: str
    city: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """What the user says, and what the desk should then do and say.

    Example: Line(text="k47", calls=(call("refund", order="k47"),), wants="482").
    """

    text: str
    calls: tuple[Message, ...] = ()
    wants: str = QUESTION
    """A code to be told, or QUESTION."""

    def satisfied(self, said: str) -> bool:
        return "?" in said if self.wants == QUESTION else re.findall(r"\d+", said) == [self.wants]


class HelpDesk(AgentEnv):
    """Serve a customer over several turns. Reward 1 iff the orders end as wanted and each code was told in its turn."""

    inline: ClassVar[bool] = True
    max_turns = 40
    orders: dict[str, Order]

    def task(self, rng: random.Random, level: int) -> Problem:
        num_requests = 1 + level // 3
        ids = draw_ids(rng, 2 * num_requests + 2 + level // 3)
        items = rng.sample(ITEMS, len(ids))
        self.orders = {
            order: Order(item=item, status=rng.choice(("open", "sent")), city=rng.choice(CITIES))
            for order, item in zip(ids, items, strict=True)
        }
        numbers = rng.sample(range(100, 1000), len(ids) * len(NEEDS))
        self.codes = {(verb, order): str(numbers.pop()) for verb in NEEDS for order in ids}
        self.undoable: dict[str, tuple[str, Order]] = {}
        self.script: list[Line] = []
        wanted: dict[str, Order] = {}
        for index in range(num_requests):
            wanted |= self._draw_request(rng, level, *ids[2 * index : 2 * index + 2], is_first=index == 0)
        self.opening_orders = copy.copy(self.orders)
        self.gold_digest = digest(self.orders | wanted)
        self.num_satisfied = 0
        return Problem(prompt=self.script[0].text, meta={"needs_tool": True})

    def _draw_request(
        self, rng: random.Random, level: int, order: str, other: str, *, is_first: bool
    ) -> dict[str, Order]:
        """Add the lines of one request to the script; how its order should end comes back, by id."""
        verb = rng.choice([verb for verb in NEEDS if verb != "move" or level >= 1])
        for one in (order, other):
            self.orders[one] = replace(self.orders[one], status=NEEDS[verb])
        city = rng.choice([city for city in CITIES if city != self.orders[order].city]) if verb == "move" else ""
        is_vague = level >= 4 and verb in ("cancel", "refund") and rng.random() < 0.5
        by_item = level >= 2 and rng.random() < 0.5
        wish = "i do not want it" if is_vague else rng.choice(PHRASES[verb])

        def name(one: str) -> str:
            return f"my {self.orders[one].item}" if by_item else one

        def done(one: str, text: str, *before: Message) -> Line:
            find = [call("find", item=self.orders[one].item)] if by_item else []
            look = [call("look", order=one)] if is_vague else []
            arguments = {"order": one, "city": city} if city else {"order": one}
            calls = (*before, *find, *look, call(verb, **arguments))
            return Line(text=text, calls=calls, wants=self.codes[verb, one])

        tail = f" to {city}" if city else ""
        if is_first or rng.random() < 0.5:
            changed = level >= 1 and rng.random() < 0.25
            first_wish = rng.choice([p for v in NEEDS if v != verb for p in PHRASES[v]]) if changed else wish
            self.script.append(Line(text=first_wish if is_first else f"also, {first_wish}"))
            head, tail = "", f"{tail}, but {wish}" if changed else tail
        else:
            head = f"also, {wish}: "
        correction = rng.random()
        if level >= 6 and correction < 0.4:
            self.script.append(done(other, f"{head}{name(other)}{tail}"))
            undo = call("undo", code=self.codes[verb, other])
            self.script.append(done(order, f"sorry, i meant {name(order)}", undo))
        else:
            slip_of_tongue = f"{name(other)}, no, " if correction > 0.5 else ""
            self.script.append(done(order, f"{head}{slip_of_tongue}{name(order)}{tail}"))
        return {order: changed_order(self.orders[order], verb, city)}

    @tool(inline=True)
    def find(self, item: str) -> str:
        """Number of the customer's order of an item."""
        found = [order for order, facts in self.orders.items() if facts.item == item]
        return " ".join(found) or "none"

    @tool(inline=True)
    def look(self, order: str) -> str:
        """What has happened to an order. An open one can be cancelled, a sent one refunded."""
        return self._order(order).status

    @tool(inline=True)
    def cancel(self, order: str) -> str:
        """Cancel an open order. Returns the code to tell."""
        return self._change("cancel", order)

    @tool(inline=True)
    def refund(self, order: str) -> str:
        """Pay back a sent order. Returns the code to tell."""
        return self._change("refund", order)

    @tool(inline=True)
    def resend(self, order: str) -> str:
        """Send a sent order again. Returns the code to tell."""
        return self._change("resend", order)

    @tool(inline=True)
    def move(self, order: str, city: str) -> str:
        """Have an open order sent to another city. Returns the code to tell."""
        return self._change("move", order, city)

    @tool(inline=True)
    def undo(self, code: str) -> str:
        """Take back what was done under a code."""
        if code not in self.undoable:
            raise ValueError("no such code")
        order, facts = self.undoable.pop(code)
        self.orders[order] = facts
        return "ok"

    def _change(self, verb: str, order: str, city: str = "") -> str:
        facts = self._order(order)
        if facts.status != NEEDS[verb]:
            raise ValueError(f"not {NEEDS[verb]}")
        code = self.codes[verb, order]
        self.undoable.setdefault(code, (order, facts))
        self.orders[order] = changed_order(facts, verb, city)
        return code

    def _order(self, order: str) -> Order:
        if order not in self.orders:
            raise ValueError("no such order")
        return self.orders[order]

    async def on_message(self, text: str) -> str | None:
        """The user's next line; None where there is none, or where the user hangs up."""
        if not self.script[self.num_satisfied].satisfied(text):
            return None
        self.num_satisfied += 1
        return self.script[self.num_satisfied].text if self.num_satisfied < len(self.script) else None

    def reward(self, answer: str) -> dict[str, float]:
        right = float(digest(self.orders) == self.gold_digest)
        return {"state": right, "said": -right if self.num_satisfied < len(self.script) else 0.0}

    def hidden_state(self) -> str:
        return repr((self.opening_orders, self.codes, [line.text for line in self.script]))

    def oracle(self) -> Oracle:
        for line in self.script:
            for message in line.calls:  # noqa: UP028 - a tuple cannot be sent the replies
                yield message
            yield say(line.wants)

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, 25% do another thing, 15% take another order, 10% do not tell the code, 10% do not ask."""
        slip = rng.choices(["", "verb", "order", "said", "asked"], [40, 25, 15, 10, 10])[0]
        return self.oracle() if not slip else self.slip(rng, slip)

    def slip(self, rng: random.Random, slip: str) -> Oracle:
        """As the oracle, up to the first chance for this mistake, which makes the user hang up."""
        for line in self.script:
            for message in line.calls:
                name, arguments = message.tool_calls[0].name, dict(message.tool_calls[0].arguments)
                if name in NEEDS and slip == "verb":
                    others = [verb for verb in NEEDS if verb != name and verb != "move"]
                    name, arguments = rng.choice(others), {"order": arguments["order"]}
                elif name in NEEDS and slip == "order":
                    others = [order for order in self.orders if order != arguments["order"]]
                    heard = [order for order in others if order in line.text]
                    arguments["order"] = rng.choice(heard or others)
                replies = yield call(name, **arguments)
                told = replies[0].text
            if line.wants == QUESTION:
                yield say("done" if slip == "asked" else QUESTION)
            else:
                yield say("done" if slip == "said" else told)


def changed_order(facts: Order, verb: str, city: str) -> Order:
    return replace(facts, status=BECOMES[verb], city=city or facts.city)


def digest(orders: dict[str, Order]) -> str:
    return hashlib.sha256(json.dumps([[order, asdict(orders[order])] for order in sorted(orders)]).encode()).hexdigest()


def draw_ids(rng: random.Random, count: int) -> list[str]:
    ids: dict[str, None] = {}
    while len(ids) < count:
        ids[f"{rng.choice(CONSONANTS)}{rng.randint(10, 99)}"] = None
    return list(ids)
