"""Who is trained, with which weight, and that cutting or shuffling a batch cannot change its gradient."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from conf.schema import LossConfig
from policy.model.hybrid import HybridModel
from policy.model.logprobs import token_logprobs
from rl.algorithm.advantage import ToolPrice, dr_grpo, grpo
from rl.algorithm.batch import Row, collate, judge_group, pack, token_weights
from rl.algorithm.gradient import RowValues, accumulate, score_rows
from rl.algorithm.loss import LOSSES
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory
from tests.rollout.trajectories import make_group, make_trajectory, random_trajectory, tiny_model, with_logprobs_of

CPU = torch.device("cpu")


def judged(*trajectories: Trajectory, tool_cost: float = 0.0, banned: frozenset[int] = frozenset()) -> list[Row]:
    return judge_group(make_group(trajectories), dr_grpo, price=ToolPrice(cost=tool_cost), banned=banned)


# --- who is trained


def test_rows_get_the_advantages_of_their_group() -> None:
    rows = judged(make_trajectory(1.0), make_trajectory(0.0), make_trajectory(0.5))
    assert [row.advantage for row in rows] == [0.5, -0.5, 0.0]
    assert [row.status for row in rows] == ["trained", "trained", "zero_advantage"]


def test_failed_trajectories_are_excluded_with_their_cause_and_leave_the_rest_alone() -> None:
    error = EpisodeError(kind="env", where="step", message="boom")
    failed = replace(make_trajectory(None, stop_reason=StopReason.ENV_ERROR), error=error)
    rows = judged(make_trajectory(1.0), failed, make_trajectory(0.0), make_trajectory(None))
    assert [row.advantage for row in rows] == [0.5, None, -0.5, None]
    assert [(row.status, row.cause) for row in rows[1::2]] == [
        ("excluded", "env_error: boom"),
        ("excluded", "no reward"),
    ]


def test_after_random_failures_the_survivors_train_as_their_own_group() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        rewards = rng.integers(0, 2, 8).astype(float).tolist()
        alive = rng.random(8) > 0.05
        trajectories = [
            make_trajectory(r) if ok else make_trajectory(None, stop_reason=StopReason.INFRA_ERROR)
            for r, ok in zip(rewards, alive, strict=True)
        ]
        rows = judge_group(make_group(trajectories), grpo, price=ToolPrice())
        survivors = grpo([r for r, ok in zip(rewards, alive, strict=True) if ok])
        assert [row.advantage for row, ok in zip(rows, alive, strict=True) if ok] == survivors
        assert not any(row.status == "trained" for row, ok in zip(rows, alive, strict=True) if not ok)


def test_a_lone_survivor_is_excluded() -> None:
    rows = judged(make_trajectory(1.0), make_trajectory(None))
    assert (rows[0].status, rows[0].cause) == ("excluded", "fewer than two valid members in its group")


def test_a_trajectory_without_sampled_tokens_is_excluded() -> None:
    rows = judged(make_trajectory(1.0, loss_mask=(0, 0, 0, 0)), make_trajectory(1.0), make_trajectory(0.0))
    assert (rows[0].status, rows[0].cause) == ("excluded", "no sampled token")


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (make_trajectory(1.0, logprob=float("nan")), "rollout logprob nan at token 2"),
        (make_trajectory(1.0, logprob=-float("inf")), "rollout logprob -inf"),
        (make_trajectory(1.0, logprob=0.01), "rollout logprob 0.0"),
        (make_trajectory(float("nan")), "reward nan"),
        (make_trajectory(1.0, loss_mask=(1, 0, 1, 1)), "first token"),
        (make_trajectory(1.0, version=-1), "without a policy version"),
        (make_trajectory(1.0, token_ids=(1, 2, 9, 4)), "banned token 9"),
        (replace(make_trajectory(1.0), token_ids=np.array([1, 2], np.int32)), "different lengths"),
    ],
)
def test_bad_data_is_quarantined_and_moves_no_one_elses_advantage(bad: Trajectory, cause: str) -> None:
    rows = judged(bad, make_trajectory(1.0), make_trajectory(0.0), banned=frozenset({9}))
    assert rows[0].status == "quarantined" and cause in rows[0].cause and rows[0].advantage is None
    assert [row.advantage for row in rows[1:]] == [0.5, -0.5]


def test_a_logprob_lifted_over_zero_by_rounding_is_fine() -> None:
    assert judged(make_trajectory(1.0, logprob=5e-7), make_trajectory(0.0))[0].status == "trained"


def test_the_price_of_calls_gives_an_all_correct_group_a_signal() -> None:
    rows = judged(make_trajectory(1.0, calls=1), make_trajectory(1.0, calls=0), tool_cost=0.2)
    assert [row.advantage for row in rows] == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("wrong", [lambda rewards: [0.0], lambda rewards: [float("nan")] * len(rewards)])
def test_an_own_advantage_function_that_breaks_the_contract_is_named(wrong) -> None:
    with pytest.raises(ValueError, match="group 'g'"):
        judge_group(make_group([make_trajectory(1.0), make_trajectory(0.0)]), wrong, price=ToolPrice())


# --- weights


def test_weights_by_hand() -> None:
    short = make_trajectory(1.0, loss_mask=(0, 0, 0, 1))
    long = make_trajectory(0.0, loss_mask=(0, 1, 1, 1))
    rows = judged(short, long)
    assert token_weights(rows, "token", horizon=8) == [1 / 4, 1 / 4]
    assert token_weights(rows, "sequence", horizon=8) == [1 / 2, 1 / 6]
    assert token_weights(rows, "horizon", horizon=8) == [1 / 16, 1 / 16]


def test_zero_advantage_rows_count_in_denominators_and_failed_ones_do_not() -> None:
    rows = judged(make_trajectory(1.0), make_trajectory(0.0), make_trajectory(0.5), make_trajectory(None))
    assert token_weights(rows, "token", horizon=8) == [1 / 6, 1 / 6, 1 / 6, 0]
    assert token_weights(rows, "sequence", horizon=8) == [1 / 6, 1 / 6, 1 / 6, 0]


def test_an_unknown_normaliser_is_refused() -> None:
    with pytest.raises(ValueError, match="'rows'; allowed: token, sequence, horizon"):
        token_weights([], "rows", horizon=8)


# --- packing


def test_a_pack_by_hand() -> None:
    rows = [
        make_trajectory(token_ids=[7, 8, 9], loss_mask=[0, 0, 1]),
        make_trajectory(token_ids=[5, 6], loss_mask=[0, 1]),
    ]
    pack_of_both = collate(rows, [0, 1], device=CPU)
    assert pack_of_both.token_ids.tolist() == [7, 8, 9, 5, 6]
    assert pack_of_both.sequence_starts.tolist() == [0, 3, 5]
    assert pack_of_both.logits_at.tolist() == [1, 3]
    assert pack_of_both.targets.tolist() == [9, 6]
    assert pack_of_both.row_of_token.tolist() == [0, 1]
    assert pack_of_both.gather([0.5, -0.5]).tolist() == [0.5, -0.5]


def test_packs_hold_every_row_once_and_respect_the_budget_but_for_a_row_that_exceeds_it_alone() -> None:
    rng = np.random.default_rng(0)
    rows = [random_trajectory(rng, 1.0) for _ in range(20)]
    packs = pack(rows, max_tokens=35, device=CPU)
    assert sorted(i for p in packs for i in p.indices) == list(range(20))
    assert all(len(p.token_ids) <= 35 or len(p.indices) == 1 for p in packs)
    assert pack([], max_tokens=35, device=CPU) == []


def test_routes_of_rows_without_any_are_unknown() -> None:
    routed = replace(make_trajectory(), routed_experts=np.full((4, 1, 2), 3, np.int16))
    routes = collate([routed, make_trajectory()], [0, 1], device=CPU).routed_experts
    assert routes is not None and routes[:, 0, 0].tolist() == [3] * 4 + [-1] * 4


def test_scores_agree_with_the_one_formula_at_any_temperature_and_with_banned_tokens() -> None:
    model = tiny_model()
    rng = np.random.default_rng(1)
    rows = [random_trajectory(rng, 1.0, temperature=t) for t in (0.6, 1.0, 1.7)]
    rows = [replace(r, token_ids=np.where(r.token_ids < 2, 2, r.token_ids).astype(np.int32)) for r in rows]
    scores = score_rows(model, pack(rows, max_tokens=4096, device=CPU), [0, 1])
    banned = torch.zeros(32, dtype=torch.bool)
    banned[:2] = True
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.token_ids).long()
        at = torch.from_numpy(np.flatnonzero(row.loss_mask))
        with torch.no_grad():
            logits = model(ids, torch.tensor([0, len(ids)])).logits[at - 1]
            expected, _ = token_logprobs(logits, ids[at], row.temperature, banned)
        np.testing.assert_allclose(scores[i], expected.numpy(), atol=1e-5)


# --- the gradient does not depend on the cut (pitfalls A10)


def gradient_of(
    model: HybridModel, rows: Sequence[Row], packs_of: Sequence[Sequence[int]], config: LossConfig, off_policy: bool
) -> tuple[torch.Tensor, float]:
    trajectories = [row.trajectory for row in rows]
    rollout = [t.rollout_logprobs[t.loss_mask == 1] for t in trajectories]
    model.zero_grad()
    result = accumulate(
        model,
        [collate(trajectories, indices, device=CPU) for indices in packs_of],
        RowValues(
            advantages=[row.advantage or 0.0 for row in rows],
            weights=token_weights(rows, config.normalise, horizon=64),
            rollout_logprobs=rollout,
            proximal_logprobs=[r + 0.2 for r in rollout] if off_policy else None,
        ),
        LOSSES[config.name],
        config,
        [],
    )
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), result.loss


@pytest.fixture(scope="module")
def sixteen_rows() -> tuple[HybridModel, list[Row]]:
    model = tiny_model()
    rng = np.random.default_rng(2)
    trajectories = [random_trajectory(rng, float(i % 3)) for i in range(16)]
    other = with_logprobs_of(tiny_model(seed=1), trajectories)  # sampled by other weights: ratios far from 1
    return model, judge_group(make_group(other), grpo, price=ToolPrice())


@pytest.mark.parametrize("normalise", ["token", "sequence", "horizon"])
@pytest.mark.parametrize("loss", ["clipped", "gspo"])
@pytest.mark.parametrize("off_policy", [False, True])
def test_the_gradient_is_the_same_for_every_split_and_order(sixteen_rows, loss, normalise, off_policy) -> None:
    model, rows = sixteen_rows
    config = LossConfig(name=loss, normalise=normalise, entropy_bonus=0.01)
    expected, expected_loss = gradient_of(model, rows, [range(16)], config, off_policy)
    assert float(expected.norm()) > 1e-3
    rng = np.random.default_rng(3)
    for num_packs in (1, 2, 5, 16):
        order = rng.permutation(16)
        packs_of = [part.tolist() for part in np.array_split(order, num_packs)]
        gradient, loss_value = gradient_of(model, rows, packs_of, config, off_policy)
        assert float((gradient - expected).norm() / expected.norm()) < 1e-5
        assert loss_value == pytest.approx(expected_loss, abs=1e-5)


def test_a_row_of_zero_advantage_left_out_changes_the_gradient_by_nothing(sixteen_rows) -> None:
    model, rows = sixteen_rows
    rows = [replace(row, advantage=0.0) if i == 3 else row for i, row in enumerate(rows)]
    with_it, _ = gradient_of(model, rows, [range(16)], LossConfig(), False)
    without, _ = gradient_of(model, rows, [[i for i in range(16) if i != 3]], LossConfig(), False)
    assert float((with_it - without).norm() / with_it.norm()) < 1e-5
