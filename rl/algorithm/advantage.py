"""Group-relative advantages: how much better a trajectory did than others on the same task.

A reward of None marks an invalid member (failed episode, bad row). It takes no part in mean or deviation and its
advantage is None, so [1, 3, 2, None] gives what [1, 3, 2] gives. Fewer than two valid members teach nothing: all None.
An own function has the same shape: (rewards of one group) -> advantages, None where the reward is None.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rollout.record.trajectory import Trajectory, TrajectoryGroup

Rewards = Sequence[float | None]
AdvantageFunction = Callable[[Rewards], Sequence[float | None]]

EQUAL = 1e-6
"""Rewards this close are equal; a reward this close to 1 is correct."""


def grpo(rewards: Rewards) -> list[float | None]:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-6), with the unbiased std; 0 where all rewards are equal.

    Source: GRPO, arXiv 2402.03300, section 4.1.2. Example: grpo([1, 3, 2, None]) -> [-1.0, 1.0, 0.0, None]
    """
    return _relative(rewards, divide_by_std=True)


def dr_grpo(rewards: Rewards) -> list[float | None]:
    """A_i = r_i - mean(r): no division, which would favour very easy and very hard tasks.

    Source: Dr. GRPO, arXiv 2503.20783, section 3.2. Example: dr_grpo([1, 3, 2, None]) -> [-1.0, 1.0, 0.0, None]
    """
    return _relative(rewards, divide_by_std=False)


ADVANTAGES: dict[str, AdvantageFunction] = {"grpo": grpo, "dr_grpo": dr_grpo}


def _relative(rewards: Rewards, *, divide_by_std: bool) -> list[float | None]:
    valid = np.array([reward for reward in rewards if reward is not None], dtype=np.float64)
    if valid.size < 2:
        return [None] * len(rewards)
    if np.ptp(valid) <= EQUAL:  # exactly 0, not the rounding error of the mean
        return [None if reward is None else 0.0 for reward in rewards]
    scale = valid.std(ddof=1) + EQUAL if divide_by_std else 1.0
    mean = valid.mean()
    return [None if reward is None else float((reward - mean) / scale) for reward in rewards]


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolPrice:
    """What needless tool calls cost, and in which groups."""

    cost: float = 0.0
    """Of one unit of call costs; 0 = off."""
    below: float = 1.0
    """Only groups whose share of wrong members is below this pay; 1 = all that have a correct one."""


NO_PRICE = ToolPrice()


def shaped_rewards(
    rewards: Rewards, call_costs: Sequence[float], price: ToolPrice, *, needed: float | None = None
) -> list[float | None]:
    """Rewards of one group after the price of tool calls that were not needed.

        extra_i = max(0, c_i - n)                                        for correct members (reward >= 1 - 1e-6)
        cost_i  = min(price.cost * extra_i, (1 - best wrong reward) / 2)
        r'_i    = r_i - s * cost_i                                       wrong members keep their reward

    c_i sums the costs of the calls of member i: it is their number where no tool declares another cost than 1. n is
    `needed`, what the environment's oracle spends, or where that is not known the least c of the correct members. In
    a hard group, whose share of wrong members is price.below or more, nobody pays: there a call is a try.
    s = 1 where every member is correct. With a wrong member in the group, s in [0, 1] is the largest factor that
    leaves each correct member at or above the mean of the group.

    What follows. (1) A wrong trajectory never pays, so an all-wrong group stays without signal and "never call, be
    wrong" gains nothing. (2) A correct one is worth more than every wrong one, however often it called. (3) Its
    advantage is never negative while a wrong one exists: first be right, then be brief. The fewer members fail, the
    smaller the factor s, until none fails and the whole price counts. (4) A group that is all correct but differs in
    calls has a signal although its rewards are equal. After the division by the deviation (grpo) the price's size
    hardly matters in such a group, its order does.

    Source: AdaTIR, arXiv 2601.14696: cost on correct rollouts of easy tasks only, clipped so that correctness keeps
    its sign. Ours differs: linear in the calls beyond those needed (their sine of all calls over the limit also charges
    calls that the task needs); the clip (3) acts on rewards, so it holds for every advantage that is monotone around
    the mean.

    Example: shaped_rewards([1, 1, 1], [0, 1, 2], ToolPrice(cost=0.2)) -> [1.0, 0.8, 0.6]
    Example: shaped_rewards([1, 1, 0, 0], [0, 9, 0, 9], ToolPrice(cost=0.2)) -> [1.0, 0.5, 0, 0]
    """
    valid = {i: reward for i, reward in enumerate(rewards) if reward is not None}
    correct = {i: reward for i, reward in valid.items() if reward >= 1.0 - EQUAL}
    wrong = [reward for reward in valid.values() if reward < 1.0 - EQUAL]
    if price.cost == 0.0 or not correct or len(wrong) >= price.below * len(valid):
        return list(rewards)
    least = min(call_costs[i] for i in correct) if needed is None else needed
    cap = (1.0 - max(wrong, default=0.0)) / 2
    costs = {i: min(price.cost * max(0.0, call_costs[i] - least), cap) for i in correct}
    factor = _sign_keeping_factor(valid, costs) if wrong else 1.0
    return [reward if i not in costs else correct[i] - factor * costs[i] for i, reward in enumerate(rewards)]


def _sign_keeping_factor(valid: dict[int, float], costs: dict[int, float]) -> float:
    """Largest s in [0, 1] with r_i - s * cost_i >= mean(r') for every correct i; mean(r') falls with s too."""
    mean_reward = sum(valid.values()) / len(valid)
    mean_cost = sum(costs.values()) / len(valid)
    room = [max(0.0, valid[i] - mean_reward) / (cost - mean_cost) for i, cost in costs.items() if cost > mean_cost]
    return min([1.0, *room])


def priced_rewards(trajectories: Sequence[Trajectory], rewards: Rewards, price: ToolPrice) -> list[float | None]:
    """`shaped_rewards` of a group's `rewards` by what its trajectories tell: `meta["tool_cost"]` is what a member's
    calls cost, `meta["oracle_tool_cost"]` what the environment says that the task needs."""
    call_costs = [float(t.meta.get("tool_cost", 0.0)) for t in trajectories]
    needed = next((float(t.meta["oracle_tool_cost"]) for t in trajectories if "oracle_tool_cost" in t.meta), None)
    return shaped_rewards(rewards, call_costs, price, needed=needed)


def has_signal(group: TrajectoryGroup, price: ToolPrice) -> bool:
    """Whether anything can be learned from the group: std of its rewards, tool calls priced, is over 1e-6."""
    shaped = priced_rewards(group.trajectories, group.rewards, price)
    valid = [reward for reward in shaped if reward is not None]
    return len(valid) >= 2 and float(np.std(valid)) > EQUAL
