"""Routes that vLLM returns itself, as on GPUs: where its CPU build cannot, what it would return is handed over."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import VllmConfig
from policy.engine.protocol import EngineClosed
from policy.vllm.core import VllmCore
from policy.vllm.packages import vllm_build
from policy.vllm.routes import returned_routes
from tests.fakes import FakeClock
from tests.policy.engine_cases import MAX_TOKENS, VLLM, vllm_case
from tests.policy.serving import ask, assert_close, in_loop, learner_logprobs, random_prompt, serving, until

pytestmark = pytest.mark.timeout(280)
needs = pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra")


def test_routes_that_vllm_returns_end_where_it_fed_nothing() -> None:
    rows = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    routes = returned_routes(rows, (4, 2, 2))
    assert routes.dtype == np.int16 and (routes[:3] == rows).all() and (routes[3] == -1).all()
    assert (returned_routes(None, (4, 2, 2)) == -1).all()


@pytest.mark.parametrize("shape", [(5, 2, 2), (3, 1, 2), (3, 2, 1)])
def test_routes_of_other_layers_or_of_more_tokens_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"routes of shape .*, at most \(4, 2, 2\)"):
        returned_routes(np.zeros(shape, np.uint8), (4, 2, 2))


def returning(step: Callable[[VllmCore], list[Any]], hooked: dict[str, np.ndarray]) -> Callable[[VllmCore], list[Any]]:
    """`VllmCore.step` whose last outputs carry their request's routes as vLLM's model runner 2 returns them."""
    take = VllmCore.routes

    def stepped(core: VllmCore) -> list[Any]:
        outputs = step(core)
        for output in outputs:
            if output.finished:
                hooked.update(take(core, [output.request_id]))
                fed = hooked[output.request_id]
                output.outputs[0].routed_experts = fed[(fed >= 0).all((1, 2))].astype(np.uint8)
        return outputs

    return stepped


@pytest.mark.vllm
@needs
@in_loop
async def test_returned_routes_reach_the_completion_as_those_of_the_hooks_do() -> None:
    hooked: dict[str, np.ndarray] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmCore, "step", returning(VllmCore.step, hooked))
        patch.setattr(VllmCore, "routes", lambda core, request_ids: {})
        async with serving(VLLM["vllm-moe"]) as engine:
            request = ask(random_prompt(9), max_tokens=12)
            completion = await engine.generate(request)
    (recorded,) = [routes for name, routes in hooked.items() if name == request.request_id]
    assert completion.prompt_routes is not None and completion.routed_experts is not None
    assert np.array_equal(completion.prompt_routes, recorded[:9]) and (recorded[:20] >= 0).all()
    assert np.array_equal(completion.routed_experts, recorded[9:21]) and (recorded[20] == -1).all()


def numbered(first: int, last: int) -> np.ndarray:
    """Routes (last - first, 4, 2) that tell the place of their token."""
    return np.tile((np.arange(first, last)[:, None, None] + np.arange(2)) % 8, (1, 4, 1)).astype(np.uint8)


def handing_over(step: Callable[[VllmCore], list[Any]]) -> Callable[[VllmCore], list[Any]]:
    """`VllmCore.step` that leaves chunks of routes inside vLLM, as its model runner 2 does: of the prompt with the
    first token, then of one more token each."""

    def stepped(core: VllmCore) -> list[Any]:
        outputs, processor = step(core), core._engine.output_processor
        for state in processor.request_states.values():
            fed = state.prompt_len + state.detokenizer.num_output_tokens() - 1
            known = sum(map(len, state.routed_experts_chunks))
            if state.detokenizer.num_output_tokens() and fed > known:
                state.routed_experts_chunks.append(numbered(known, fed))
        return outputs

    return stepped


@pytest.mark.vllm
@needs
@in_loop
async def test_a_request_that_is_cut_off_keeps_the_routes_returned_so_far() -> None:
    clock = FakeClock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VllmCore, "step", handing_over(VllmCore.step))
        patch.setattr(VllmCore, "routes", lambda core, request_ids: {})
        async with serving(VLLM["vllm-moe"], clock=clock) as engine:
            requests = [ask(random_prompt(9), max_tokens=MAX_TOKENS, deadline_s=8.0) for _ in range(2)]
            running = [asyncio.create_task(engine.generate(request)) for request in requests]
            await until(lambda: engine.stats().sampled_tokens >= 10)
            await engine.abort(requests[0].request_id)
            aborted = await running[0]
            clock.advance(8.0)
            overdue = await running[1]
    assert (aborted.finish_reason, overdue.finish_reason) == ("abort", "deadline")
    for completion in (aborted, overdue):
        assert completion.prompt_routes is not None and completion.routed_experts is not None
        fed = 9 + len(completion.token_ids) - 1
        assert np.array_equal(completion.prompt_routes, numbered(0, 9))
        assert np.array_equal(completion.routed_experts[:-1], numbered(9, fed)) and fed > 11
        assert (completion.routed_experts[-1] == -1).all()


@pytest.mark.vllm
@needs
@pytest.mark.skipif(vllm_build() == "gpu", reason="the GPU build returns routes")
@in_loop
async def test_a_vllm_that_cannot_return_routes_names_the_setting_that_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("core", "stepper"):
        monkeypatch.setattr(f"policy.vllm.{module}.vllm_build", lambda: "gpu")
    case = VLLM["vllm-moe"]
    engine = case.make()
    try:
        with pytest.raises(EngineClosed, match=r"Model Runner V2.*engine\.vllm\.routes=false"):
            await engine.load_weights(case.snapshot(1))
    finally:
        await engine.close()


@pytest.mark.vllm
@needs
@in_loop
async def test_a_start_that_fails_for_another_reason_does_not_blame_the_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("core", "stepper"):
        monkeypatch.setattr(f"policy.vllm.{module}.vllm_build", lambda: "gpu")
    case = vllm_case("vllm-moe", VllmConfig(dtype="float17"))
    engine = case.make()
    try:
        with pytest.raises(EngineClosed, match="float17") as raised:
            await engine.load_weights(case.snapshot(1))
        assert "engine.vllm.routes" not in str(raised.value)
    finally:
        await engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
@pytest.mark.skipif(vllm_build() != "gpu", reason="needs the extra `vllm`")
@in_loop
async def test_on_a_gpu_vllms_own_routes_replayed_give_its_logprobs() -> None:
    case = VLLM["vllm-moe"]
    async with serving(case, max_model_tokens=800) as engine:
        for tokens in (9, 700, 700):  # the last two share whole blocks of a prefix cache
            request = ask(random_prompt(tokens), max_tokens=40)
            completion = await engine.generate(request)
            assert completion.prompt_routes is not None and (completion.prompt_routes >= 0).all()
            assert completion.routed_experts is not None and (completion.routed_experts[:-1] >= 0).all()
            assert (completion.routed_experts[-1] == -1).all()
            assert_close(case, completion.logprobs, learner_logprobs(case, 0, request, completion))
    assert completion.cached_tokens > 0
