"""Losses by hand: values, gradients, what the clip stops, what the importance weight scales."""

import math
from collections.abc import Sequence

import pytest
import torch

from conf.schema import LossConfig
from rl.algorithm.loss import LossInputs, clipped, entropy_loss, gspo

DECOUPLED = LossConfig(anchor="proximal")
NO_CORRECTION = LossConfig(anchor="proximal", tis_cap=0)


def inputs(
    ratios: Sequence[float],
    advantages: Sequence[float],
    *,
    rollout_ratios: Sequence[float] | None = None,
    rows: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
) -> LossInputs:
    """pi_theta / pi_prox = ratios and pi_prox / mu = rollout_ratios, token by token."""
    n = len(ratios)
    proximal = torch.full((n,), -1.0)
    row_of_token = torch.tensor(rows if rows is not None else range(n))
    return LossInputs(
        logprobs=(proximal + torch.tensor(ratios).log()).requires_grad_(),
        proximal_logprobs=proximal,
        rollout_logprobs=proximal - torch.tensor(rollout_ratios or [1.0] * n).log(),
        entropy=torch.full((n,), 2.0),
        advantages=torch.tensor(advantages),
        weights=torch.tensor(weights or [1.0] * n),
        row_of_token=row_of_token,
        num_rows=int(row_of_token.max()) + 1,
    )


def gradient(loss: torch.Tensor, given: LossInputs) -> list[float]:
    return torch.autograd.grad(loss, given.logprobs)[0].tolist()


def test_clipped_is_minus_advantage_on_policy_and_pushes_by_it() -> None:
    given = inputs([1.0, 1.0], [2.0, -3.0])
    loss, metrics = clipped(given, LossConfig())
    assert float(loss.detach()) == pytest.approx(1.0)  # -(2 - 3)
    assert gradient(loss, given) == pytest.approx([-2.0, 3.0])
    assert (float(metrics["clip_fraction"]), float(metrics["kl"])) == (0.0, 0.0)


