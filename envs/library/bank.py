"""Bank-v0: "pay 37 from kem to lup" must be carried out as the bank's policy says, which the tools' descriptions state.

The policy: look at the payer before any write on its account; deny where it is frozen or short of money; hold a payment
of 50 or more, and one that takes the payer over 99 on this day; pay the rest. The tools carry out whatever they are
told, so keeping to the policy is the agent's duty. The end state is compared as a digest of accounts and journal.

Levels: the number of orders grows from 1 to 5; accounts that are frozen or short of money from 1, payments made earlier
on the day from 2, "half" and "all" of a balance from 3, topping up to a balance from 6. Level 0 has about 400 million
problems. Conversations of levels 4 and above need engine.max_model_tokens=640.
"""

import copy
import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.shop_db import draw_name
from envs.task import Problem
from envs.tool import tool

HOLD_FROM = 50
DAY_LIMIT = 99
VERBS = ("pay", "hold", "deny")


@dataclass(kw_only=True, slots=True)
class Account:
    """What the bank knows of a customer."""

    balance: int
    paid: int = 0
    """Paid on this day."""
    frozen: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A customer's wish. Example: Order(kind="half", payer="kem", payee="lup").text -> "pay half from kem to lup"."""

    kind: str
    """"exact" | "half" | "all" | "fill" (top the payee's balance up to `number`)."""
    payer: str
    payee: str
    number: int = 0

    @property
    def text(self) -> str:
        if self.kind == "fill":
            return f"fill {self.payee} to {self.number} from {self.payer}"
        return f"pay {self.number if self.kind == 'exact' else self.kind} from {self.payer} to {self.payee}"

    def amount(self, accounts: dict[str, Account]) -> int:
        balance = accounts[self.payer].balance
        return {
            "exact": self.number,
            "half": balance // 2,
            "all": balance,
            "fill": self.number - accounts[self.payee].balance,
        }[self.kind]


