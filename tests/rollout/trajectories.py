"""Small hand-made trajectories, and trajectories with the true logprobs of a tiny model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from envs.task import Task
from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import HybridConfig
from policy.model.model import PolicyModel
from rl.algorithm.batch import pack
from rl.algorithm.gradient import score_rows
from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup

VOCAB = 32
TINY = HybridConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=1,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    intermediate_size=16,
    layer_types=("linear_attention", "full_attention"),
    tie_word_embeddings=True,
    initializer_range=0.3,
)


def tiny_model(seed: int = 0) -> HybridModel:
    """About 4,000 parameters, with logits far from uniform."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HybridModel(TINY)


def make_trajectory(
    reward: float | None = 1.0,
    *,
    token_ids: Sequence[int] = (1, 2, 3, 4),
    loss_mask: Sequence[int] = (0, 0, 1, 1),
    logprob: float = -1.0,
    version: int = 0,
    calls: int = 0,
    group_id: str = "g",
    member: int = 0,
    env_name: str = "calc",
    stop_reason: StopReason = StopReason.TERMINATED,
    temperature: float = 1.0,
) -> Trajectory:
    mask = np.array(loss_mask, np.uint8)
    return Trajectory(
        trajectory_id=f"{group_id}/{member}",
        group_id=group_id,
        task=Task(task_id=group_id, env_id="E-v0", env_name=env_name, seed=0),
        member=member,
        token_ids=np.array(token_ids, np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask == 1, logprob, 0.0).astype(np.float32),
        policy_versions=np.where(mask == 1, version, -1).astype(np.int32),
        turns=(),
        reward=reward,
        stop_reason=stop_reason,
        temperature=temperature,
        meta={"num_tool_calls": calls, "tool_cost": float(calls)},
    )


def make_group(trajectories: Sequence[Trajectory], group_id: str = "g") -> TrajectoryGroup:
    members = tuple(
        replace(t, group_id=group_id, trajectory_id=f"{group_id}/{i}", member=i) for i, t in enumerate(trajectories)
    )
    return TrajectoryGroup(group_id=group_id, task=members[0].task, attempt=1, trajectories=members)


def random_trajectory(rng: np.random.Generator, reward: float | None, **kwargs: float) -> Trajectory:
    """5 to 40 random tokens in one or two turns."""
    length = int(rng.integers(5, 41))
    mask = np.zeros(length, np.uint8)
    mask[2 : length // 2] = 1
    mask[length // 2 + 1 :] = 1
    ids = rng.integers(0, VOCAB, length).tolist()
    return make_trajectory(reward, token_ids=ids, loss_mask=mask.tolist(), **kwargs)  # type: ignore[arg-type]


def with_logprobs_of(
    model: PolicyModel, trajectories: Sequence[Trajectory], *, version: int = 0, banned: Sequence[int] = ()
) -> list[Trajectory]:
    """The same, as if `model` at `version` had sampled them."""
    packs = pack(trajectories, max_tokens=4096, device=torch.device("cpu"))
    scores = score_rows(model, packs, banned)
    return [_recorded(t, scores[i], version) for i, t in enumerate(trajectories)]


def _recorded(trajectory: Trajectory, logprobs: np.ndarray, version: int) -> Trajectory:
    mask = trajectory.loss_mask == 1
    recorded = np.zeros(len(mask), np.float32)
    recorded[mask] = logprobs
    versions = np.where(mask, version, -1).astype(np.int32)
    return replace(trajectory, rollout_logprobs=recorded, policy_versions=versions)


def on_policy_groups(
    model: PolicyModel, rewards: Sequence[Sequence[float | None]], *, seed: int = 0, version: int = 0
) -> list[TrajectoryGroup]:
    """One group per list of rewards, of random tokens, as if `model` at `version` had sampled them."""
    rng = np.random.default_rng(seed)
    groups = []
    for g, group_rewards in enumerate(rewards):
        members = with_logprobs_of(model, [random_trajectory(rng, r) for r in group_rewards], version=version)
        groups.append(make_group(members, f"g{g}"))
    return groups
