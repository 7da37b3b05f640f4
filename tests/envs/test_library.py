"""The built-in environments: solvable by their oracle, not by cheating, and noisy where a warm start needs noise."""

import random

import pytest

from envs.base import AgentEnv, call, say
from envs.check.demonstration import demonstrate
from envs.message import Message, ToolCall
from envs.registry import make_env

IDS = ["Calculator-v0", "ToolGate-v0", "ShopDB-v0"]
ALWAYS_CALL = {
    "Calculator-v0": call("add", a=1, b=1),
    "ToolGate-v0": call("add", a=1, b=1),
    "ShopDB-v0": call("sql", query="select sum(amount) from orders"),
}


def gold(env: AgentEnv, seed: int, level: int) -> str:
    return demonstrate(env, seed, level).messages[-1].text


@pytest.mark.parametrize("env_id", IDS)
def test_the_oracle_scores_one_at_every_level(env_id: str) -> None:
    env = make_env(env_id)
    demonstrations = [demonstrate(env, seed, level) for level in range(10) for seed in range(20)]
    assert {d.reward for d in demonstrations} == {1.0}
    assert all(isinstance(d.meta["needs_tool"], bool) for d in demonstrations)
    assert all(bool(d.meta["num_tool_calls"]) == d.meta["needs_tool"] for d in demonstrations)
    assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("level", [0, 5, 9])
def test_cheaters_score_less_than_a_fifth(env_id: str, level: int) -> None:
    env = make_env(env_id)
    rng = random.Random(0)

    def mean_reward(answer: str | None, *, calls: bool) -> float:
        """Answer with a text, or with the prompt (None) or the last tool result."""
        rewards = []
        for seed in range(50):
            opening, _ = env.reset(seed=seed, options={"level": level})
            text = opening[0].text if answer is None else answer
            if calls:
                replies, *_ = env.step(ALWAYS_CALL[env_id])
                text = replies[0].text
            rewards.append(env.step(text)[1])
        return sum(rewards) / len(rewards)

    assert mean_reward("", calls=True) < 0.2
    for answer in ("", "nan", "0", "1", "5", "99", "[REWARD]", "\x00\ud800", str(rng.getrandbits(20)), None):
        assert mean_reward(answer, calls=False) < 0.2


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("level", [0, 5, 9])
def test_the_right_answer_is_not_shown_before_it_is_worked_out(env_id: str, level: int) -> None:
    env = make_env(env_id)
    for seed in range(50):
        right = gold(env, seed, level)
        opening, info = env.reset(seed=seed, options={"level": level})
        assert right not in opening[0].text.replace("(", " ")
        assert {str(value) for value in info["meta"].values()}.isdisjoint({right} - {str(level), "0"})


@pytest.mark.parametrize("env_id", IDS)
def test_malformed_calls_never_raise(env_id: str) -> None:
    env = make_env(env_id)
    name = ALWAYS_CALL[env_id].tool_calls[0].name
    hostile = [{}, {"a": None}, {"a": "9" * 10_000, "b": "1"}, {"query": "\x00"}, {"query": "\ud800"}, {"": ""}]
    for arguments in hostile:
        env.reset(seed=0)
        replies, *_ = env.step(Message.assistant(calls=[ToolCall(name=name, arguments=arguments)]))
        result = replies[0].tool_result
        assert result is not None
        assert result.error in ("bad_arguments", "tool_error")
        assert result.content.startswith("error: ")
        assert len(result.content) < 300


@pytest.mark.parametrize(
    ("env_id", "low", "high"), [("Calculator-v0", 0.41, 0.49), ("ToolGate-v0", 0.87, 0.94), ("ShopDB-v0", 0.37, 0.47)]
)
def test_noisy_demonstrations_are_right_at_the_intended_rate(env_id: str, low: float, high: float) -> None:
    env, rng = make_env(env_id), random.Random(7)
    rewards = [demonstrate(env, seed, 0, rng).reward for seed in range(1000)]
    assert low < sum(rewards) / len(rewards) < high


def test_noisy_calculator_mostly_skips_the_tool_where_it_is_wrong() -> None:
    env, rng = make_env("Calculator-v0"), random.Random(7)
    demonstrations = [demonstrate(env, seed, 0, rng) for seed in range(1000)]
    skipped = [d for d in demonstrations if d.meta["num_tool_calls"] == 0]
    slipped = [d for d in demonstrations if d.meta["num_tool_calls"] == 1 and d.reward == 0]
    assert 0.36 < len(skipped) / 1000 < 0.44
    assert 0.12 < len(slipped) / 1000 < 0.18
    assert {d.reward for d in skipped} == {0.0}
    assert all(d.messages[-1].text == d.messages[-2].text for d in slipped)


def test_noisy_tool_gate_calls_without_need_in_half_of_the_cases() -> None:
    env, rng = make_env("ToolGate-v0"), random.Random(7)
    free = [d for d in (demonstrate(env, seed, 0, rng) for seed in range(1000)) if not d.meta["needs_tool"]]
    assert 0.45 < len(free) / 1000 < 0.55
    assert 0.44 < sum(d.meta["num_tool_calls"] > 0 for d in free) / len(free) < 0.56
    assert sum(d.reward for d in free) / len(free) > 0.9


@pytest.mark.parametrize("env_id", IDS)
def test_texts_are_short_enough_for_a_byte_model(env_id: str) -> None:
    env = make_env(env_id)
    for seed in range(100):
        demonstration = demonstrate(env, seed, 0, random.Random(seed))
        texts = [m.text for m in demonstration.messages if m.role != "assistant"]
        assert max(map(len, texts)) <= 16
        arguments = [a for m in demonstration.messages for c in m.tool_calls for a in c.arguments.values()]
        assert max([len(str(a)) for a in arguments], default=0) <= 54


def test_an_unneeded_call_costs_nothing_in_the_environment() -> None:
    env = make_env("ToolGate-v0")
    seed = next(s for s in range(50) if not demonstrate(env, s, 0).meta["needs_tool"])
    right = gold(env, seed, 0)
    env.reset(seed=seed)
    env.step(call("add", a=1, b=1))
    assert env.step(say(right))[1] == 1.0


@pytest.mark.parametrize("env_id", IDS)
def test_level_zero_has_room_for_a_disjoint_held_out_set(env_id: str) -> None:
    env = make_env(env_id)
    digests = {env.reset(seed=seed)[1]["problem_digest"] for seed in range(1000)}
    assert len(digests) > 950  # of the 20,000 problems of the calculator a thousand draws repeat about 25
