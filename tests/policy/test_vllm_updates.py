"""vLLM under live weight updates: what it holds is what was sent, or it says so."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conf.schema import VllmConfig
from policy.engine.protocol import EngineClosed, EngineError
from policy.sync.snapshot import WeightSyncError
from policy.sync.weight_sender import WeightSender
from policy.vllm import parameter_map, rank_extension
from tests.policy.engine_cases import MAX_RUNNING, VLLM, VLLM_PARAMETERS, EngineCase, needs_vllm, vllm_case
from tests.policy.serving import ask, assert_close, in_loop, learner_logprobs, random_prompt, serving, until


def reload_alone(model_runner: Any, tensors: dict[str, np.ndarray]) -> None:
    """What vLLM 0.32 does by itself."""
    model_runner.reload_weights(weights_iterator=parameter_map.checkpoint_tensors(tensors))


def nudge(end: str) -> Callable[..., None]:
    """A load after which one value of the parameter whose name ends so is another one."""

    def load(model_runner: Any, tensors: dict[str, np.ndarray]) -> None:
        parameter_map.load(model_runner, tensors)
        parameters = dict(model_runner.get_model().named_parameters())
        name = next(name for name in parameters if name.endswith(end))
        values = parameters[name].data.view(-1)
        values[len(values) // 3] += 0.5

    return load


SABOTAGE = {
    "a tied head whose packed copy is stale": ("vllm-dense", reload_alone, "lm_head"),
    "experts that were not packed again": ("vllm-moe-untied", reload_alone, "experts"),
    "one value of a norm": ("vllm-dense-untied", nudge("input_layernorm.weight"), "input_layernorm"),
    "one value of a decay": ("vllm-dense", nudge("A_log"), "A_log"),
    "one value of an embedding": ("vllm-dense-untied", nudge("embed_tokens.weight"), "embed_tokens"),
    "one value of an expert": ("vllm-moe", nudge("w2_weight"), "w2_weight"),
}


@pytest.mark.parametrize(
    ("name", "sabotaged", "message"),
    [pytest.param(*values, id=name, marks=needs_vllm) for name, values in SABOTAGE.items()],
)
@in_loop
async def test_weights_that_went_wrong_inside_vllm_are_caught_and_the_old_ones_serve_on(
    name: str, sabotaged: Callable[..., None], message: str
) -> None:
    case = VLLM[name]
    async with serving(case) as engine:
        request = ask(random_prompt(9), max_tokens=20, temperature=0.0)
        before = await engine.generate(request)
        loads = iter([sabotaged])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_extension, "load", lambda *args: next(loads, parameter_map.load)(*args))
            with pytest.raises(WeightSyncError, match=message):
                await engine.load_weights(case.snapshot(2, seed=1))
        assert engine.policy_version == 1
        after = await engine.generate(ask(request.prompt_ids, max_tokens=20, temperature=0.0))
        assert after.token_ids.tolist() == before.token_ids.tolist()
        assert after.logprobs.tolist() == before.logprobs.tolist()


@pytest.mark.parametrize("case", VLLM_PARAMETERS[:1])
@in_loop
async def test_after_a_broadcast_that_went_wrong_inside_vllm_the_old_version_is_pulled_again(case: EngineCase) -> None:
    sender = WeightSender("127.0.0.1", keep=2)
    async with serving(case) as engine:
        await engine.load_weights(sender.offer(case.snapshot(2, seed=1)))
        request = ask(random_prompt(9), max_tokens=20, temperature=0.0)
        before = await engine.generate(request)
        loads = iter([nudge("A_log")])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_extension, "load", lambda *args: next(loads, parameter_map.load)(*args))
            with pytest.raises(WeightSyncError, match="A_log"):
                await engine.load_weights(sender.offer(case.snapshot(3, seed=2)))
        assert engine.policy_version == 2
        after = await engine.generate(ask(request.prompt_ids, max_tokens=20, temperature=0.0))
        assert after.logprobs.tolist() == before.logprobs.tolist()
    sender.close()


@pytest.mark.parametrize("case", VLLM_PARAMETERS[:1])
@in_loop
async def test_an_engine_that_cannot_go_back_serves_nothing_any_more(case: EngineCase) -> None:
    async with serving(case) as engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rank_extension, "load", nudge("A_log"))
            with pytest.raises(EngineClosed, match="cannot go back to policy version 1"):
                await engine.load_weights(case.snapshot(2, seed=1))
        with pytest.raises(EngineError):
            await engine.generate(ask([1, 2]))


WITH_CACHE = vllm_case("vllm-dense", VllmConfig(prefix_cache=True))
CORE_WITH_CACHE = vllm_case("vllm-dense", VllmConfig(prefix_cache=True, process="core"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(WITH_CACHE, id="inproc", marks=needs_vllm),
        pytest.param(CORE_WITH_CACHE, id="core", marks=[*needs_vllm, pytest.mark.sweep]),
    ],
)
@pytest.mark.timeout(280)
@in_loop
async def test_a_swap_that_keeps_states_shares_none_of_them_with_what_has_sampled_nothing_yet(case: EngineCase) -> None:
    prompt = random_prompt(300)  # a block on a CPU: 256
    async with serving(case, max_model_tokens=400) as engine:
        before = [await engine.generate(ask(prompt, max_tokens=8)) for _ in range(2)]
        assert before[0].cached_tokens == 0 < before[1].cached_tokens
        busy = [asyncio.create_task(engine.generate(ask([i], max_tokens=250))) for i in range(MAX_RUNNING)]
        await until(lambda: engine.stats().running == MAX_RUNNING)
        requests = [ask(prompt, max_tokens=8) for _ in range(2)]
        waiting = asyncio.create_task(engine.generate(requests[0]))
        await until(lambda: engine.stats().waiting == 1)
        await engine.load_weights(case.snapshot(2, seed=1), cache_policy="keep")
        completions = [await waiting, await engine.generate(requests[1])]
        kept = await asyncio.gather(*busy)
    assert all({1, 2} == set(completion.policy_versions) for completion in kept)
    assert completions[0].cached_tokens == 0 < completions[1].cached_tokens  # of the new weights
    for request, completion in zip(requests, completions, strict=True):
        assert set(completion.policy_versions) == {2}
        assert_close(case, completion.logprobs, learner_logprobs(case, 1, request, completion))


@pytest.mark.parametrize("case", VLLM_PARAMETERS)
@in_loop
async def test_after_fifty_updates_an_engine_is_exactly_a_fresh_one(case: EngineCase) -> None:
    requests = [ask(random_prompt(5 + 7 * i), max_tokens=30, temperature=0.0) for i in range(4)]
    async with serving(case) as engine:
        for version in range(2, 52):
            await engine.load_weights(case.snapshot(version, seed=version % 5))
        worn = [await engine.generate(request) for request in requests]
    async with serving(case, seed=51 % 5) as engine:
        fresh = [await engine.generate(request) for request in requests]
    for one, other in zip(worn, fresh, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.logprobs.tolist() == other.logprobs.tolist()
