"""What every engine that computes must do for requests under which its weights are swapped."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from policy.engine.protocol import Completion, EngineError, GenerationRequest
from policy.sync.snapshot import PolicySnapshot
from tests.policy.engine_cases import CASES, VLLM_CORE, VLLM_PARAMETERS, EngineCase, every_real_engine
from tests.policy.serving import (
    ask,
    assert_close,
    assert_equal_completions,
    in_loop,
    learner_logprobs,
    random_prompt,
    serving,
    sure,
    until,
)


@every_real_engine
@in_loop
async def test_after_a_recompute_swap_a_request_goes_on_as_if_it_had_the_new_weights_all_along(
    case: EngineCase,
) -> None:
    request = ask(random_prompt(30), max_tokens=100, temperature=0.0)
    async with serving(case) as engine:
        running = asyncio.create_task(engine.generate(request))
        await until(lambda: engine.stats().sampled_tokens >= 4)
        await engine.load_weights(case.snapshot(2, seed=1), cache_policy="recompute")
        completion = await running
    old = int((completion.policy_versions == 1).sum())
    prefix = np.concatenate([request.prompt_ids, completion.token_ids[:old]])
    async with serving(case, seed=1) as engine:
        rest = await engine.generate(ask(prefix, max_tokens=100 - old, temperature=0.0))
    if case.exact:
        assert completion.token_ids[old:].tolist() == rest.token_ids.tolist()
        np.testing.assert_allclose(completion.logprobs[old:], rest.logprobs, atol=1e-4)
    # the tokens may part where rounding decides; what was sampled has the new weights' logprobs all the same
    routes = completion.routed_experts
    new = replace(
        completion,
        token_ids=completion.token_ids[old:],
        routed_experts=None if routes is None else routes[old:],
        prompt_routes=None,  # of the old weights
    )
    expected = learner_logprobs(case, 1, replace(request, prompt_ids=prefix), new)
    assert_close(case, completion.logprobs[old:], expected)


def first_fed_by(version: int, request: GenerationRequest, completion: Completion) -> int:
    """The first token of the conversation whose routes weights of `version` recorded: the last sampled before them."""
    sampled_before = int((completion.policy_versions < version).sum())
    return sampled_before and len(request.prompt_ids) + sampled_before - 1


@pytest.mark.parametrize(
    "case",
    [*(pytest.param(CASES[name], id=name) for name in ("local-dense", "local-moe")), VLLM_PARAMETERS[0], VLLM_CORE],
)
@in_loop
async def test_a_hundred_requests_live_through_ten_updates_and_every_token_names_its_version(case: EngineCase) -> None:
    requests = [ask(random_prompt(3 + i % 20, seed=i), max_tokens=20 + i % 60) for i in range(100)]
    async with serving(case) as engine:
        running = [asyncio.create_task(engine.generate(request)) for request in requests]
        for version in range(2, 12):
            await until(lambda version=version: engine.stats().sampled_tokens >= 400 * (version - 1))
            await engine.load_weights(case.snapshot(version, seed=version))
        completions = await asyncio.gather(*running)
    assert [len(completion.token_ids) for completion in completions] == [20 + i % 60 for i in range(100)]
    assert {v for completion in completions for v in completion.policy_versions} == set(range(1, 12))
    assert all((np.diff(completion.policy_versions) >= 0).all() for completion in completions)
    # by the version that a token names, its logprob is the one of a fresh prefill under these weights
    gaps = []
    for request, completion in zip(requests, completions, strict=True):
        for version in np.unique(completion.policy_versions):
            named = completion.policy_versions == version
            expected = learner_logprobs(
                case,
                0 if version == 1 else int(version),
                request,
                completion,
                routes_from=first_fed_by(int(version), request, completion),
            )
            gaps.append((completion.logprobs[named], expected[named]))
    sampled, expected = (np.concatenate(side) for side in zip(*gaps, strict=True))
    print(f"recomputed under new weights: mean {np.abs(sampled - expected).mean()}")
    assert_close(case, sampled, expected)
    assert case.exact or np.abs(sampled - expected).mean() <= 0.01


@every_real_engine
@in_loop
async def test_weights_that_overflow_fail_their_requests_and_leave_no_trace(case: EngineCase) -> None:
    async with serving(case) as engine:
        request = ask(random_prompt(70), max_tokens=30, **sure(engine, 1))
        before = await engine.generate(request)
        running = asyncio.create_task(engine.generate(ask(random_prompt(30), max_tokens=100)))
        await until(lambda: engine.stats().sampled_tokens >= 34)
        overflowing = case.tensors(0)
        first = "model.layers.0.linear_attn.in_proj_qkv.weight"  # so that no state is finite
        overflowing[first] = np.full_like(overflowing[first], 3e38)
        await engine.load_weights(PolicySnapshot.create(2, overflowing))
        for failing in (running, engine.generate(ask(random_prompt(100), max_tokens=5))):
            with pytest.raises(EngineError, match="logits of policy version 2 are not finite"):
                await failing
        await engine.load_weights(case.snapshot(3))
        assert_equal_completions(await engine.generate(replace(request, request_id="after")), before)
        assert engine.stats().running == 0
