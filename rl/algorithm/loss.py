"""What is minimised. Every loss is a pure function (inputs, config) -> (loss, metric sums).

Letters: N sampled tokens of a micro-batch, R trajectories (rows) in it.
Names: mu the policy that sampled (rollout), prox the learner at the start of the step, theta the learner now.
The loss is a sum over tokens, each times its share of one denominator that was taken over the whole optimizer batch
before it was cut into micro-batches. So neither the cut nor the order can change the gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import LossConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """The sampled tokens of one micro-batch. A trajectory is never cut: all its tokens are here."""

    logprobs: Tensor
    """(N,) log pi_theta, with gradient."""
    proximal_logprobs: Tensor
    """(N,) log pi_prox, without gradient, so that the importance weight is a constant."""
    rollout_logprobs: Tensor
    """(N,) log mu, as recorded when the token was sampled."""
    entropy: Tensor
    """(N,) entropy of pi_theta at each position, with gradient, in nats."""
    advantages: Tensor
    """(N,) the advantage of the token's trajectory."""
    weights: Tensor
    """(N,) share of each token in the loss: 1 / denominator (`rl.algorithm.batch.token_weights`)."""
    row_of_token: Tensor
    """(N,) int64, 0..R-1."""
    num_rows: int
    """R."""

    def row_mean(self, values: Tensor) -> Tensor:
        """(N,) -> (R,) mean over the tokens of each row."""
        sums = values.new_zeros(self.num_rows).index_add(0, self.row_of_token, values)
        return sums / torch.bincount(self.row_of_token, minlength=self.num_rows)


LossFunction = Callable[[LossInputs, LossConfig], tuple[Tensor, dict[str, Tensor]]]
"""Metrics are sums over tokens; the learner divides them by the number of trained tokens and logs "policy/<key>"."""

MAX_LOG_RATIO = 20.0
"""exp of more would overflow before the clip can act."""


def clipped(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO with truncated importance weights, token by token. `anchor` names the policy that the clip measures from.

    anchor="rollout": the importance weight of a stale token is itself clipped, so that what the learner has already
    moved by is not moved again; it is truncated at tis_cap where the clip does not bind (A < 0).
        r = min(pi_theta / mu, tis_cap),  w = 1
    anchor="proximal": decoupled PPO. With one update a step r is 1 and the clip never acts: staleness is then left to
    w alone, which was less stable at staleness 2 (docs/log.md).
        r = pi_theta / pi_prox,  w = min(pi_prox / mu, tis_cap) (a constant)

        loss = sum_t weight_t * w_t * -min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t);  tis_cap = 0: no cap

    Source: PPO clip arXiv 1707.06347 eq. 7; the cap for A < 0: dual clip, arXiv 1912.09729 eq. 5; behaviour and
    proximal policy apart: AReaL, arXiv 2505.24298 section 5.2 (which masks large w, we truncate); higher upper clip:
    DAPO, arXiv 2503.14476 section 3.1.

    Example: A=1, all logprobs equal, weights 1 -> loss -1 per token.
    """
    if config.anchor == "rollout":
        log_ratio = (inputs.logprobs - inputs.rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio, correction = _truncated(log_ratio, config.tis_cap or math.inf), 1.0
    else:
        log_ratio = (inputs.logprobs - inputs.proximal_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        correction = _truncated(inputs.proximal_logprobs - inputs.rollout_logprobs, config.tis_cap)
    surrogate, is_clipped = _pessimistic(ratio, inputs.advantages, config)
    loss = -(inputs.weights * correction * surrogate).sum()
    return loss, {"clip_fraction": is_clipped.sum(), "kl": _k3(log_ratio).sum()}


def gspo(inputs: LossInputs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with one ratio per trajectory, the geometric mean of its tokens' ratios.

        s_i = exp(mean_t(log pi_theta - log pi_prox)),  w_i = min(exp(mean_t(log pi_prox - log mu)), tis_cap)
        loss = sum_i weight_i * w_i * -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

    weight_i is the sum of the weights of its tokens: 1 / (number of trajectories) with normalise="sequence", as in
    the paper. Source: GSPO, arXiv 2507.18071 eq. 5 to 7; its clip range is narrow (3e-4, 4e-4). w_i is ours: the paper
    has no stale data.
    """
    log_ratio = (inputs.logprobs - inputs.proximal_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = inputs.row_mean(log_ratio).exp()
    surrogate, is_clipped = _pessimistic(ratio, inputs.row_mean(inputs.advantages), config)
    correction = _truncated(inputs.row_mean(inputs.proximal_logprobs - inputs.rollout_logprobs), config.tis_cap)
    row_weights = inputs.weights.new_zeros(inputs.num_rows).index_add(0, inputs.row_of_token, inputs.weights)
    loss = -(row_weights * correction * surrogate).sum()
    return loss, {"clip_fraction": is_clipped[inputs.row_of_token].sum(), "kl": _k3(log_ratio).sum()}


LOSSES: dict[str, LossFunction] = {"clipped": clipped, "gspo": gspo}


def entropy_loss(inputs: LossInputs, config: LossConfig) -> Tensor:
    """-entropy_bonus * sum_t weight_t * H(pi_theta at t). Added to every loss; 0 = off."""
    return -config.entropy_bonus * (inputs.weights * inputs.entropy).sum()


def _pessimistic(ratio: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clip took the gradient away."""
    limited = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.minimum(ratio * advantages, limited * advantages)
    return surrogate, (limited * advantages < ratio * advantages).detach()


def _truncated(log_weight: Tensor, cap: float) -> Tensor:
    if cap == 0:
        return torch.ones_like(log_weight)
    return log_weight.exp().clamp(max=cap)


def _k3(log_ratio: Tensor) -> Tensor:
    """Estimate of KL(anchor || theta) per token from samples of the anchor: r - 1 - log r, never negative."""
    log_ratio = log_ratio.detach()
    return log_ratio.exp() - 1 - log_ratio
