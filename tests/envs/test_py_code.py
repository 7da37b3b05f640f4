"""PyCode-v0: solvable by its oracle, short at level 0, and not to be talked into a verdict."""

import random

import pytest

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.py_code import PyCode, compose, results
from envs.message import Message, ToolCall
from envs.registry import make_env
from envs.sandbox import confinement
from tests.envs.sandbox_attacks import CHEATS

pytestmark = [
    pytest.mark.skipif(bool(confinement.missing_features()), reason="this kernel cannot confine"),
    pytest.mark.slow,
    pytest.mark.sandbox,
]


@pytest.fixture(scope="module")
def env() -> PyCode:
    made = make_env("PyCode-v0")
    assert isinstance(made, PyCode)
    return made


def mean_reward(env: PyCode, answer: str, level: int, count: int = 10) -> float:
    rewards = []
    for seed in range(count):
        env.reset(seed=seed, options={"level": level})
        rewards.append(env.step(answer)[1])
    return sum(rewards) / count


@pytest.mark.parametrize("level", range(10))
def test_the_oracle_scores_one(env: PyCode, level: int) -> None:
    done = [demonstrate(env, seed, level) for seed in range(5)]
    assert {(d.reward, d.meta["tests_passed"]) for d in done} == {(1.0, 1.0)}


def test_level_0_fits_a_model_of_bytes(env: PyCode) -> None:
    rng = random.Random(0)
    for seed in range(300):
        env.reset(seed=seed)
        assert len(env.problem.prompt) <= 60
        assert len(env.code) <= 40
        policy = env.noisy_oracle(rng)
        first = next(policy)
        said = [env.problem.prompt, *map(str, first.tool_calls[0].arguments.values())] if first.tool_calls else []
        assert sum(map(len, said)) + 2 * 40 <= 200


@pytest.mark.parametrize("level", range(10))
def test_thousands_of_problems_differ(env: PyCode, level: int) -> None:
    specifications = set()
    for seed in range(300):
        env.reset(seed=seed, options={"level": level})
        specifications.add(env.problem.prompt)
    assert len(specifications) > 285  # 300 draws of n things give about 300 - 45,000/n different ones


@pytest.mark.parametrize("level", [0, 4, 9])
@pytest.mark.parametrize(
    "answer",
    ["", "nan", "0", "lambda x:x", "lambda x:0", "lambda x:x*2", "add 7, mul 3", "\x00\ud800", "(" * 3000, "x" * 5000],
)
def test_guesses_score_nothing(env: PyCode, answer: str, level: int) -> None:
    assert mean_reward(env, answer, level) < 0.2


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheater_scores_nothing(env: PyCode, name: str) -> None:
    assert mean_reward(env, CHEATS[name], level=0, count=1) == 0.0
    assert demonstrate(env, seed=3, level=0).reward == 1.0  # and nothing is left of it


def test_true_is_not_one_and_a_bool_passes_no_number_test(env: PyCode) -> None:
    env.reset(seed=0)
    env.inputs, env.outputs = [5] * 12, [1] * 12
    assert env.step("lambda x: x == 5")[1] == 0.0
    env.reset(seed=0)
    env.inputs, env.outputs = [5] * 12, [1] * 12
    assert env.step("lambda x: 1")[1] == 1.0


def test_part_of_the_tests_is_a_metric_and_no_reward(env: PyCode) -> None:
    env.reset(seed=1)
    half = env.inputs[:6]
    env.step(f"lambda x: ({env.code})(x) if x in {half} else None")
    assert 0.0 < env.meta()["tests_passed"] < 1.0
    env.reset(seed=1)
    _, reward, *_, info = env.step(f"lambda x: ({env.code})(x) if x in {half} else None")
    assert (reward, info["reward_parts"]) == (0.0, {"tests": 0.0})


@pytest.mark.parametrize("form", ["{0}", " {0}\n", "f = {0}", "```python\n{0}\n```", "```\nf = {0}\n```"])
def test_usual_forms_of_an_answer_count(env: PyCode, form: str) -> None:
    env.reset(seed=2)
    assert env.step(form.format(env.code))[1] == 1.0


def test_code_can_be_tried_first_and_always_trying_earns_nothing(env: PyCode) -> None:
    env.reset(seed=0)
    replies, *_ = env.step(call("python", code="print('a')\n(lambda x:x+1)(41)"))
    assert replies[0].text == "a\n42"
    for _ in range(2):
        replies, _, _, truncated, _ = env.step(call("python", code="1/0"))
        assert replies[0].text == "ZeroDivisionError: division by zero"
    _, reward, terminated, truncated, _ = env.step(call("python", code="1"))
    assert (reward, terminated, truncated) == (0.0, False, True)


def test_malformed_calls_never_raise(env: PyCode) -> None:
    for arguments in [{}, {"code": None}, {"code": "\ud800"}, {"code": "\0"}, {"x": 1}]:
        env.reset(seed=0)
        replies, *_ = env.step(Message.assistant(calls=[ToolCall(name="python", arguments=arguments)]))
        assert len(replies[0].text) < 300


def test_the_noisy_oracle_is_right_in_about_four_of_ten(env: PyCode) -> None:
    for level in (0, 4, 6, 9):
        wins = 0
        for seed in range(200):
            env.reset(seed=seed, options={"level": level})
            *_, last = list(env.noisy_oracle(random.Random(seed)))
            wins += results(last.text, env.inputs) == env.outputs
        assert 0.3 < wins / 200 < 0.5
        assert say(last.text) == last


def test_brackets_stand_where_they_are_needed() -> None:
    assert compose(["({}+7)", "{}*3"]) == "(x+7)*3"
    assert compose(["{}*3", "({}+7)"]) == "x*3+7"
    assert compose(["{}*3", "({})**2"]) == "(x*3)**2"


def test_close_ends_the_sandbox() -> None:
    own = make_env("PyCode-v0")
    own.reset(seed=0)
    own.close()
    own.close()
    with pytest.raises(RuntimeError, match="closed"):
        own.step("lambda x: 1")
