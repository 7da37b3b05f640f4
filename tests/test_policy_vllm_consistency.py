"""How far vLLM's bfloat16 logprobs are from those of the fp32 learner, on conversations of three turns."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig, PolicyConfig, VllmConfig
from policy.checkpoint_io import expected_tensors, to_numpy_tensors
from policy.engine import GenerationRequest, SamplingSpec
from policy.hybrid import PRESETS, HybridModel
from policy.initial import load_initial_weights
from policy.logprobs import token_logprobs
from policy.vllm_engine import VllmEngine
from policy.weight_store import PolicySnapshot
from rollout.token_record import TokenRecord
from tests.engine_cases import needs_vllm
from tests.test_policy_engine_contract import in_loop

EPISODES, TURNS = 8, 3
pytestmark = needs_vllm


@dataclass(frozen=True)
class Gap:
    mean: float
    max: float


def model_of(preset: str, *, trained: bool) -> HybridModel:
    torch.manual_seed(0)
    model = HybridModel(PRESETS[preset])
    if trained:
        load_initial_weights(model, PolicyConfig(preset=preset), "calculator")
    return model


async def episodes(model: HybridModel, *, prefix_cache: bool = False) -> list[TokenRecord]:
    settings = EngineConfig(
        kind="vllm", max_running=8, max_model_tokens=512, vllm=VllmConfig(prefix_cache=prefix_cache)
    )
    engine = VllmEngine(model.config, expected_tensors(model), settings)
    await engine.load_weights(PolicySnapshot.create(1, to_numpy_tensors(model)))
    rng, records = np.random.default_rng(0), []
    for episode in range(EPISODES):
        record = TokenRecord()
        for turn in range(TURNS):
            record.append_given(rng.integers(0, 256, 90 if turn == 0 else 20).tolist())
            request = GenerationRequest(
                request_id=f"{episode}/{turn}", prompt_ids=record.token_ids, sampling=SamplingSpec(max_tokens=40)
            )
            record.append_sampled(await engine.generate(request))
        records.append(record)
    await engine.close()
    return records


def gap(model: HybridModel, records: list[TokenRecord], *, replay: bool = False) -> Gap:
    differences = []
    for record in records:
        ids = torch.from_numpy(record.token_ids.astype(np.int64))
        routes = torch.from_numpy(record.routed_experts.astype(np.int64)) if replay else None  # type: ignore[union-attr]
        with torch.no_grad():
            logits = model(ids, torch.tensor([0, len(ids)]), routed_experts=routes).logits
        logprobs = token_logprobs(logits[:-1], ids[1:], 1.0, torch.zeros(model.config.vocab_size, dtype=torch.bool))[0]
        sampled = record.loss_mask[1:] == 1
        differences.append(np.abs(logprobs.numpy() - record.logprobs[1:])[sampled])
    joined = np.concatenate(differences)
    return Gap(float(joined.mean()), float(joined.max()))


@pytest.mark.vllm
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@in_loop
async def test_a_dense_model_differs_by_rounding_alone(trained: bool) -> None:
    """Trained weights are sure of nothing on prompts of random bytes: single tokens differ by 0.3 there."""
    model = model_of("tiny_hybrid", trained=trained)
    found = gap(model, await episodes(model))
    print(f"dense, trained={trained}: {found}")
    assert found.mean <= 0.01 and found.max <= (0.5 if trained else 0.1)


@pytest.mark.vllm
@in_loop
async def test_replayed_routes_take_the_large_differences_of_experts_away() -> None:
    model = model_of("tiny_moe", trained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate." in name:  # routers that decide: at their start all experts are nearly alike
                parameter.mul_(8)
    records = await episodes(model)
    without, replayed = gap(model, records), gap(model, records, replay=True)
    print(f"moe: without replay {without}, with {replayed}")
    for record in records:
        routes = record.routed_experts
        assert routes is not None and (routes[:-1] >= 0).all() and (routes[-1] == -1).all()
    assert replayed.mean <= 0.01 and replayed.max * 5 <= without.max


@pytest.mark.vllm
@in_loop
async def test_a_prefix_cache_changes_nothing_but_the_work() -> None:
    model = model_of("tiny_hybrid", trained=False)
    found = gap(model, await episodes(model, prefix_cache=True))
    assert found.mean <= 0.01 and found.max <= 0.1
