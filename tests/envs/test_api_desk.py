"""ApiDesk-v0: the same over HTTP as in process, faults that can be repeated away, and a diff that forgives nothing."""

import random
import threading

import pytest

from envs.base import AgentEnv, call, say
from envs.check.demonstration import demonstrate
from envs.library.api_desk import ApiDesk
from envs.library.parts.api_desk_server import OfficeServer
from envs.message import Message, ToolCall
from envs.registry import make_env

HOSTILE = [
    call("login", pin="\r\nX: y"),
    call("login", pin="\ud800"),
    call("finish", token="\r\n\x00\ud800" * 50, row=1),
    call("tickets", token="", page=0),
    call("ticket", token="x", row=-1),
    call("assign", token="x", row=1, person="/../\u20ac"),
    call("move", token="x", row=1, day=99),
    call("delete", token="x", row="9" * 10_000),
    call("nothing"),
    Message.assistant(calls=[ToolCall(name="login", arguments={})]),
]


@pytest.fixture
def env() -> ApiDesk:
    made = make_env("ApiDesk-v0")
    assert isinstance(made, ApiDesk)
    return made


def logged_in(env: ApiDesk, seed: int, level: int = 0) -> str:
    env.reset(seed=seed, options={"level": level})
    return env.step(call("login", pin=env.office.pin))[0][0].text


def texts(env: AgentEnv, seed: int, level: int, noise: bool) -> list[tuple[str, str]]:
    rng = random.Random(seed) if noise else None
    return [(m.role, m.text) for m in demonstrate(env, seed, level, rng).messages]


def test_the_oracle_scores_one_at_every_level(env: ApiDesk) -> None:
    assert {demonstrate(env, seed, level).reward for level in range(10) for seed in range(20)} == {1.0}
    assert len(env.tool_specs()) == 15


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3, 9])
def test_transcripts_over_http_equal_those_in_process(env: ApiDesk, level: int) -> None:
    served = make_env("ApiDesk-v0", http=True)
    for seed in range(5):
        for noise in (False, True):
            assert texts(served, seed, level, noise) == texts(env, seed, level, noise)
    served.close()


def test_hostile_calls_read_the_same_in_both_modes(env: ApiDesk) -> None:
    served = make_env("ApiDesk-v0", http=True, max_turns=20)
    env.max_turns = 20
    for action in HOSTILE:
        env.reset(seed=1)
        served.reset(seed=1)
        direct, remote = env.step(action)[0][0].text, served.step(action)[0][0].text
        assert direct == remote
        assert direct.startswith("error: ")
        assert len(direct) < 100
    served.close()


def test_the_last_close_ends_the_server_and_keeps_the_others_served() -> None:
    def num_threads() -> int:
        return sum(thread.name == "shoal-office" for thread in threading.enumerate())

    first, second = make_env("ApiDesk-v0", http=True), make_env("ApiDesk-v0", http=True)
    for made in (first, second):
        made.reset(seed=1)
        made.step(call("login", pin="0"))
    assert (num_threads(), len(OfficeServer._offices)) == (1, 2)
    first.close()
    first.close()
    assert second.step(call("login", pin="0"))[0][0].text == "error: 401 wrong pin"
    second.close()
    assert (num_threads(), len(OfficeServer._offices), OfficeServer._http) == (0, 0, None)


def test_a_needless_change_takes_the_reward_back_and_undoing_it_gives_it_again(env: ApiDesk) -> None:
    token = logged_in(env, seed=3)
    order = env.orders[0]
    other = next(row for row, fields in env.before["events"].items() if row != order.row and fields["day"] != "5")
    env.reset(seed=3)
    token = env.step(call("login", pin=env.office.pin))[0][0].text
    extra = {"assign": {"person": order.value}, "move": {"day": order.value}}.get(order.action, {})
    env.step(call(order.action, token=token, row=order.row, **extra))
    assert env.reward("") == {"orders": 1.0, "damage": 0.0}
    env.step(call("move", token=token, row=other, day=5))
    assert env.reward("") == {"orders": 1.0, "damage": -1.0}
    env.step(call("move", token=token, row=other, day=env.before["events"][other]["day"]))
    assert env.step(say(""))[1] == 1.0


def test_requests_fail_by_seed_and_a_failed_one_changes_nothing(env: ApiDesk) -> None:
    token = logged_in(env, seed=2)
    before = env.office.snapshot()
    env.office.faults, env.office.num_requests = [429, 500, 0], 0
    row = next(row for row, fields in before["tickets"].items() if fields["state"] == "open")
    seen = [env.step(call("finish", token=token, row=row))[0][0].text for _ in range(2)]
    assert seen == ["error: 429 too many requests", "error: 500 server error"]
    assert env.office.changes(before) == {}
    assert env.step(call("finish", token=token, row=row))[0][0].text == "ok"
    assert env.office.changes(before) == {(row, "state"): "finished"}


def test_tokens_expire_and_a_login_gives_a_new_one(env: ApiDesk) -> None:
    token = logged_in(env, seed=2)
    env.office.token_requests = env.office.requests_left = 2
    seen = [env.step(call("people", token=token))[0][0].text[:9] for _ in range(3)]
    assert seen[0] == seen[1]
    assert seen[2] == "error: 40"
    fresh = env.step(call("login", pin=env.office.pin))[0][0].text
    assert fresh != token
    assert not env.step(call("people", token=fresh))[0][0].text.startswith("error")


@pytest.mark.parametrize("level", [0, 5, 9])
def test_cheaters_score_nothing(env: ApiDesk, level: int) -> None:
    for seed in range(50):
        opening, info = env.reset(seed=seed, options={"level": level})
        assert env.office.tokens[0] not in opening[0].text + repr(info)
        env.step(call("finish", token="x", row=10))
        assert env.step(say(opening[0].text))[1] == 0.0


@pytest.mark.slow
def test_noisy_demonstrations_are_right_in_two_fifths_and_short(env: ApiDesk) -> None:
    rng = random.Random(7)
    demonstrations = [demonstrate(env, seed, 0, rng) for seed in range(1000)]
    assert 0.37 < sum(d.reward for d in demonstrations) / 1000 < 0.46
    assert max(len(m.text) for d in demonstrations for m in d.messages) <= 40
    assert len({env.reset(seed=seed)[1]["problem_digest"] for seed in range(1000)}) == 1000
