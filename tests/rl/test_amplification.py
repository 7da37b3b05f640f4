"""What RL can make of a policy, from the rewards of its episodes."""

import numpy as np
import pytest

from rl.loop.amplification import sampled_success
from rollout.record.trajectory import Trajectory
from tests.rollout.trajectories import random_trajectory


def episodes(*rewards: float | None) -> list[Trajectory]:
    return [random_trajectory(np.random.default_rng(0), reward) for reward in rewards]


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([(0, 0), (0, 0)], "RL has nothing to amplify, for no episode is right; more sft.steps, or a lower env.level"),
        ([(0, 1), (0, 0)], "RL can amplify it, for 1 of the 2 tasks earn now more, now less"),
        ([(0.2, 0.5), (0, 0)], "RL can amplify it, for 1 of the 2 tasks earn now more, now less"),
        ([(1, 1), (0, 0)], "for each task is solved always or never; choose another env.level"),
        ([(1, 1), (1, 1)], "nearly solved, so RL has little to amplify; raise env.level"),
        ([(None, None)], "sampled success is unknown: all 2 episodes failed"),
    ],
)
def test_the_outlook_follows_from_how_tasks_are_solved(groups, sentence) -> None:  # faults F3
    assert sentence in sampled_success([episodes(*group) for group in groups]).sentence


def test_a_failed_episode_is_told_and_is_no_wrong_answer() -> None:  # faults F3
    found = sampled_success([episodes(1, None), episodes(0, 0)])
    assert (found.episodes, found.errors, found.right, found.tasks) == (3, 1, 1, 2)
    assert found.sentence.startswith("sampled success 0.333 (95% ") and ", 1 failed)" in found.sentence
