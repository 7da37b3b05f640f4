"""Log-probabilities as the engine records them and as the learner reproduces them: one formula for both.

    logprob(t) = log_softmax(logits / temperature)[t], fp32, the logits of banned tokens set to -inf first.
temperature 0 means greedy sampling; its log-probabilities are those at temperature 1.
Letters: N rows, V vocabulary.
"""

import torch
from torch import Tensor


def processed_logits(logits: Tensor, temperature: float | Tensor, banned: Tensor | None) -> Tensor:
    """logits (N, V) of the sampled distribution, fp32; temperature a number or (N,); banned (V,) or (N, V) bool."""
    scale = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    scale = torch.where(scale == 0, 1.0, scale)
    logits = logits.float() / (scale.unsqueeze(-1) if scale.dim() else scale)
    return logits if banned is None else logits.masked_fill(banned, -torch.inf)


def token_logprobs(
    logits: Tensor, token_ids: Tensor, temperature: float | Tensor, banned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of `token_ids` (N,) and entropies (N,) in nats; differentiable.

    A banned token has logprob -inf. Its share of the entropy is 0.
    """
    logprobs = processed_logits(logits, temperature, banned).log_softmax(-1)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    # p log p -> 0 where p is 0; -inf is replaced before the product, for its gradient would be NaN.
    finite = logprobs if banned is None else logprobs.masked_fill(banned, 0.0)
    return chosen, -(logprobs.exp() * finite).sum(-1)
