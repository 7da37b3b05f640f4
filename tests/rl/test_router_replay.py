"""Router replay, from engine to learner: two turns are sampled, their routes replayed by the learner that trains."""

import asyncio
from dataclasses import replace

import numpy as np

from conf.schema import LossConfig
from policy.model.hybrid import HybridModel
from rl.algorithm.batch import Row, pack
from rl.algorithm.gradient import RowValues, accumulate
from rl.algorithm.loss import LOSSES
from rl.algorithm.step_report import replay_metrics
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import Trajectory
from tests.policy.engine_cases import CASES, EngineCase
from tests.policy.serving import ask, random_prompt, serving
from tests.rollout.trajectories import make_trajectory

CASE = CASES["local-moe"]


async def two_turns(case: EngineCase) -> TokenRecord:
    record = TokenRecord()
    async with serving(case) as engine:
        for turn in range(2):
            record.append_given(random_prompt(9 + turn).tolist())
            record.append_sampled(await engine.generate(ask(record.token_ids, max_tokens=12, seed=turn)))
    return record


def trajectory_of(record: TokenRecord) -> Trajectory:
    blank = make_trajectory(token_ids=record.token_ids.tolist(), loss_mask=record.loss_mask.tolist())
    return replace(blank, rollout_logprobs=record.logprobs, routed_experts=record.routed_experts)


def trained(model: HybridModel, trajectory: Trajectory) -> np.ndarray:
    """pi / mu of every sampled token; the gradient is left in the model."""
    recorded = trajectory.rollout_logprobs[trajectory.loss_mask == 1]
    model.zero_grad()
    result = accumulate(
        model,
        pack([trajectory], max_tokens=4096, device=model.device),
        RowValues(advantages=[1.0], weights=[1.0 / len(recorded)], rollout_logprobs=[recorded]),
        LOSSES["clipped"],
        LossConfig(),
        (),
    )
    return np.exp(result.logprobs[0] - recorded)


def test_two_turns_replayed_with_equal_weights_have_ratio_one_and_teach_every_router() -> None:
    assert CASE.model is not None
    model = CASE.model(0)
    record = asyncio.run(two_turns(CASE))
    trajectory = trajectory_of(record)
    routes = record.routed_experts
    inside_turns = (record.loss_mask[:-1] == 1) & (record.loss_mask[1:] == 1)  # the last of a turn was not fed in it
    assert routes is not None and (routes[:-1][inside_turns] >= 0).all() and (routes[-1] == -1).all()
    assert np.abs(trained(model, trajectory) - 1).max() <= 1e-4
    gates = {name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")}
    assert gates and all(grad is not None and grad.norm() > 0 for grad in gates.values())


def test_routes_that_no_engine_told_are_counted_up_to_the_last_sampled_token() -> None:
    """Six tokens, of which 1, 2 and 4 are sampled, by two layers of two experts each: four tokens of each row count."""
    routes = np.zeros((6, 2, 2), np.int16)
    routes[0, 1], routes[3], routes[4:] = -1, -1, -1
    told = make_trajectory(token_ids=[0, 1, 2, 3, 4, 5], loss_mask=[0, 1, 1, 0, 1, 0])
    rows = [Row(trajectory=replace(told, routed_experts=each), status="trained") for each in (routes, None, routes)]
    first, both = {0: np.zeros(3)}, {0: np.zeros(3), 1: np.zeros(3)}  # the third row is never computed
    assert replay_metrics(rows, first) == {"moe/replay_fallback_ratio": (0.5 + 1) / 4}
    assert replay_metrics(rows, both) == {"moe/replay_fallback_ratio": (1.5 + 4) / 8}
    assert replay_metrics(rows, {}) == {}


def test_other_routes_than_the_engines_give_other_ratios() -> None:
    assert CASE.model is not None
    model = CASE.model(0)
    trajectory = trajectory_of(asyncio.run(two_turns(CASE)))
    assert trajectory.routed_experts is not None
    turned = np.where(trajectory.routed_experts < 0, -1, (trajectory.routed_experts + 1) % model.config.num_experts)
    assert np.abs(trained(model, replace(trajectory, routed_experts=turned.astype(np.int16))) - 1).max() > 1e-3
