"""Values that are not finite: what they touch is left out or skipped, and said."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.schema import LearnerConfig, LossConfig
from rl.algorithm.learner import LearnerError
from rl.algorithm.loss import LossInputs
from rollout.record.trajectory import StopReason
from tests.rl.learners import FAST, MIXED, edited, flat, make_learner, own_loss, with_logprob
from tests.rollout.trajectories import (
    on_policy_groups,
    tiny_model,
)

# --- values that are not finite (pitfalls A11)


def test_a_nan_logprob_quarantines_its_row_and_the_rest_is_trained() -> None:
    model = tiny_model()
    groups = on_policy_groups(model, MIXED)
    bad = edited(groups[0], 1, rollout_logprobs=with_logprob(groups[0].trajectories[1], float("nan")))
    report = make_learner(model).step([bad, groups[1]])
    assert report.metrics["rows/quarantined"] == 1 and report.metrics["rows/trained"] == 5
    assert (report.rows[1].status, report.rows[1].advantage) == ("quarantined", None)
    assert bool(torch.isfinite(flat(model)).all())


def test_a_nan_reward_quarantines_its_row() -> None:
    model = tiny_model()
    report = make_learner(model).step([edited(on_policy_groups(model, [[1.0, 0.0, 0.0]])[0], 0, reward=math.nan)])
    assert [row.status for row in report.rows] == ["quarantined", "zero_advantage", "zero_advantage"]
    assert report.metrics["reward/mean"] == 0.0


def nan_gradient(inputs: LossInputs, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Finite, but its gradient is not: d sqrt(x) / dx at 0."""
    zero = (inputs.logprobs - inputs.logprobs.detach()).sum()
    return zero.abs().sqrt(), {}


def nan_loss(inputs: LossInputs, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return inputs.logprobs.sum() * math.nan, {}


@pytest.mark.parametrize("name", ["nan_gradient", "nan_loss"])
def test_an_update_that_is_not_finite_is_skipped_counted_and_reported(name: str) -> None:
    model = tiny_model()
    learner = make_learner(model)
    learner.step(on_policy_groups(model, MIXED))
    weights, (before, _) = flat(model), learner.state()
    bad = make_learner(
        model, LearnerConfig(optimizer=FAST, loss=LossConfig(name=f"tests.rl.test_learner_faults:{name}"))
    )
    bad.load_state(*learner.state())
    report = bad.step(on_policy_groups(model, MIXED, version=1))
    after, counters = bad.state()
    assert torch.equal(flat(model), weights)
    assert all(np.array_equal(before["optimizer"][k], after["optimizer"][k]) for k in before["optimizer"])
    assert report.metrics["loss/nan_count"] == 1 and counters["skipped_updates"] == 1
    assert report.policy_version == 2  # of equal weights: slots and staleness go on
    assert {row.status for row in report.rows} == {"excluded"} and "update skipped" in report.rows[0].cause
    assert report.metrics["reward/mean"] == 0.5
    assert all(p.grad is None for p in model.parameters())


def test_too_many_skipped_updates_in_a_row_stop_the_run() -> None:
    config = LearnerConfig(optimizer=replace(FAST, max_skipped_steps=2), loss=LossConfig(name=f"{__name__}:nan_loss"))
    model = tiny_model()
    learner = make_learner(model, config)
    for version in range(2):
        learner.step(on_policy_groups(model, MIXED, version=version))
    with pytest.raises(LearnerError, match="3 updates in a row"):
        learner.step(on_policy_groups(model, MIXED, version=2))


def test_a_good_update_between_skipped_ones_starts_the_count_again() -> None:
    config = LearnerConfig(
        optimizer=replace(FAST, max_skipped_steps=1),
        loss=LossConfig(advantage="dr_grpo", name=f"{__name__}:nan_if_told"),
    )
    model = tiny_model()
    learner = make_learner(model, config)
    for version, reward in enumerate([9.0, 1.0, 9.0, 1.0, 9.0]):
        report = learner.step(on_policy_groups(model, [[reward, 0.0]], version=version))
    assert report.metrics["loss/nan_count"] == 3 and learner.policy_version == 5


def nan_if_told(inputs: LossInputs, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, metrics = own_loss(inputs, config)
    return (loss * math.nan if float(inputs.advantages.max()) > 2 else loss), metrics


def test_failed_trajectories_are_never_trained_and_are_counted() -> None:
    model = tiny_model()
    [group] = on_policy_groups(model, [[1.0, 0.0, None]])
    group = edited(group, 2, stop_reason=StopReason.ENV_ERROR)
    report = make_learner(model).step([group])
    assert [row.status for row in report.rows] == ["trained", "trained", "excluded"]
    assert report.metrics["env/error_ratio"] == pytest.approx(1 / 3)
    assert report.metrics["stop/env_error"] == pytest.approx(1 / 3)
