"""HelpDesk-v0: a scripted customer who says things bit by bit and changes its mind."""

import random

import pytest

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.help_desk import QUESTION, HelpDesk, Line, Order, digest


def ready(*script: Line) -> HelpDesk:
    """A desk with two sent orders and an open one; k47 is to be refunded, which has code 482."""
    env = HelpDesk()
    env.reset(seed=0)
    env.orders = {
        "k47": Order(item="pen", status="sent", city="rome"),
        "b12": Order(item="hat", status="sent", city="rome"),
        "d30": Order(item="map", status="open", city="oslo"),
    }
    pairs = [(verb, order) for verb in ("refund", "resend", "cancel", "move") for order in env.orders]
    env.codes = {**{pair: str(600 + n) for n, pair in enumerate(pairs)}, ("refund", "k47"): "482"}
    env.script = list(script) or [Line(text="refund please"), Line(text="k47", wants="482")]
    env.gold_digest = digest(env.orders | {"k47": Order(item="pen", status="refunded", city="rome")})
    return env


@pytest.mark.parametrize("level", range(10))
def test_the_oracle_scores_one_without_an_error_over_at_least_two_user_turns(level: int) -> None:
    demonstrations = [demonstrate(HelpDesk(), seed, level) for seed in range(30)]
    assert {d.reward for d in demonstrations} == {1.0}
    assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}
    assert min(sum(m.role == "user" for m in d.messages) for d in demonstrations) >= 2


def test_conversations_get_longer_with_the_level() -> None:
    lengths = [sum(len(demonstrate(HelpDesk(), s, level).messages) for s in range(40)) for level in (0, 2, 3, 6, 9)]
    assert lengths == sorted(set(lengths))


def test_the_user_answers_a_question_and_waits_for_the_code() -> None:
    env = ready()
    replies, _, terminated, *_ = env.step(say("which order?"))
    assert (replies[0].role, replies[0].text, terminated) == ("user", "k47", False)
    assert env.step(call("refund", order="k47"))[0][0].text == "482"
    _, reward, terminated, _, info = env.step(say("your code is 482."))
    assert (reward, terminated, info["reward_parts"]) == (1.0, True, {"state": 1.0, "said": 0.0})


@pytest.mark.parametrize("said", ["", "done", "refund please", "482"])
def test_the_user_hangs_up_where_it_is_not_asked(said: str) -> None:
    env = ready()
    replies, reward, terminated, *_ = env.step(say(said))
    assert (replies, reward, terminated) == ((), 0.0, True)


@pytest.mark.parametrize("said", ["done", "", "481", "482 and 483", "4820", "482?100"])
def test_the_right_state_is_worth_nothing_without_the_code_alone(said: str) -> None:
    env = ready()
    env.step(say(QUESTION))
    env.step(call("refund", order="k47"))
    _, reward, _, _, info = env.step(say(said))
    assert (reward, info["reward_parts"]) == (0.0, {"state": 1.0, "said": -1.0})


def test_the_right_words_are_worth_nothing_without_the_state() -> None:
    env = ready()
    env.step(say(QUESTION))
    env.step(call("refund", order="b12"))
    env.step(call("refund", order="k47"))
    assert env.step(say("482"))[1] == 0.0


def test_what_was_done_by_mistake_can_be_undone_once() -> None:
    env = ready()
    env.step(say(QUESTION))
    code = env.step(call("refund", order="b12"))[0][0].text
    assert env.step(call("undo", code=code))[0][0].text == "ok"
    assert env.step(call("undo", code=code))[0][0].text == "error: no such code"
    env.step(call("refund", order="k47"))
    assert env.step(say("482"))[1] == 1.0


def test_tools_tell_what_has_happened_to_an_order_and_refuse_what_no_longer_fits() -> None:
    env = ready()

    def shown(name: str, **arguments: str) -> str:
        return env.step(call(name, **arguments))[0][0].text

    assert shown("find", item="hat") == "b12"
    assert shown("find", item="car") == "none"
    assert shown("look", order="d30") == "open"
    assert shown("look", order="zzz") == "error: no such order"
    assert shown("cancel", order="k47") == "error: not open"
    assert shown("refund", order="d30") == "error: not sent"
    assert shown("move", order="d30", city="lima").isdigit()
    assert shown("resend", order="k47").isdigit()
    assert shown("refund", order="k47") == "error: not sent"
    assert env.orders["d30"] == Order(item="map", status="open", city="lima")


def lines_of(level: int) -> list[list[Line]]:
    env = HelpDesk()
    scripts = []
    for seed in range(200):
        env.reset(seed=seed, options={"level": level})
        scripts.append(env.script)
    return scripts


@pytest.mark.slow
def test_users_correct_themselves_more_deeply_as_levels_rise() -> None:
    def share(level: int, words: str) -> float:
        return sum(any(words in line.text for line in script) for script in lines_of(level)) / 200

    assert 0.4 < share(0, ", no, ") < 0.6
    assert share(0, "but ") == share(5, "sorry") == 0.0
    assert share(1, "but ") > 0.1
    assert share(2, "my ") > share(1, "my ")
    assert share(4, "i do not want it") > 0.1
    assert share(6, "sorry") > 0.3
    assert [len(lines_of(level)[0]) >= requests for level, requests in ((0, 2), (3, 3), (6, 4), (9, 5))] == [True] * 4


@pytest.mark.parametrize("level", range(10))
def test_doing_nothing_is_never_right_and_no_code_is_shown_at_the_start(level: int) -> None:
    env = HelpDesk()
    for seed in range(60):
        opening, info = env.reset(seed=seed, options={"level": level})
        assert digest(env.orders) != env.gold_digest
        text = opening[0].text + repr(info["tools"]) + repr(info["meta"])
        assert not any(line.wants in text for line in env.script if line.wants != QUESTION)


def test_noisy_demonstrations_are_right_in_four_of_ten() -> None:
    env, rng = HelpDesk(), random.Random(7)
    assert 0.36 < sum(demonstrate(env, seed, 0, rng).reward for seed in range(1000)) / 1000 < 0.45


def test_level_zero_is_short_and_has_many_problems() -> None:
    env = HelpDesk()
    assert len({env.reset(seed=seed)[1]["problem_digest"] for seed in range(1000)}) == 1000
    texts = [m.text for seed in range(50) for m in demonstrate(env, seed, 0).messages]
    assert max(map(len, texts)) <= 16
