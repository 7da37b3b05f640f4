"""The learner step: what it changes, what it refuses, what it reports, and that it can be stopped and continued."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import LearnerConfig, LossConfig, OptimizerConfig
from policy.model.checkpoint_io import expected_tensors
from rl.algorithm.learner import SelfCheckError
from rollout.schedule.staleness import StalenessViolation
from tests.rl.learners import FAST, MIXED, edited, flat, make_learner, with_logprob
from tests.rollout.trajectories import (
    VOCAB,
    make_group,
    on_policy_groups,
    random_trajectory,
    tiny_model,
    with_logprobs_of,
)

# --- learning


def test_a_step_makes_what_was_rewarded_likelier_and_raises_the_version() -> None:
    model = tiny_model()
    groups = on_policy_groups(model, MIXED)
    report = make_learner(model).step(groups)
    assert (report.step, report.policy_version) == (1, 1)
    for group in groups:
        after = with_logprobs_of(model, group.trajectories)
        pairs = zip(after, group.trajectories, strict=True)
        gains = [float((new.rollout_logprobs - old.rollout_logprobs).sum()) for new, old in pairs]
        assert gains[0] > 0 > gains[2]  # rewarded 1 and 0


def test_the_first_step_is_the_gradient_step_of_the_formula() -> None:
    """Plain SGD, one group by hand: delta = lr * sum_i A_i * grad sum_t logprob / tokens."""
    model, reference = tiny_model(), tiny_model()
    config = LearnerConfig(
        optimizer=OptimizerConfig(name="tests.rl.test_learner:plain_sgd", lr=0.5, warmup_steps=0, grad_clip=0),
        loss=LossConfig(advantage="dr_grpo"),
    )
    [group] = on_policy_groups(model, [[1.0, 0.0]])
    make_learner(model, config).step([group])
    tokens = sum(t.num_sampled_tokens for t in group.trajectories)
    objective = torch.zeros(())
    for trajectory, advantage in zip(group.trajectories, (0.5, -0.5), strict=True):
        ids = torch.from_numpy(trajectory.token_ids).long()
        at = torch.from_numpy(np.flatnonzero(trajectory.loss_mask))
        logprobs = reference(ids, torch.tensor([0, len(ids)])).logits.log_softmax(-1)
        objective = objective + advantage * logprobs[at - 1, ids[at]].sum() / tokens
    objective.backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs + 0.5 * theirs.grad, atol=1e-6, rtol=1e-5)


def plain_sgd(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.lr)


def test_a_constant_reward_changes_no_weight_and_no_moment_even_after_real_steps() -> None:
    learner = make_learner(config=LearnerConfig(optimizer=replace(FAST, weight_decay=0.1)))
    learner.step(on_policy_groups(learner.model, MIXED))
    weights, (before, _) = flat(learner.model), learner.state()
    for _ in range(20):
        report = learner.step(on_policy_groups(tiny_model(), [[1.0] * 3, [0.0] * 3]))
        assert {row.status for row in report.rows} == {"zero_advantage"}
        assert "optim/grad_norm" not in report.metrics
    assert torch.equal(flat(learner.model), weights)
    after, _ = learner.state()
    assert all(np.array_equal(before["optimizer"][k], after["optimizer"][k]) for k in before["optimizer"])
    assert report.metrics["group/frac_mixed"] == 0 and report.metrics["group/frac_all_good"] == 0.5
    assert learner.policy_version == 21


def test_micro_batches_do_not_change_the_step() -> None:
    results = []
    for max_tokens in (1, 60, 100_000):
        model = tiny_model()
        config = LearnerConfig(optimizer=replace(FAST, name="tests.rl.test_learner:plain_sgd", lr=1.0))
        make_learner(model, replace(config, micro_batch_tokens=max_tokens)).step(on_policy_groups(model, MIXED))
        results.append(flat(model))
    torch.testing.assert_close(results[0], results[2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(results[1], results[2], atol=1e-6, rtol=1e-5)


def test_two_updates_a_step_train_half_the_groups_each_against_the_same_proximal_policy() -> None:
    model = tiny_model()
    learner = make_learner(model, LearnerConfig(optimizer=FAST, updates_per_step=2))
    groups = on_policy_groups(model, MIXED)
    report = learner.step(groups)
    assert (report.step, report.policy_version) == (1, 2)
    assert [row.status for row in report.rows] == ["trained"] * 6
    for row, trajectory in zip(report.rows, (t for g in groups for t in g.trajectories), strict=True):
        assert row.learner_logprobs is not None  # of the weights at the start, for the second half too
        np.testing.assert_allclose(row.learner_logprobs, trajectory.rollout_logprobs, atol=1e-4)
    assert report.metrics["policy/kl"] > 1e-6  # the second half was trained by moved weights
    assert learner.step(on_policy_groups(model, MIXED, version=2)).policy_version == 4


def test_one_update_a_step_has_no_kl_and_clips_nothing() -> None:
    model = tiny_model()
    metrics = make_learner(model).step(on_policy_groups(model, MIXED)).metrics
    assert (metrics["policy/kl"], metrics["policy/clip_fraction"]) == (0.0, 0.0)


def test_an_own_loss_is_found_by_its_import_path_and_its_metrics_are_logged() -> None:
    config = LearnerConfig(optimizer=FAST, loss=LossConfig(name="tests.rl.learners:own_loss"))
    model = tiny_model()
    metrics = make_learner(model, config).step(on_policy_groups(model, MIXED)).metrics
    assert metrics["policy/ones"] == 1.0


def test_tool_costs_teach_from_a_group_whose_rewards_are_equal() -> None:
    model = tiny_model()
    [group] = on_policy_groups(model, [[1.0, 1.0]])
    group = edited(group, 1, meta={"num_tool_calls": 2, "tool_cost": 2.0})
    report = make_learner(model, tool_cost=0.1).step([group])
    assert [row.status for row in report.rows] == ["trained", "trained"]
    assert report.rows[0].advantage is not None and report.rows[0].advantage > 0
    assert report.metrics["group/frac_all_good"] == 1.0 and report.metrics["reward/mean"] == 1.0
    assert report.metrics["tool/calls_mean"] == 1.0


# --- what it refuses


def test_a_group_older_than_the_bound_raises_before_anything_changes() -> None:
    model = tiny_model()
    learner = make_learner(model, max_staleness=1)
    learner.step(on_policy_groups(model, MIXED))
    learner.step(on_policy_groups(model, MIXED, version=0))
    weights = flat(model)
    with pytest.raises(StalenessViolation):
        learner.step(on_policy_groups(model, MIXED, version=0))
    assert torch.equal(flat(model), weights) and learner.policy_version == 2


def test_the_oldest_token_decides_about_staleness() -> None:
    model = tiny_model()
    learner = make_learner(model, max_staleness=0)
    learner.step(on_policy_groups(model, MIXED))
    [group] = on_policy_groups(model, [[1.0, 0.0]], version=1)
    versions = group.trajectories[0].policy_versions.copy()
    versions[np.flatnonzero(versions == 1)[0]] = 0
    with pytest.raises(StalenessViolation):
        learner.step([edited(group, 0, policy_versions=versions)])


def test_with_several_updates_a_step_staleness_is_counted_in_steps() -> None:
    model = tiny_model()
    learner = make_learner(model, LearnerConfig(optimizer=FAST, updates_per_step=2), max_staleness=1)
    learner.step(on_policy_groups(model, MIXED))
    learner.step(on_policy_groups(model, MIXED, version=0))
    with pytest.raises(StalenessViolation):
        learner.step(on_policy_groups(model, MIXED, version=0))


def test_the_self_check_passes_on_the_models_own_logprobs_and_reports_them_for_every_row() -> None:
    model = tiny_model()
    report = make_learner(model).step(on_policy_groups(model, [[1.0, 0.0], [1.0, 1.0]]))
    assert report.metrics["policy/logprob_abs_diff/max"] < 1e-4
    assert report.metrics["policy/importance_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert report.metrics["policy/ess_ratio"] == pytest.approx(1, abs=1e-6)
    assert all(row.learner_logprobs is not None for row in report.rows)


@pytest.mark.parametrize("change", ["one token", "temperature", "weights"])
def test_the_self_check_names_trajectory_token_and_both_values(change: str) -> None:
    model = tiny_model()
    groups = on_policy_groups(model, MIXED)
    if change == "one token":
        first = groups[1].trajectories[2]
        groups[1] = edited(groups[1], 2, rollout_logprobs=with_logprob(first, -0.25))
    elif change == "temperature":
        groups[0] = edited(groups[0], 0, temperature=0.7)
    else:
        groups = on_policy_groups(tiny_model(seed=1), MIXED)
    weights = flat(model)
    with pytest.raises(SelfCheckError) as error:
        make_learner(model).step(groups)
    assert torch.equal(flat(model), weights)
    if change == "one token":
        token = np.flatnonzero(first.loss_mask)[0]
        assert f"'g1/2', token {token}: learner logprob {first.rollout_logprobs[token]:.6f}" in str(error.value)
        assert "rollout logprob -0.250000" in str(error.value)


def test_the_self_check_waits_for_trajectories_of_the_current_version_and_is_done_once() -> None:
    model = tiny_model()
    learner = make_learner(model)
    foreign = tiny_model(seed=1)
    learner.policy_version = 3
    learner.step(on_policy_groups(foreign, MIXED, version=2))  # older weights may differ
    with pytest.raises(SelfCheckError):
        learner.step(on_policy_groups(foreign, MIXED, version=4))
    learner.step(on_policy_groups(model, MIXED, version=4))
    learner.step(on_policy_groups(foreign, MIXED, version=5))  # checked before; the metrics tell from now on


def test_a_wider_tolerance_can_be_set() -> None:
    model = tiny_model()
    [group] = on_policy_groups(model, [[1.0, 0.0]])
    group = edited(
        group, 0, rollout_logprobs=group.trajectories[0].rollout_logprobs - 0.01 * group.trajectories[0].loss_mask
    )
    make_learner(model, LearnerConfig(optimizer=FAST, self_check_tolerance=0.02)).step([group])
    with pytest.raises(SelfCheckError):
        make_learner(tiny_model()).step([group])


def test_banned_tokens_are_left_out_of_the_softmax_and_refused_as_samples() -> None:
    model = tiny_model()
    rng = np.random.default_rng(0)
    free = [random_trajectory(rng, r) for r in (1.0, 0.0, 0.0)]
    free = [replace(t, token_ids=np.maximum(t.token_ids, 4).astype(np.int32)) for t in free]
    sampled = with_logprobs_of(model, free, banned=[0, 1, 2, 3])
    sampled[2] = replace(sampled[2], token_ids=np.full_like(sampled[2].token_ids, 3))
    report = make_learner(model, banned=[0, 1, 2, 3]).step([make_group(sampled)])
    assert [row.status for row in report.rows] == ["trained", "trained", "quarantined"]
    with pytest.raises(SelfCheckError):
        make_learner(tiny_model()).step([make_group(sampled[:2])])


# --- state


def test_five_and_five_steps_equal_ten_bit_for_bit() -> None:
    batches = [on_policy_groups(tiny_model(), MIXED, seed=i) for i in range(10)]
    config = LearnerConfig(optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine", weight_decay=0.1))
    whole = make_learner(config=config)
    for groups in batches:
        whole.step(groups)
    first = make_learner(config=config)
    for groups in batches[:5]:
        first.step(groups)
    second = make_learner(tiny_model(seed=9), config)
    second.load_state(*first.state())
    for groups in batches[5:]:
        report = second.step(groups)
    assert (report.step, report.policy_version) == (10, 10)
    assert second.snapshot().digest == whole.snapshot().digest
    ours, theirs = second.state(), whole.state()
    assert ours[1] == theirs[1]
    assert ours[0]["optimizer"].keys() == theirs[0]["optimizer"].keys()
    assert all(np.array_equal(ours[0]["optimizer"][k], v) for k, v in theirs[0]["optimizer"].items())


def test_a_snapshot_verifies_and_later_steps_do_not_change_it() -> None:
    model = tiny_model()
    learner = make_learner(model)
    snapshot = learner.snapshot()
    learner.step(on_policy_groups(model, MIXED))
    snapshot.verify(expected_tensors(model))
    assert snapshot.version == 0 and learner.snapshot().version == 1
    assert snapshot.digest != learner.snapshot().digest


def test_optimizer_state_of_another_model_is_refused() -> None:
    learner = make_learner()
    learner.step(on_policy_groups(learner.model, MIXED))
    tensors, counters = learner.state()
    tensors["optimizer"] = {f"x.{name}": value for name, value in tensors["optimizer"].items()}
    with pytest.raises(ValueError, match="belongs to no parameter"):
        make_learner().load_state(tensors, counters)


# --- metrics


def test_lags_are_counted_per_trajectory_from_the_oldest_token() -> None:
    model = tiny_model()
    learner = make_learner(model)
    learner.policy_version = 5
    [old], [new] = on_policy_groups(model, [[1.0, 0.0]], version=3), on_policy_groups(model, [[1.0, 0.0]], version=5)
    metrics = learner.step([old, replace(new, group_id="h")]).metrics
    assert (metrics["off_policy/lag/count/0"], metrics["off_policy/lag/count/2"]) == (2, 2)
    assert (metrics["off_policy/lag/mean"], metrics["off_policy/lag/max"]) == (1, 2)
    assert metrics["off_policy/versions_per_trajectory"] == 1


def test_mismatch_metrics_by_hand() -> None:
    model = tiny_model()
    learner = make_learner(model)
    learner.policy_version = 1
    [group] = on_policy_groups(model, [[1.0, 0.0]], version=0)
    shifted = [replace(t, rollout_logprobs=t.rollout_logprobs - 0.5 * t.loss_mask) for t in group.trajectories]
    metrics = learner.step([make_group(shifted)]).metrics
    assert metrics["policy/logprob_abs_diff/mean"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["policy/importance_ratio/max"] == pytest.approx(math.exp(0.5), abs=1e-3)
    assert metrics["policy/mismatch_kl/mean"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-3)
    assert metrics["policy/mismatch_kl/lag/1"] == pytest.approx(math.exp(0.5) - 1.5, abs=1e-3)
    assert metrics["policy/ess_ratio"] == pytest.approx(1, abs=1e-5)


def test_rewards_are_reported_by_environment_part_and_group() -> None:
    model = tiny_model()
    groups = on_policy_groups(model, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    groups[1] = edited(groups[1], 0, task=replace(groups[1].task, env_name="shop"), reward_parts={"answer": 0.75})
    metrics = make_learner(model).step(groups).metrics
    assert metrics["reward/shop/mean"] == 1.0 and metrics["reward/calc/mean"] == pytest.approx(0.4)
    assert metrics["reward/answer"] == 0.75
    assert [metrics[f"group/frac_{k}"] for k in ("mixed", "all_good", "all_bad")] == pytest.approx([1 / 3] * 3)
    assert metrics["rows/trained"] == 2 and metrics["rows/zero_advantage"] == 4
    assert metrics["trainer/tokens"] == sum(t.num_sampled_tokens for t in groups[0].trajectories)
    assert 0 < metrics["policy/entropy"] <= math.log(VOCAB)
