"""What is decayed, and the rate of each step."""

from dataclasses import replace

import pytest

from conf.schema import LearnerConfig, OptimizerConfig
from rl.algorithm.optimizer import build_optimizer, learning_rate, parameter_groups
from tests.rl.learners import make_learner
from tests.rollout.trajectories import (
    make_group,
    make_trajectory,
    tiny_model,
)

# --- optimizer


def test_memory_span_convolution_norms_and_biases_are_never_decayed() -> None:
    model = tiny_model()
    decayed, spared = parameter_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    spared_names = {name_of[p] for p in spared["params"]}
    assert len(decayed["params"]) + len(spared["params"]) == len(name_of)
    for part in ("A_log", "dt_bias", "conv1d.weight", "layernorm.weight", "q_norm.weight", "linear_attn.norm.weight"):
        assert any(part in name for name in spared_names), part
    for name in name_of.values():
        sparing = any(part in name for part in ("A_log", "dt_bias", "conv1d", "norm", "bias"))
        assert (name in spared_names) == sparing, name


def test_adamw_takes_the_two_groups() -> None:
    optimizer = build_optimizer(tiny_model(), OptimizerConfig(weight_decay=0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_learning_rates_by_hand() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="cosine")
    assert [learning_rate(i, 5, config) for i in range(5)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert learning_rate(9, 5, config) == pytest.approx(0.1)  # a run resumed with fewer steps
    constant = replace(config, schedule="constant")
    assert [learning_rate(i, 5, constant) for i in range(5)] == [0.5, 1, 1, 1, 1]
    assert learning_rate(0, 5, replace(constant, warmup_steps=0)) == 1


def test_the_rate_follows_the_version_also_through_steps_without_signal() -> None:
    learner = make_learner(config=LearnerConfig(optimizer=OptimizerConfig(lr=1.0, warmup_steps=4, max_skipped_steps=9)))
    silent = make_group([make_trajectory(1.0), make_trajectory(1.0)])
    learner.policy_version = 1
    assert [learner.step([silent]).metrics["optim/lr"] for _ in range(4)] == [0.5, 0.75, 1.0, 1.0]
