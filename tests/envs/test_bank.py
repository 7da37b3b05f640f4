"""Bank-v0: the policy decides what becomes of a payment, and the books are compared at the end."""

import random

import pytest

from envs.base import call, say
from envs.check.demonstration import Demonstration, demonstrate
from envs.library.bank import Account, Bank, Books, Order


def ready(order: Order, **accounts: Account) -> Bank:
    """A bank with this one order, kem paying lup."""
    env = Bank()
    env.reset(seed=0)
    env.books = Books(accounts={"kem": Account(balance=80), "lup": Account(balance=5), **accounts})
    ends = Books(accounts={name: Account(balance=a.balance, paid=a.paid) for name, a in env.books.accounts.items()})
    ends.accounts["kem"].frozen = env.books.accounts["kem"].frozen
    amount = order.amount(ends.accounts)
    ends.write(ends.verb(amount, "kem"), amount, "kem", "lup")
    env.orders, env.gold_digest = [order], ends.digest()
    return env


PAY_30 = Order(kind="exact", payer="kem", payee="lup", number=30)


@pytest.mark.parametrize("level", range(10))
def test_the_oracle_scores_one_without_an_error(level: int) -> None:
    demonstrations = [demonstrate(Bank(), seed, level) for seed in range(20)]
    assert {d.reward for d in demonstrations} == {1.0}
    assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}


def test_orders_grow_with_the_level() -> None:
    turns = [sum(len(demonstrate(Bank(), s, level).messages) for s in range(20)) for level in (0, 2, 4, 6, 8)]
    assert turns == sorted(set(turns))


@pytest.mark.parametrize(
    ("amount", "account", "verb"),
    [
        (49, Account(balance=200), "pay"),
        (50, Account(balance=200), "hold"),
        (49, Account(balance=49, paid=50), "pay"),
        (49, Account(balance=200, paid=51), "hold"),
        (50, Account(balance=49), "deny"),
        (10, Account(balance=200, frozen=True), "deny"),
    ],
)
def test_the_policy_decides_by_amount_day_and_state_of_the_account(amount: int, account: Account, verb: str) -> None:
    assert Books(accounts={"kem": account}).verb(amount, "kem") == verb


def test_amounts_are_worked_out_from_balances() -> None:
    accounts = {"kem": Account(balance=81), "lup": Account(balance=5)}
    amounts = {k: Order(kind=k, payer="kem", payee="lup", number=60).amount(accounts) for k in ("half", "all", "fill")}
    assert amounts == {"half": 40, "all": 81, "fill": 55}


def test_a_payment_without_a_look_breaks_the_policy_though_the_books_are_right() -> None:
    env = ready(PAY_30)
    env.step(call("pay", amount=30, payer="kem", payee="lup"))
    _, reward, _, _, info = env.step(say("done"))
    assert (reward, info["reward_parts"]) == (0.0, {"state": 1.0, "policy": -1.0})


@pytest.mark.parametrize(
    "wrong",
    [
        call("hold", amount=30, payer="kem", payee="lup"),
        call("deny", amount=30, payer="kem", payee="lup"),
        call("pay", amount=31, payer="kem", payee="lup"),
        call("pay", amount=30, payer="lup", payee="kem"),
        call("look", name="lup"),
    ],
)
def test_another_end_state_scores_nothing(wrong) -> None:
    env = ready(PAY_30)
    env.step(call("look", name="kem"))
    env.step(wrong)
    assert env.step(say("done"))[1] == 0.0


def test_paying_twice_and_paying_back_stay_in_the_journal() -> None:
    env = ready(PAY_30)
    env.step(call("look", name="kem"))
    env.step(call("look", name="lup"))
    for payer, payee in (("kem", "lup"), ("lup", "kem"), ("kem", "lup")):
        env.step(call("pay", amount=30, payer=payer, payee=payee))
    assert env.books.accounts["kem"].balance == 50
    assert env.step(say("done"))[1] == 0.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"amount": 5, "payer": "kem", "payee": "zzz"}, "error: no such account"),
        ({"amount": 0, "payer": "kem", "payee": "lup"}, "error: bad amount"),
        ({"amount": 10**9, "payer": "kem", "payee": "lup"}, "error: bad amount"),
        ({"amount": 5, "payer": "kem", "payee": "kem"}, "error: same account"),
        ({"amount": "x", "payer": "kem", "payee": "lup"}, "error: amount must be integer"),
    ],
)
def test_refused_writes_say_why_and_change_nothing(arguments: dict, text: str) -> None:
    env = ready(PAY_30)
    before = env.books.digest()
    replies, *_ = env.step(call("pay", **arguments))
    assert (replies[0].text, env.books.digest()) == (text, before)


@pytest.mark.slow
def test_noisy_demonstrations_are_right_in_four_of_ten_and_wrong_in_four_ways() -> None:
    def kind(d: Demonstration, right: Demonstration) -> str:
        calls = [(c.name, tuple(c.arguments.values())) for m in d.messages for c in m.tool_calls]
        wanted = [(c.name, tuple(c.arguments.values())) for m in right.messages for c in m.tool_calls]
        if calls == wanted:
            return "right"
        if len(calls) == 1:
            return "blind"
        if calls[-1][0] != wanted[-1][0]:
            return "verb"
        return "amount" if calls[-1][1][1:] == wanted[-1][1][1:] else "swap"

    env, rng = Bank(), random.Random(7)
    noisy = [demonstrate(env, seed, 0, rng) for seed in range(1000)]
    kinds = [kind(d, demonstrate(env, seed, 0)) for seed, d in enumerate(noisy)]
    shares = {name: kinds.count(name) / 1000 for name in ("right", "blind", "verb", "swap", "amount")}
    assert shares == pytest.approx({"right": 0.4, "blind": 0.2, "verb": 0.2, "swap": 0.1, "amount": 0.1}, abs=0.05)
    assert all((d.reward == 1.0) == (k == "right") for d, k in zip(noisy, kinds, strict=True))


def test_level_zero_is_short_and_has_many_problems() -> None:
    env = Bank()
    resets = [env.reset(seed=seed) for seed in range(1000)]
    assert max(len(opening[0].text) for opening, _ in resets) <= 24
    assert len({opening[0].text for opening, _ in resets}) > 990
    assert len({info["problem_digest"] for _, info in resets}) == 1000
