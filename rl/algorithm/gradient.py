"""Scoring packed trajectories with the current weights, and adding up the gradient of a loss over them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from conf.schema import LossConfig
from policy.model.logprobs import token_logprobs
from policy.model.model import PolicyModel
from rl.algorithm.batch import MicroBatch
from rl.algorithm.loss import LossFunction, LossInputs, entropy_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class RowValues:
    """What the loss needs per trajectory, aligned with the list that was packed."""

    advantages: Sequence[float]
    weights: Sequence[float]
    """Loss weight of each sampled token of the row (`rl.algorithm.batch.token_weights`)."""
    rollout_logprobs: Sequence[np.ndarray]
    """One array over the sampled tokens of each row."""
    proximal_logprobs: Sequence[np.ndarray] | None = None
    """The same from the learner at the start of the step; None = these weights are that learner."""


@dataclass(slots=True)
class Accumulated:
    """Sums over micro-batches."""

    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    """Sums over tokens."""
    logprobs: dict[int, np.ndarray] = field(default_factory=dict)
    """Row index -> (n,) float32 learner logprobs of its sampled tokens."""


def score(model: PolicyModel, micro_batch: MicroBatch, banned_token_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(logprobs, entropy) of the sampled tokens, (N,) fp32 each, by the definition that engines use."""
    logits = model(
        micro_batch.token_ids,
        micro_batch.sequence_starts,
        routed_experts=micro_batch.routed_experts,
        logits_at=micro_batch.logits_at,
    ).logits
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    banned[list(banned_token_ids)] = True
    return token_logprobs(logits, micro_batch.targets, micro_batch.temperatures, banned)


@torch.no_grad()
def score_rows(
    model: PolicyModel, micro_batches: Sequence[MicroBatch], banned_token_ids: Sequence[int]
) -> dict[int, np.ndarray]:
    """Row index -> (n,) float32 logprobs of its sampled tokens, without gradient."""
    scores: dict[int, np.ndarray] = {}
    for micro_batch in micro_batches:
        logprobs, _ = score(model, micro_batch, banned_token_ids)
        scores |= _by_row(micro_batch, logprobs)
    return scores


def accumulate(
    model: PolicyModel,
    micro_batches: Sequence[MicroBatch],
    values: RowValues,
    loss: LossFunction,
    config: LossConfig,
    banned_token_ids: Sequence[int],
) -> Accumulated:
    """Add the gradient of the loss over all micro-batches to the parameters. Stops early where it is not finite."""
    total = Accumulated()
    for micro_batch in micro_batches:
        logprobs, entropy = score(model, micro_batch, banned_token_ids)
        proximal = values.proximal_logprobs
        inputs = LossInputs(
            logprobs=logprobs,
            proximal_logprobs=logprobs.detach() if proximal is None else micro_batch.gather(proximal),
            rollout_logprobs=micro_batch.gather(values.rollout_logprobs),
            entropy=entropy,
            advantages=micro_batch.gather(values.advantages),
            weights=micro_batch.gather(values.weights),
            row_of_token=micro_batch.row_of_token,
            num_rows=len(micro_batch.indices),
        )
        value, sums = loss(inputs, config)
        if config.entropy_bonus:
            value = value + entropy_loss(inputs, config)
        total.loss += float(value.detach())
        if not np.isfinite(total.loss):
            break
        value.backward()
        total.logprobs |= _by_row(micro_batch, logprobs)
        for name, tensor in {**sums, "entropy": entropy.sum()}.items():
            total.metrics[name] = total.metrics.get(name, 0.0) + float(tensor.detach())
    return total


def _by_row(micro_batch: MicroBatch, logprobs: Tensor) -> dict[int, np.ndarray]:
    rows = micro_batch.split(logprobs.detach())
    return {i: row.cpu().numpy().astype(np.float32) for i, row in zip(micro_batch.indices, rows, strict=True)}
