"""From groups of trajectories to micro-batches: who is trained, with which advantage and weight, packed how.

Letters: L tokens of a trajectory, T tokens of a micro-batch, R its rows, N its sampled tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rl.algorithm.advantage import AdvantageFunction, ToolPrice, priced_rewards
from rollout.record.trajectory import Trajectory, TrajectoryGroup

RowStatus = Literal["trained", "zero_advantage", "excluded", "quarantined"]

MAX_LOGPROB = 1e-6
"""Rounding may lift a logprob over 0 by this much; more is an error of the engine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A trajectory as the learner judges it.

    Only "trained" rows are computed and only they get a gradient. "zero_advantage" rows teach nothing, so no loss term
    of any kind sees them, but they count in the denominators: a step in which few groups differ is a small step.
    """

    trajectory: Trajectory
    status: RowStatus
    advantage: float | None = None
    """None where it has no part in its group's statistics: quarantined (bad data), excluded (no reward, or alone)."""
    cause: str = ""
    """Why it is not trained."""
    paid: float = 0.0
    """What needless tool calls took from its reward."""

    @property
    def is_valid(self) -> bool:
        return self.advantage is not None


def judge_group(
    group: TrajectoryGroup, advantage: AdvantageFunction, *, price: ToolPrice, banned: frozenset[int] = frozenset()
) -> list[Row]:
    """One row per trajectory of the group, in order.

    Bad rows are taken out before the advantages, so that they move neither mean nor deviation of the others. Raises
    `ValueError` where an own advantage function gives another number of values, or values that are not finite.
    """
    defects = [_defect(t, banned) for t in group.trajectories]
    rewards = [
        t.reward if t.is_trainable and not defect else None
        for t, defect in zip(group.trajectories, defects, strict=True)
    ]
    shaped = priced_rewards(group.trajectories, rewards, price)
    advantages = advantage(shaped)
    if len(advantages) != len(rewards) or not all(a is None or math.isfinite(a) for a in advantages):
        raise ValueError(
            f"advantage function gave {list(advantages)} for rewards {rewards} of group {group.group_id!r}"
        )
    rows = []
    for i, (trajectory, defect, value) in enumerate(zip(group.trajectories, defects, advantages, strict=True)):
        if defect:
            rows.append(Row(trajectory=trajectory, status="quarantined", cause=defect))
        elif value is None or not trajectory.is_trainable:
            rows.append(Row(trajectory=trajectory, status="excluded", cause=_why_excluded(trajectory)))
        else:
            status = "trained" if value != 0.0 else "zero_advantage"
            paid = (rewards[i] or 0.0) - (shaped[i] or 0.0)
            rows.append(Row(trajectory=trajectory, status=status, advantage=float(value), paid=paid))
    return rows


def _why_excluded(trajectory: Trajectory) -> str:
    if trajectory.error is not None:
        return f"{trajectory.stop_reason}: {trajectory.error.message}"
    if trajectory.stop_reason.is_error:
        return str(trajectory.stop_reason)
    if trajectory.reward is None:
        return "no reward"
    if not trajectory.loss_mask.any():
        return "no sampled token"
    return "fewer than two valid members in its group"


def _defect(trajectory: Trajectory, banned: frozenset[int]) -> str:
    """What is wrong with the data of a trajectory, or ""."""
    t = trajectory
    lengths = {len(t.token_ids), len(t.loss_mask), len(t.rollout_logprobs), len(t.policy_versions)}
    if len(lengths) != 1 or (t.routed_experts is not None and len(t.routed_experts) not in lengths):
        return f"arrays of different lengths {sorted(lengths)}"
    if t.reward is not None and not math.isfinite(t.reward):
        return f"reward {t.reward}"
    sampled = t.loss_mask == 1
    if sampled[:1].any():
        return "the first token is marked as sampled, so nothing predicts it"
    logprobs = t.rollout_logprobs[sampled]
    if bad := np.flatnonzero(~np.isfinite(logprobs) | (logprobs > MAX_LOGPROB)).tolist():
        return f"rollout logprob {logprobs[bad[0]]} at token {np.flatnonzero(sampled)[bad[0]]} ({len(bad)} bad)"
    if sampled.any() and t.policy_versions[sampled].min() < 0:
        return "a sampled token without a policy version"
    if forbidden := banned.intersection(t.token_ids[sampled].tolist()):
        return f"sampled a banned token {min(forbidden)}"
    return ""


