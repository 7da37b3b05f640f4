"""Learners for tests: a tiny model, one group or two."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from conf.schema import LearnerConfig, LossConfig, OptimizerConfig
from policy.model.hybrid import HybridModel
from rl.algorithm.advantage import ToolPrice
from rl.algorithm.learner import Learner
from rl.algorithm.loss import LossInputs
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from tests.rollout.trajectories import (
    tiny_model,
)

FAST = OptimizerConfig(lr=1e-2, warmup_steps=0)
MIXED = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]


def make_learner(
    model: HybridModel | None = None,
    config: LearnerConfig | None = None,
    *,
    max_staleness: int = 100,
    banned: Sequence[int] = (),
    tool_cost: float = 0.0,
) -> Learner:
    return Learner(
        model or tiny_model(),
        config or LearnerConfig(optimizer=FAST),
        total_steps=10,
        max_staleness=max_staleness,
        groups_per_step=2,
        banned_token_ids=banned,
        price=ToolPrice(cost=tool_cost),
        engine_tolerance=1e-3,
        horizon=64,
    )


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def edited(group: TrajectoryGroup, member: int, **changes: Any) -> TrajectoryGroup:
    members = list(group.trajectories)
    members[member] = replace(members[member], **changes)
    return replace(group, trajectories=tuple(members))


def with_logprob(trajectory: Trajectory, value: float) -> np.ndarray:
    """Its rollout logprobs with the first sampled token's replaced."""
    logprobs = trajectory.rollout_logprobs.copy()
    logprobs[np.flatnonzero(trajectory.loss_mask)[0]] = value
    return logprobs


def own_loss(inputs: LossInputs, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = -(inputs.weights * inputs.advantages * inputs.logprobs).sum()
    return loss, {"ones": torch.ones_like(inputs.logprobs).sum()}