def test_clipped_stops_a_gradient_that_would_go_further_out_and_keeps_one_that_comes_back() -> None:
    # r = 1.5, 0.5 with A > 0 and A < 0; limits 0.8 and 1.28
    given = inputs([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
    loss, metrics = clipped(given, NO_CORRECTION)
    assert float(loss.detach()) == pytest.approx(-1.28 + 1.5 - 0.5 + 0.8)
    assert gradient(loss, given) == pytest.approx([0.0, 1.5, -0.5, 0.0])
    assert float(metrics["clip_fraction"]) == 2.0


def test_kl_is_the_k3_estimate_per_token() -> None:
    _, metrics = clipped(inputs([1.5, 0.5], [0.0, 0.0]), NO_CORRECTION)
    assert float(metrics["kl"]) == pytest.approx(0.5 - math.log(1.5) - 0.5 - math.log(0.5))


def test_the_importance_weight_scales_is_truncated_and_has_no_gradient() -> None:
    given = inputs([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], rollout_ratios=[0.5, 1.5, 7.0])
    assert gradient(clipped(given, DECOUPLED)[0], given) == pytest.approx([-0.5, -1.5, -2.0])
    given = inputs([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], rollout_ratios=[0.5, 1.5, 7.0])
    assert gradient(clipped(given, NO_CORRECTION)[0], given) == pytest.approx([-1.0, -1.0, -1.0])


def test_anchored_at_the_rollout_stale_tokens_are_clipped_by_what_was_learned_since() -> None:
    # theta / mu = 1.5, 1.1, 1.5, 7 with one update a step (theta = prox): clipped, free, A < 0 free, A < 0 over the cap
    given = inputs([1.0] * 4, [1.0, 1.0, -1.0, -1.0], rollout_ratios=[1.5, 1.1, 1.5, 7.0])
    loss, metrics = clipped(given, LossConfig(tis_cap=2.0))
    assert float(loss.detach()) == pytest.approx(-1.28 - 1.1 + 1.5 + 2.0)
    assert gradient(loss, given) == pytest.approx([0.0, -1.1, 1.5, 0.0])
    assert float(metrics["clip_fraction"]) == 1.0


def test_one_update_a_step_has_clip_and_kl_where_tokens_are_stale_and_none_with_another_anchor() -> None:  # faults F5
    told = {}
    for name, loss, config, rollout in (
        ("stale", clipped, LossConfig(), [1.5, 1.5]),
        ("lag 0", clipped, LossConfig(), [1.0, 1.0]),
        ("proximal", clipped, DECOUPLED, [1.5, 1.5]),
        ("gspo", gspo, LossConfig(), [1.5, 1.5]),
    ):
        _, metrics = loss(inputs([1.0, 1.0], [1.0, 1.0], rollout_ratios=rollout), config)
        told[name] = (float(metrics["clip_fraction"]), pytest.approx(float(metrics["kl"])))
    assert told == {"stale": (2.0, 2 * (0.5 - math.log(1.5))), "lag 0": (0, 0), "proximal": (0, 0), "gspo": (0, 0)}


def test_both_anchors_push_alike_where_nothing_is_stale() -> None:
    given, same = inputs([1.0, 1.0], [2.0, -3.0]), inputs([1.0, 1.0], [2.0, -3.0])
    assert gradient(clipped(given, LossConfig())[0], given) == gradient(clipped(same, DECOUPLED)[0], same)


def test_every_token_counts_by_its_weight() -> None:
    given = inputs([1.0, 1.0], [1.0, 1.0], weights=[0.25, 0.125])
    assert gradient(clipped(given, LossConfig())[0], given) == pytest.approx([-0.25, -0.125])


def test_a_ratio_that_would_overflow_stays_finite() -> None:
    given = inputs([1.0], [-1.0])
    far = LossInputs(
        logprobs=torch.tensor([0.0], requires_grad=True),
        proximal_logprobs=torch.tensor([-200.0]),
        rollout_logprobs=torch.tensor([-500.0]),
        entropy=given.entropy,
        advantages=given.advantages,
        weights=given.weights,
        row_of_token=given.row_of_token,
        num_rows=1,
    )
    assert math.isfinite(float(clipped(far, LossConfig())[0].detach()))


def test_gspo_uses_the_geometric_mean_of_a_rows_ratios() -> None:
    # row 0: ratios 4 and 1 -> s = 2, row 1: ratio 1; weights as normalise="sequence" gives them
    given = inputs([4.0, 1.0, 1.0], [-1.0, -1.0, 5.0], rows=[0, 0, 1], weights=[0.25, 0.25, 0.5])
    loss, _ = gspo(given, NO_CORRECTION)
    assert float(loss.detach()) == pytest.approx(0.5 * 2.0 - 0.5 * 5.0)
    # d s / d logprob_t = s / tokens of the row
    assert gradient(loss, given) == pytest.approx([0.5, 0.5, -2.5])


def test_gspo_clips_whole_rows() -> None:
    given = inputs([4.0, 1.0, 1.0], [1.0, 1.0, 5.0], rows=[0, 0, 1], weights=[0.25, 0.25, 0.5])
    loss, metrics = gspo(given, LossConfig(name="gspo", clip_low=3e-4, clip_high=4e-4, tis_cap=0))
    assert gradient(loss, given) == pytest.approx([0.0, 0.0, -2.5])
    assert float(metrics["clip_fraction"]) == 2.0  # tokens


def test_gspo_corrects_stale_rows_by_their_mean_ratio() -> None:
    given = inputs([1.0, 1.0], [1.0, 1.0], rollout_ratios=[4.0, 0.25], rows=[0, 0], weights=[0.5, 0.5])
    assert gradient(gspo(given, LossConfig())[0], given) == pytest.approx([-0.5, -0.5])  # geometric mean 1
    given = inputs([1.0, 1.0], [1.0, 1.0], rollout_ratios=[9.0, 9.0], rows=[0, 0], weights=[0.5, 0.5])
    assert gradient(gspo(given, LossConfig())[0], given) == pytest.approx([-1.0, -1.0])  # capped at 2


def test_on_policy_gspo_and_clipped_push_alike() -> None:
    on_policy = {"rows": [0, 0, 1], "weights": [0.25, 0.25, 0.5]}
    one, other = inputs([1.0] * 3, [1.0, 1.0, -2.0], **on_policy), inputs([1.0] * 3, [1.0, 1.0, -2.0], **on_policy)
    assert gradient(clipped(one, LossConfig())[0], one) == pytest.approx(gradient(gspo(other, LossConfig())[0], other))


def test_the_entropy_bonus_rewards_entropy() -> None:
    assert float(entropy_loss(inputs([1.0, 1.0], [0, 0], weights=[0.5, 0.5]), LossConfig(entropy_bonus=0.1))) == (
        pytest.approx(-0.1 * 2.0)
    )