def token_weights(rows: Sequence[Row], normalise: str, *, horizon: int) -> list[float]:
    """Weight in the loss of every sampled token of each row; invalid rows 0. Sums over all valid rows of the batch.

    "token" 1 / (all sampled tokens) · "sequence" 1 / (rows * the row's tokens) · "horizon" 1 / (rows * horizon), which
    does not favour short right or long wrong answers (Dr. GRPO, arXiv 2503.20783).

    Example: rows of 1 and 3 tokens, horizon 8: token [1/4, 1/4], sequence [1/2, 1/6], horizon [1/16, 1/16].
    """
    lengths = [row.trajectory.num_sampled_tokens if row.is_valid else 0 for row in rows]
    num_rows = sum(length > 0 for length in lengths)
    denominators = {
        "token": [sum(lengths)] * len(rows),
        "sequence": [num_rows * length for length in lengths],
        "horizon": [num_rows * horizon] * len(rows),
    }
    if normalise not in denominators:
        raise ValueError(f"unknown normalise {normalise!r}; allowed: {', '.join(denominators)}")
    return [
        1.0 / denominator if length else 0.0
        for length, denominator in zip(lengths, denominators[normalise], strict=True)
    ]


class TokenRow(Protocol):
    """What packing reads of a `Trajectory`, or of a demonstration."""

    @property
    def token_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def temperature(self) -> float: ...
    @property
    def routed_experts(self) -> np.ndarray | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Rows packed into one forward, without padding.

    Example: rows [7 8 9] with the last token sampled and [5 6] likewise -> token_ids [7 8 9 5 6],
    sequence_starts [0 3 5], logits_at [1 3], targets [9 6], row_of_token [0 1].
    """

    token_ids: Tensor
    """(T,) int64."""
    sequence_starts: Tensor
    """(R + 1,) int64, from 0 to T: state of convolution, recurrence and attention starts anew at each."""
    logits_at: Tensor
    """(N,) positions in the pack whose logits predict the sampled tokens."""
    targets: Tensor
    """(N,) the sampled tokens."""
    row_of_token: Tensor
    """(N,) 0..R-1."""
    indices: tuple[int, ...]
    """(R,) place of each row in the list that was packed."""
    temperatures: Tensor
    """(N,) float32, at which each token was sampled."""
    routed_experts: Tensor | None
    """(T, M, k) int64, -1 where no route is known; None where no row has one."""

    def split(self, values: Tensor) -> list[Tensor]:
        """(N,) -> one tensor per row."""
        return list(values.split(torch.bincount(self.row_of_token, minlength=len(self.indices)).tolist()))

    def gather(self, per_row: Sequence[np.ndarray] | Sequence[float]) -> Tensor:
        """(N,) float32 from a value, or an array over sampled tokens, for each row of the list that was packed."""
        counts = torch.bincount(self.row_of_token, minlength=len(self.indices)).tolist()
        parts = [np.broadcast_to(per_row[i], (n,)) for i, n in zip(self.indices, counts, strict=True)]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32)).to(self.targets.device)


def pack(rows: Sequence[TokenRow], *, max_tokens: int, device: torch.device) -> list[MicroBatch]:
    """All rows, sorted by length, in packs of at most `max_tokens`; a longer row goes alone.

    Similar lengths in a pack keep attention and chunked recurrence from computing much padding inside the model.
    """
    packs: list[list[int]] = []
    tokens = 0
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].token_ids)):
        length = len(rows[i].token_ids)
        if not packs or tokens + length > max_tokens:
            packs.append([])
            tokens = 0
        packs[-1].append(i)
        tokens += length
    return [collate(rows, indices, device=device) for indices in packs]


def collate(rows: Sequence[TokenRow], indices: Sequence[int], *, device: torch.device) -> MicroBatch:
    """The rows at `indices` as one pack, in that order."""
    members = [rows[i] for i in indices]
    starts = np.cumsum([0] + [len(t.token_ids) for t in members])
    positions = [np.flatnonzero(t.loss_mask) for t in members]
    token_ids = np.concatenate([t.token_ids for t in members])
    sampled = np.concatenate([start + p for start, p in zip(starts[:-1], positions, strict=True)])

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

    counts = [len(p) for p in positions]
    temperatures = np.repeat(np.array([t.temperature for t in members], np.float32), counts)
    routes = _join_routes(members)
    return MicroBatch(
        token_ids=tensor(token_ids),
        sequence_starts=tensor(starts),
        logits_at=tensor(sampled - 1),
        targets=tensor(token_ids[sampled]),
        row_of_token=tensor(np.repeat(np.arange(len(members)), counts)),
        indices=tuple(indices),
        temperatures=torch.from_numpy(temperatures).to(device),
        routed_experts=None if routes is None else tensor(routes),
    )


def _join_routes(members: Sequence[TokenRow]) -> np.ndarray | None:
    """Routes of all tokens; rows without any get -1 ("unknown: let the router decide")."""
    shape = next((t.routed_experts.shape[1:] for t in members if t.routed_experts is not None), None)
    if shape is None:
        return None
    return np.concatenate(
        [np.full((len(t.token_ids), *shape), -1) if t.routed_experts is None else t.routed_experts for t in members]
    )
