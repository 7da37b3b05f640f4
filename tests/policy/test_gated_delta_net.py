"""The fast forms of the gated delta rule equal the recurrence that defines it."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from policy.model.delta_rule import chunked_delta_rule, recurrent_delta_rule
from policy.model.gated_delta_net import CHUNK_SIZE
from policy.model.norm import l2_norm, rms_norm
from policy.model.packing import Packing, place_rows, similar_lengths, spread_rows, take_rows
from tests.policy.tiny_models import starts_of

HEADS, KEY_DIM, VALUE_DIM = 2, 8, 12


def inputs(tokens: int, *, seed: int = 0, forget: float = 1.0) -> list[Tensor]:
    """q, k, v, g, beta of (tokens, heads, ...) as a layer makes them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(tokens, HEADS, *shape, generator=generator)

    q, k = l2_norm(randn(KEY_DIM)) * KEY_DIM**-0.5, l2_norm(randn(KEY_DIM))
    return [q, k, randn(VALUE_DIM), -forget * torch.rand(tokens, HEADS, generator=generator), randn().sigmoid()]


def chunked(parts: list[Tensor], lengths: list[int], state: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Outputs (T, H, V) of packed sequences, and with `state` their last states (N, H, K, V), in their order."""
    packing = Packing.create(
        starts_of(*lengths).tolist(), [0] * len(lengths), None, kernel=4, chunk_size=CHUNK_SIZE,
        device=torch.device("cpu"),
    )  # fmt: skip
    rows = len(packing.token_of_chunk_row)
    placed = [
        place_rows(part, packing.chunk_rows, rows).unflatten(0, (-1, CHUNK_SIZE)).transpose(1, 2) for part in parts
    ]
    q, k, v, g, beta = placed
    start = None if state is None else state[packing.order]
    out, last = chunked_delta_rule(q, k, v, g, beta, packing.alive, start)
    out = take_rows(out.transpose(1, 2).flatten(0, 1), packing.chunk_rows)
    return out, None if last is None else last[packing.order.argsort()]


@pytest.mark.parametrize("lengths", [[1], [31, 32, 33], [63, 1, 64, 65], [128, 2, 97]])
@pytest.mark.parametrize("from_zero", [True, False])
def test_the_chunked_rule_equals_the_recurrence(lengths: list[int], from_zero: bool) -> None:
    parts = inputs(sum(lengths))
    states = torch.randn(len(lengths), HEADS, KEY_DIM, VALUE_DIM, generator=torch.Generator().manual_seed(1))
    if from_zero:
        states.zero_()
    out, last = chunked(parts, lengths, None if from_zero else states)
    ends = starts_of(*lengths).tolist()
    for i, (begin, end) in enumerate(pairwise(ends)):
        expected, expected_last = recurrent_delta_rule(*(part[begin:end] for part in parts), states[i])
        torch.testing.assert_close(out[begin:end], expected, rtol=1e-4, atol=1e-5)
        if last is not None:
            torch.testing.assert_close(last[i], expected_last, rtol=1e-4, atol=1e-5)
    assert (last is None) == from_zero


@pytest.mark.parametrize("forget", [0.02, 1.0])
@pytest.mark.parametrize("from_zero", [True, False])
def test_gradients_of_the_chunked_rule_equal_those_of_the_recurrence(from_zero: bool, forget: float) -> None:
    lengths = [130, 5, 33]
    state = torch.randn(3, HEADS, KEY_DIM, VALUE_DIM, generator=torch.Generator().manual_seed(2))
    if from_zero:
        state.zero_()
    fast = [part.requires_grad_() for part in inputs(sum(lengths), forget=forget)]
    slow = [part.requires_grad_() for part in inputs(sum(lengths), forget=forget)]
    weight = torch.randn(sum(lengths), HEADS, VALUE_DIM, generator=torch.Generator().manual_seed(3))
    out, _ = chunked(fast, lengths, None if from_zero else state)
    (out * weight).sum().backward()
    pieces = zip(*(part.split(lengths) for part in slow), state, strict=True)
    (torch.cat([recurrent_delta_rule(*piece)[0] for piece in pieces]) * weight).sum().backward()
    for name, one, other in zip("qkvgb", fast, slow, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("forget", [0.0, 1e-6, 1e-3, 200.0])
def test_thousands_of_steps_of_slow_or_total_decay_stay_finite(forget: float) -> None:
    parts = inputs(4096, forget=forget)
    zeros = torch.zeros(1, HEADS, KEY_DIM, VALUE_DIM)
    out, last = chunked([part.requires_grad_() for part in parts], [4096], zeros)
    out.square().mean().backward()
    assert last is not None and out.isfinite().all() and last.isfinite().all()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in parts)
    if forget == 200.0:  # the state forgets everything at once: each output sees its own token only
        q, k, v, _, beta = parts
        alone = (q * k).sum(-1, keepdim=True) * v * beta.unsqueeze(-1)
        big = parts[3] < -40
        torch.testing.assert_close(out[big], alone[big], rtol=1e-4, atol=1e-6)


def test_a_sequence_begins_a_chunk_and_longer_sequences_come_first() -> None:
    packing = Packing.create([0, 3, 9], [0, 2], None, kernel=4, chunk_size=4, device=torch.device("cpu"))
    assert packing.alive == [2, 1]
    assert packing.order.tolist() == [1, 0]
    assert packing.chunk_rows.tolist() == [4, 5, 6, 0, 1, 2, 3, 8, 9]
    assert packing.conv_rows.tolist() == [3, 4, 5, 9, 10, 11, 12, 13, 14]
    assert packing.context_rows.tolist() == [0, 1, 2, 6, 7, 8]
    assert packing.positions.tolist() == [0, 1, 2, 2, 3, 4, 5, 6, 7]


def test_sequences_are_padded_together_only_with_those_of_half_their_length_or_more() -> None:
    assert similar_lengths([3, 100, 49, 50, 1]) == [[1, 3], [2], [0], [4]]
    assert similar_lengths([10, 10, 10], max_padded=20) == [[0, 1], [2]]


@pytest.mark.parametrize("starts", [[0], [0, 3, 3], [1, 3], [0, 5, 4]])
def test_sequence_starts_that_do_not_rise_from_zero_are_refused(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="sequence_starts"):
        Packing.create(starts, [0] * (len(starts) - 1), None, kernel=4, chunk_size=4, device=torch.device("cpu"))


def test_hand_written_gradients_equal_numerical_ones() -> None:
    from policy.model.gated_delta_net import CONVOLUTION_ROWS, _ShortConvolution
    from policy.model.moe import gated_units

    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    index, target = torch.tensor([0, 2, 0, 4]), torch.tensor([0, 1, 3])
    assert torch.autograd.gradcheck(lambda a: l2_norm(a), x)
    tall = torch.randn(CONVOLUTION_ROWS + 12, 2, dtype=torch.float64, requires_grad=True)  # more than one block
    assert torch.autograd.gradcheck(_ShortConvolution.apply, (tall, weight[:, :2]))
    assert torch.autograd.gradcheck(gated_units, x)
    assert torch.autograd.gradcheck(lambda a: take_rows(a, torch.tensor([3, 0])), x)
    assert torch.autograd.gradcheck(lambda a: place_rows(a, torch.tensor([3, 0, 6, 1, 2]), 8), x)
    # Row 2 of the result is padding: what is computed from it sends nothing back.
    spread_rows(x, index, source=index[target], target=target)[2].sum().backward()
    assert x.grad is not None and not x.grad.any()


def test_rms_norm_divides_by_the_root_of_the_mean_square() -> None:
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3.0, 8.0]]) / 12.5**0.5)
