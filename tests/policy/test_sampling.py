"""Drawing tokens: in proportion, by seed, row by row."""

import numpy as np
import torch

from policy.engine.protocol import SamplingSpec
from policy.engine.sampling import SamplingRows, stream_key, uniforms
from policy.model.logprobs import token_logprobs

VOCAB = 61
CPU = torch.device("cpu")


def test_uniforms_are_even_and_depend_on_key_and_counter_alone() -> None:
    keys = np.full(100_000, stream_key(7), np.uint64)
    numbers = uniforms(keys, np.arange(100_000))
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 150  # chi-square with 99 degrees of freedom: p = 0.0007
    neighbour = uniforms(np.full(100_000, stream_key(8), np.uint64), np.arange(100_000))
    assert abs(np.corrcoef(numbers, neighbour)[0, 1]) < 0.015
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.015
    np.testing.assert_array_equal(uniforms(keys[:2], np.array([99, 5])), numbers[[99, 5]])
    assert stream_key(-1) != stream_key(1)


def rows_of(spec: SamplingSpec, count: int) -> SamplingRows:
    rows = SamplingRows(count, VOCAB, CPU)
    for row in range(count):
        rows.put(row, spec, stream_key(row))
    return rows


def random_logits(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_tokens_are_drawn_in_proportion_to_their_probabilities() -> None:
    spec = SamplingSpec(temperature=1.5, banned_token_ids=(0, 3))
    rows, logits = rows_of(spec, 100), random_logits(1)
    counts = np.zeros(VOCAB)
    for counter in range(80):
        draw = rows.draw(logits.expand(100, -1), 0, np.full(100, counter))
        counts += np.bincount(draw.token_ids, minlength=VOCAB)
    scaled = logits[0] / 1.5
    scaled[[0, 3]] = -torch.inf
    expected = scaled.softmax(-1).numpy() * 8000
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    chi_square = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 105  # 58 degrees of freedom: p = 0.0002


def test_top_k_and_then_top_p_leave_out_the_tail_but_not_from_the_logprobs() -> None:
    logits = torch.full((1, VOCAB), -20.0)
    logits[0, [4, 9, 2, 30]] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    cases = {
        (0, 1.0): {4, 9, 2, 30},
        (2, 1.0): {4, 9},
        (0, 0.39): {4},
        (0, 0.41): {4, 9},
        (3, 0.75): {4, 9},
        (1, 0.1): {4},
    }
    for (top_k, top_p), expected in cases.items():
        rows = rows_of(SamplingSpec(top_k=top_k, top_p=top_p), 200)
        draw = rows.draw(logits.expand(200, -1), 0, np.zeros(200, np.int64))
        assert set(draw.token_ids.tolist()) == expected, (top_k, top_p)
        learner, _ = token_logprobs(logits.expand(200, -1), torch.from_numpy(draw.token_ids), 1.0)
        np.testing.assert_allclose(draw.logprobs, learner.numpy(), atol=1e-6)


def test_rows_of_different_settings_share_a_draw_and_keep_their_settings_when_moved() -> None:
    specs = [
        SamplingSpec(temperature=0.5),
        SamplingSpec(temperature=0.0, banned_token_ids=(1, 2)),
        SamplingSpec(temperature=2.0, top_k=3),
        SamplingSpec(banned_token_ids=tuple(range(1, VOCAB))),
    ]
    rows, logits = SamplingRows(6, VOCAB, CPU), random_logits(4)
    for row, spec in enumerate(specs):
        rows.put(row, spec, stream_key(row))
    counters = np.array([3, 0, 8, 1])
    together = rows.draw(logits, 0, counters)
    for row, spec in enumerate(specs):
        alone = rows_of(spec, 1)
        alone.put(0, spec, stream_key(row))
        draw = alone.draw(logits[row : row + 1], 0, counters[row : row + 1])
        assert (draw.token_ids[0], draw.logprobs[0]) == (together.token_ids[row], together.logprobs[row])
        rows.move(row, 5)
        moved = rows.draw(logits[row : row + 1], 5, counters[row : row + 1])
        assert (moved.token_ids[0], moved.logprobs[0]) == (together.token_ids[row], together.logprobs[row])
    assert (together.token_ids[3], together.logprobs[3]) == (0, 0.0)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    rows, logits = rows_of(SamplingSpec(top_p=0.9), 4), random_logits(4)
    clean = rows.draw(logits, 0, np.zeros(4, np.int64))
    spoiled = logits.clone()
    spoiled[1, 5], spoiled[2, 0] = torch.nan, torch.inf
    draw = rows.draw(spoiled, 0, np.zeros(4, np.int64))
    assert np.isfinite(draw.logprobs).tolist() == [True, False, False, True]
    assert draw.token_ids[[0, 3]].tolist() == clean.token_ids[[0, 3]].tolist()
