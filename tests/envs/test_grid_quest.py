"""GridQuest-v0: every grid has a way out, doors and the exit hold without their key, and views tell the truth."""

import random

import pytest

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.grid_quest import GridQuest, offset_text, ways
from envs.registry import make_env


@pytest.fixture
def env() -> GridQuest:
    made = make_env("GridQuest-v0")
    assert isinstance(made, GridQuest)
    return made


def test_the_oracle_gets_out_at_every_level_without_an_error(env: GridQuest) -> None:
    for level in range(10):
        demonstrations = [demonstrate(env, seed, level) for seed in range(20)]
        assert {d.reward for d in demonstrations} == {1.0}
        assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}
        assert all(d.meta["num_tool_calls"] < 0.85 * env.max_turns for d in demonstrations)


def test_horizons_grow_from_a_handful_to_hundreds_of_calls(env: GridQuest) -> None:
    medians = []
    for level in range(10):
        env.reset(seed=0, options={"level": level})
        lengths = []
        for seed in range(40):
            env.reset(seed=seed, options={"level": level})
            lengths.append(env.problem.meta["fewest_calls"])
        medians.append(sorted(lengths)[20])
    assert 3 <= medians[0] <= 5
    assert medians[9] >= 100
    assert all(later >= earlier for earlier, later in zip(medians, medians[2:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 1, 5, 9])
def test_locks_hold_without_their_key(env: GridQuest, level: int) -> None:
    for seed in range(20):
        env.reset(seed=seed, options={"level": level})
        env.max_turns = 10**6
        without = [name for name in env.calls if name != "take"]
        seen = [env.step(call("go", way=way))[0][0].text for way in without]
        assert "error: locked" in seen
        assert env.reward("done") == {"out": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 5, 9])
def test_cheaters_score_nothing(env: GridQuest, level: int) -> None:
    rewards = []
    for seed in range(20):
        for action in (call("go", way="e"), call("go", way="n"), call("take")):
            env.reset(seed=seed, options={"level": level})
            for _ in range(9):
                env.step(action)
            rewards.append(env.step(say("done"))[1])
    assert set(rewards) == {0.0}


def test_a_view_lists_things_with_their_way(env: GridQuest) -> None:
    env.reset(seed=0)
    env.level, env.here, env.exit = 0, (2, 2), (2, 0)
    env.locks, env.keys, env.held = {(2, 0): "k"}, {(3, 3): "k", (1, 2): "m"}, []
    assert env._view() == "exit k n2 k e1s1 m w1"
    assert env.go("w") == "exit k e1n2 k e2s1 m here"
    assert env.take() == "+m exit k e1n2 k e2s1"
    assert (offset_text((0, 0), (0, 0)), ways((0, 0), [(1, 0), (1, 1)])) == ("here", ["e", "s"])


def test_mistakes_are_short_observations(env: GridQuest) -> None:
    opening, _ = env.reset(seed=0)
    assert len(opening[0].text) <= 40
    assert env.step(call("take"))[0][0].text == "error: no key here"
    assert env.step(call("go", way="up"))[0][0].text.startswith("error: way ")
    env.here = (0, 0)
    assert env.step(call("go", way="n"))[0][0].text == "error: wall"


@pytest.mark.slow
def test_noisy_demonstrations_are_right_in_two_fifths_and_short(env: GridQuest) -> None:
    rng = random.Random(7)
    demonstrations = [demonstrate(env, seed, 0, rng) for seed in range(1000)]
    assert 0.36 < sum(d.reward for d in demonstrations) / 1000 < 0.46
    assert max(len(m.text) for d in demonstrations for m in d.messages) <= 30
    assert len({env.reset(seed=seed)[1]["problem_digest"] for seed in range(1000)}) > 980


def test_a_given_turn_limit_holds_at_every_level() -> None:
    env = make_env("GridQuest-v0", max_turns=3)
    assert [env.reset(seed=0, options={"level": level})[1]["max_turns"] for level in (0, 9)] == [3, 3]
