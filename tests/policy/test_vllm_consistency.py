"""How far vLLM's bfloat16 logprobs are from those of the fp32 learner, on conversations of three turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig, PolicyConfig, VllmConfig
from envs.check.demonstration import demonstrate
from envs.registry import make_env
from policy.engine.protocol import GenerationRequest, SamplingSpec
from policy.model.checkpoint_io import expected_tensors, to_numpy_tensors
from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import PRESETS
from policy.model.initial import load_initial_weights
from policy.model.logprobs import token_logprobs
from policy.sync.snapshot import PolicySnapshot
from policy.vllm.engine import VllmEngine
from policy.vllm.packages import vllm_build
from rollout.dialects.dialect import make_dialect
from rollout.record.token_record import TokenRecord
from tests.policy.engine_cases import needs_vllm
from tests.policy.serving import in_loop

EPISODES, TURNS = 16, 3
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


Talk = tuple[list[list[int]], SamplingSpec]
"""What is given before each turn, and how to sample."""


def babble(episode: int) -> Talk:
    rng = np.random.default_rng(episode)
    return [rng.integers(0, 256, n).tolist() for n in (90, 20, 20)], SamplingSpec(max_tokens=40)


def long_babble(episode: int) -> Talk:
    """Episodes 0 and 1, 2 and 3, ... begin alike, for longer than a block of the prefix cache (256 tokens on a CPU)."""
    given, spec = babble(episode)
    return [np.random.default_rng([episode // 2, 0]).integers(0, 256, 300).tolist(), *given[1:]], spec


def sums(episode: int) -> Talk:
    """A problem of the calculator; the tool answers each turn."""
    dialect, env = make_dialect(PolicyConfig()), make_env("Calculator-v0")
    shown = demonstrate(env, episode, 0)
    first = next(i for i, message in enumerate(shown.messages) if message.role == "assistant")
    result = next(message for message in shown.messages if message.role == "tool")
    reply = dialect.reply([result], shown.tools)
    stop, banned = dialect.stop_token_ids, dialect.banned_token_ids
    spec = SamplingSpec(max_tokens=40, stop_token_ids=stop, banned_token_ids=banned)
    return [dialect.prompt(shown.messages[:first], shown.tools), reply, reply], spec


async def episodes(
    model: HybridModel, talk: Callable[[int], Talk] = babble, *, prefix_cache: bool = False
) -> tuple[list[TokenRecord], list[list[int]]]:
    """The conversations, and the tokens of each turn's prompt that came out of the cache."""
    settings = EngineConfig(
        kind="vllm", max_running=8, max_model_tokens=512, vllm=VllmConfig(prefix_cache=prefix_cache)
    )
    engine = VllmEngine(model.config, expected_tensors(model), settings)
    await engine.load_weights(PolicySnapshot.create(1, to_numpy_tensors(model)))
    records, cached = [], []
    for episode in range(EPISODES):
        record = TokenRecord()
        cached.append([])
        given, spec = talk(episode)
        for turn in range(TURNS):
            record.append_given(given[turn])
            request = GenerationRequest(request_id=f"{episode}/{turn}", prompt_ids=record.token_ids, sampling=spec)
            completion = await engine.generate(request)
            record.append_sampled(completion)
            cached[-1].append(completion.cached_tokens)
        records.append(record)
    await engine.close()
    return records, cached


def gap(model: HybridModel, records: list[TokenRecord], banned_ids: Sequence[int] = (), *, replay: bool = False) -> Gap:
    differences = []
    banned = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    banned[list(banned_ids)] = True
    for record in records:
        ids = torch.from_numpy(record.token_ids.astype(np.int64))
        routes = torch.from_numpy(record.routed_experts.astype(np.int64)) if replay else None  # type: ignore[union-attr]
        with torch.no_grad():
            logits = model(ids, torch.tensor([0, len(ids)]), routed_experts=routes).logits
        logprobs = token_logprobs(logits[:-1], ids[1:], 1.0, banned)[0]
        sampled = record.loss_mask[1:] == 1
        differences.append(np.abs(logprobs.numpy() - record.logprobs[1:])[sampled])
    joined = np.concatenate(differences)
    return Gap(float(joined.mean()), float(joined.max()))


@pytest.mark.vllm
@pytest.mark.parametrize("trained", [False, True], ids=["random", "trained"])
@in_loop
async def test_a_dense_model_differs_by_rounding_alone(trained: bool) -> None:
    model = model_of("tiny_hybrid", trained=trained)
    found = gap(model, (await episodes(model, sums))[0], sums(0)[1].banned_token_ids)
    print(f"dense, trained={trained}: {found}")
    assert found.mean <= 0.01 and found.max <= 0.1


@pytest.mark.vllm
@in_loop
async def test_replayed_routes_take_the_large_differences_of_experts_away() -> None:
    model = model_of("tiny_moe", trained=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.gate." in name or ".experts." in name:  # at their start all experts are nearly alike, and small
                parameter.mul_(8)
    records, _ = await episodes(model)
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
    records, cached = await episodes(model, long_babble, prefix_cache=True)
    found = gap(model, records)
    print(f"dense, prefix cache: {found}, cached {cached[:2]}")
    assert all(turns[0] == 0 < min(turns[1:]) for turns in cached[::2])  # its own turn before
    assert all(min(turns) > 0 for turns in cached[1::2])  # the episode before
    assert found.mean <= 0.01 and found.max <= 0.1


@pytest.mark.vllm
@in_loop
async def test_where_a_prefix_cache_stands_for_tokens_only_those_lack_routes_and_the_learner_finds_its_own() -> None:
    model = model_of("tiny_moe", trained=False)
    records, cached = await episodes(model, long_babble, prefix_cache=True)
    found = gap(model, records, replay=True)
    print(f"moe, prefix cache: {found}, cached {cached[:2]}")
    for record, turns in zip(records, cached, strict=True):
        routes = record.routed_experts
        assert routes is not None
        unknown = turns[0] if vllm_build() == "cpu" else 0  # GPUs return those of the cache too
        assert (routes[:unknown] == -1).all() and (routes[unknown:-1] >= 0).all()
    assert all(turns[0] > 0 for turns in cached[1::2])
    assert found.mean <= 0.01 and found.max <= 0.1
