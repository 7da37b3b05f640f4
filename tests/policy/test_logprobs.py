"""The log-probability formula that engine and learner share."""

import math

import torch

from policy.model.logprobs import token_logprobs


def test_logprobs_and_entropy_of_a_small_distribution_at_two_temperatures() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [2 * math.log(3.0), 0.0]])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 1]), torch.tensor([1.0, 2.0]))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.75), math.log(0.25)]))
    torch.testing.assert_close(entropy, torch.tensor([expected, expected]))


def test_temperature_zero_reports_the_logprobs_of_temperature_one() -> None:
    logits, ids = torch.randn(4, 7), torch.tensor([0, 1, 2, 6])
    assert torch.equal(token_logprobs(logits, ids, 0.0)[0], token_logprobs(logits, ids, 1.0)[0])


def test_banned_tokens_have_no_probability_and_gradients_stay_finite() -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    banned = torch.tensor([False, True, False, False, True])
    logprobs, entropy = token_logprobs(logits, torch.tensor([0, 2, 3]), 0.7, banned)
    kept = torch.tensor([0, 2, 3])
    alone, alone_entropy = token_logprobs(logits[:, kept], torch.tensor([0, 1, 2]), 0.7)
    torch.testing.assert_close(logprobs, alone)
    torch.testing.assert_close(entropy, alone_entropy)
    assert token_logprobs(logits, torch.tensor([1, 1, 4]), 1.0, banned)[0].isneginf().all()
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert not logits.grad[:, banned].any() and logits.grad[:, kept].abs().sum() > 0


def test_half_precision_logits_are_normalised_in_fp32() -> None:
    logits = torch.randn(2, 300).bfloat16()
    logprobs, _ = token_logprobs(logits, torch.tensor([5, 299]), 1.0)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, logits.float().log_softmax(-1)[[0, 1], [5, 299]])