@dataclass(kw_only=True, slots=True)
class Books:
    """Accounts by name and the journal of writes: all that the end state is judged by."""

    accounts: dict[str, Account]
    journal: list[tuple[str, int, str, str]] = field(default_factory=list)

    def verb(self, amount: int, payer: str) -> str:
        """What the policy says to do with a payment."""
        account = self.accounts[payer]
        if account.frozen or amount > account.balance:
            return "deny"
        return "hold" if amount >= HOLD_FROM or account.paid + amount > DAY_LIMIT else "pay"

    def write(self, verb: str, amount: int, payer: str, payee: str) -> None:
        if verb == "pay":
            self.accounts[payer].balance -= amount
            self.accounts[payer].paid += amount
            self.accounts[payee].balance += amount
        self.journal.append((verb, amount, payer, payee))

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class Bank(AgentEnv):
    """Carry out payment orders under a policy. Reward 1 iff the books end as they should and nobody broke a rule."""

    inline: ClassVar[bool] = True
    max_turns = 20
    books: Books

    def task(self, rng: random.Random, level: int) -> Problem:
        names: list[str] = []
        while len(names) < 3 + level // 3:
            if (name := draw_name(rng)) not in names:
                names.append(name)
        self.books = Books(accounts={name: draw_account(rng, level) for name in names})
        self.opening_books = repr(self.books)
        self.looked: set[str] = set()
        self.num_violations = 0
        ends = copy.deepcopy(self.books)
        self.orders = [draw_order(rng, level, ends) for _ in range(1 + level // 2)]
        self.gold_digest = ends.digest()
        return Problem(prompt="; ".join(order.text for order in self.orders), meta={"needs_tool": True})

    @tool(inline=True)
    def look(self, name: str) -> str:
        """Balance of an account, what it paid today, and whether it is frozen. Look at the payer before you write."""
        account = self._account(name)
        self.looked.add(name)
        return f"has {account.balance}, paid {account.paid}" + ", frozen" * account.frozen

    @tool(inline=True)
    def pay(self, amount: int, payer: str, payee: str) -> str:
        """Pay at once: only amounts under 50, and only up to 99 a day for each payer."""
        return self._write("pay", amount, payer, payee)

    @tool(inline=True)
    def hold(self, amount: int, payer: str, payee: str) -> str:
        """Leave a payment to a person: 50 or more, or more than the payer's 99 of the day. Nothing is paid now."""
        return self._write("hold", amount, payer, payee)

    @tool(inline=True)
    def deny(self, amount: int, payer: str, payee: str) -> str:
        """Refuse a payment: the payer is frozen or has less than the amount. Comes before the other rules."""
        return self._write("deny", amount, payer, payee)

    def _write(self, verb: str, amount: int, payer: str, payee: str) -> str:
        if self._account(payer) is self._account(payee):
            raise ValueError("same account")
        if not 0 < amount < 10**6:
            raise ValueError("bad amount")
        self.num_violations += payer not in self.looked or verb != self.books.verb(amount, payer)
        self.books.write(verb, amount, payer, payee)
        return "ok"

    def _account(self, name: str) -> Account:
        if name not in self.books.accounts:
            raise ValueError("no such account")
        return self.books.accounts[name]

    def reward(self, answer: str) -> dict[str, float]:
        right = float(self.books.digest() == self.gold_digest)
        return {"state": right, "policy": -right if self.num_violations else 0.0}

    def hidden_state(self) -> str:
        return self.opening_books

    def oracle(self) -> Oracle:
        for order in self.orders:
            yield call("look", name=order.payer)
            if order.kind == "fill":
                yield call("look", name=order.payee)
            amount = order.amount(self.books.accounts)
            verb = self.books.verb(amount, order.payer)
            yield call(verb, amount=amount, payer=order.payer, payee=order.payee)
        yield say("done")

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right, 20% do not look first, 20% a wrong verb, 10% payer and payee swapped, 10% a wrong amount."""
        slip = rng.choices(["", "blind", "verb", "swap", "amount"], [40, 20, 20, 10, 10])[0]
        return self.oracle() if not slip else self.slip(rng, slip)

    def slip(self, rng: random.Random, slip: str) -> Oracle:
        """The oracle's messages, of which every look is left out or every write has the same kind of mistake."""
        right = self.oracle()
        message, replies = next(right), ()
        while message.tool_calls:
            name, arguments = message.tool_calls[0].name, dict(message.tool_calls[0].arguments)
            if name != "look":
                if slip == "verb":
                    name = rng.choice([verb for verb in VERBS[: 3 if self.level else 2] if verb != name])
                elif slip == "swap":
                    arguments.update(payer=arguments["payee"], payee=arguments["payer"])
                elif slip == "amount":
                    arguments["amount"] = arguments["amount"] + rng.choice([-10, 10, 1])
            if slip != "blind" or name != "look":
                replies = yield call(name, **arguments)
            message = right.send(replies)
        yield message


def draw_account(rng: random.Random, level: int) -> Account:
    if level == 0:  # always open and rich enough
        return Account(balance=rng.randint(100, 999))
    paid = rng.choice([0, rng.randint(30, 90)]) if level >= 2 else 0
    return Account(balance=rng.randint(20, 150), paid=paid, frozen=rng.random() < 0.2)


def draw_order(rng: random.Random, level: int, books: Books) -> Order:
    """Draw an order that asks for something, and carry it out in `books`."""
    kinds = ["exact", *(["half", "all"] if level >= 3 else []), *(["fill"] if level >= 6 else [])]
    while True:
        kind = rng.choice(kinds)
        payer, payee = rng.sample(sorted(books.accounts), 2)
        number = rng.randint(10, 89 if level == 0 else 99) if kind == "exact" else 10 * rng.randint(5, 20)
        order = Order(kind=kind, payer=payer, payee=payee, number=number)
        if (amount := order.amount(books.accounts)) > 0:
            books.write(books.verb(amount, payer), amount, payer, payee)
            return order
