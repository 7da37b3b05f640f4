"""Group-relative advantages by hand, and what the price of tool calls may and may not do."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.algorithm.advantage import ADVANTAGES, ToolPrice, dr_grpo, grpo, has_signal, shaped_rewards
from rl.algorithm.choice import choose
from tests.rollout.trajectories import make_group, make_trajectory

REWARDS = st.lists(st.sampled_from([None, 0.0, 0.25, 1.0]), min_size=1, max_size=8)


def test_grpo_divides_by_the_unbiased_deviation() -> None:
    # mean 0.25, unbiased variance (3 * 0.0625 + 0.5625) / 3 = 0.25
    assert grpo([1, 0, 0, 0]) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)


def test_dr_grpo_only_subtracts_the_mean() -> None:
    assert dr_grpo([1, 0, 0, 0]) == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_the_scale_of_rewards_matters_to_dr_grpo_alone() -> None:
    assert grpo([10, 0]) == pytest.approx(grpo([1, 0]), rel=1e-5)
    assert dr_grpo([10, 0]) == [5, -5]


@pytest.mark.parametrize("advantage", [grpo, dr_grpo])
def test_a_failed_member_leaves_the_others_as_if_it_had_not_been_there(advantage) -> None:
    assert advantage([1, 3, 2, None])[:3] == advantage([1, 3, 2])
    assert advantage([1, 3, 2, None])[3] is None
    assert advantage([1, 3, 2]) == pytest.approx([-1, 1, 0], abs=2e-6)


@pytest.mark.parametrize("advantage", [grpo, dr_grpo])
def test_fewer_than_two_valid_members_have_no_advantage(advantage) -> None:
    assert advantage([None, 1.0, None]) == [None, None, None]
    assert advantage([]) == []


@pytest.mark.parametrize("advantage", [grpo, dr_grpo])
def test_equal_rewards_give_exactly_zero(advantage) -> None:
    assert advantage([0.1, 0.1, 0.1]) == [0.0, 0.0, 0.0]  # their mean is not 0.1 in floating point
    assert advantage([0.5, 0.5, None]) == [0.0, 0.0, None]


def test_unneeded_calls_of_correct_members_cost() -> None:
    assert shaped_rewards([1, 1, 1], [0, 1, 2], ToolPrice(cost=0.2)) == pytest.approx([1.0, 0.8, 0.6])


def test_calls_that_every_correct_member_made_are_free() -> None:
    assert shaped_rewards([1, 1, 0], [2, 2, 0], ToolPrice(cost=0.2)) == [1, 1, 0]


def test_the_cost_is_capped_at_half_the_distance_to_the_best_wrong_one() -> None:
    assert shaped_rewards([1, 1, 0, 0], [0, 9, 0, 9], ToolPrice(cost=0.2)) == pytest.approx([1.0, 0.5, 0, 0])
    # the best wrong one has 0.5: at most 0.25; the mean of 0.5, 0.5, 1, 0.75 is 0.6875
    assert shaped_rewards([1, 1, 0.5, 0.5], [0, 9, 0, 0], ToolPrice(cost=0.2)) == pytest.approx([1.0, 0.75, 0.5, 0.5])


def test_few_failures_shrink_the_cost_until_no_correct_member_is_below_the_mean() -> None:
    # cost c of seven callers: 1 - c = mean = (15 - 7 c) / 16  ->  c = 1/9
    shaped = shaped_rewards([1] * 15 + [0], [0] * 8 + [1] * 7 + [0], ToolPrice(cost=0.3))
    assert shaped[8:15] == pytest.approx([1 - 1 / 9] * 7)
    assert min(a for a in dr_grpo(shaped)[:15] if a is not None) == pytest.approx(0, abs=1e-12)


def test_an_all_wrong_group_stays_without_signal_however_it_called() -> None:
    assert grpo(shaped_rewards([0, 0, 0], [0, 3, 9], ToolPrice(cost=0.3))) == [0, 0, 0]


def test_an_all_correct_group_learns_to_call_less() -> None:
    advantages = grpo(shaped_rewards([1, 1, 1, None], [0, 0, 1, 0], ToolPrice(cost=0.3)))
    assert advantages[0] == advantages[1] > 0 > advantages[2]
    assert advantages[3] is None


def test_without_a_price_rewards_pass_unchanged() -> None:
    assert shaped_rewards([1, None, 0.5], [0, 3, 9], ToolPrice(cost=0.0)) == [1, None, 0.5]


def test_hard_groups_pay_nothing() -> None:
    half_wrong = [1, 1, 0, 0]
    assert shaped_rewards(half_wrong, [0, 9, 0, 0], ToolPrice(cost=0.2, below=0.5)) == half_wrong
    assert shaped_rewards([1, 1, 1, 0], [0, 9, 0, 0], ToolPrice(cost=0.2, below=0.5))[1] < 1


def test_what_the_oracle_spends_is_the_measure_where_the_environment_tells() -> None:
    price = ToolPrice(cost=0.1)
    assert shaped_rewards([1, 1, 1], [3, 4, 1], price, needed=2) == pytest.approx([0.9, 0.8, 1.0])
    assert shaped_rewards([1, 1, 1], [3, 4, 1], price) == pytest.approx([0.8, 0.7, 1.0])


@pytest.mark.parametrize(
    ("rewards", "costs", "signal"),
    [
        ([1.0, 1.0, 1.0], [0, 0, 0], False),
        ([1.0, 1.0, 1.0], [0, 0, 2], True),  # the price of a call tells them apart
        ([0.0, 0.0, 0.0], [0, 0, 2], False),
        ([1.0, 0.0, None], [0, 0, 0], True),
        ([1.0, None, None], [0, 0, 0], False),
        ([0.3, 0.3 + 1e-7, 0.3], [0, 0, 0], False),
    ],
)
def test_a_group_has_a_signal_where_its_priced_rewards_differ(rewards, costs, signal: bool) -> None:
    members = [make_trajectory(reward, calls=calls) for reward, calls in zip(rewards, costs, strict=True)]
    assert has_signal(make_group(members), ToolPrice(cost=0.2)) is signal


@given(REWARDS, st.data(), st.floats(0, 3))
def test_correct_stays_above_wrong_and_never_negative_beside_it(rewards, data, tool_cost) -> None:
    calls = data.draw(st.lists(st.integers(0, 5), min_size=len(rewards), max_size=len(rewards)))
    shaped = shaped_rewards(rewards, calls, ToolPrice(cost=tool_cost))
    wrong = [i for i, reward in enumerate(rewards) if reward is not None and reward < 1]
    correct = [i for i, reward in enumerate(rewards) if reward == 1]
    assert [shaped[i] for i in wrong] == [rewards[i] for i in wrong]
    assert all((a is None) == (b is None) for a, b in zip(shaped, rewards, strict=True))
    for advantage in (grpo, dr_grpo):
        values = advantage(shaped)
        for i in correct:
            assert all(shaped[i] > shaped[j] for j in wrong)
            if wrong:
                assert values[i] is not None and values[i] >= -1e-9
        ranked = sorted(correct, key=lambda i: calls[i])
        assert all(shaped[a] >= shaped[b] for a, b in pairwise(ranked))


def test_an_own_function_is_found_by_its_import_path() -> None:
    assert choose("advantage", "rl.algorithm.advantage:dr_grpo", ADVANTAGES) is dr_grpo
    assert choose("advantage", "math:fsum", ADVANTAGES) is math.fsum


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grop", "unknown advantage 'grop'. Did you mean 'grpo'?"),
        ("no_such_module:f", "cannot be imported"),
        ("rl.algorithm.advantage:nothing", "cannot be imported"),
        ("rl.algorithm.advantage:EQUAL", "is a float, not a function"),
    ],
)
def test_a_wrong_name_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="advantage") as error:
        choose("advantage", name, ADVANTAGES)
    assert message in str(error.value)
