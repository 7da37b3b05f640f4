"""Routes that vLLM returns itself, as on GPUs: where its CPU build cannot, what it would return is handed over."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from policy.engine import EngineClosed
from policy.logprobs import token_logprobs
from policy.vllm_core import VllmCore
from policy.vllm_packages import vllm_build
from policy.vllm_routes import returned_routes
from tests.engine_cases import VLLM
from tests.test_policy_engine_contract import ask, assert_close, in_loop, random_prompt, serving

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


@pytest.mark.vllm
@needs
@pytest.mark.skipif(vllm_build() == "gpu", reason="the GPU build returns routes")
@in_loop
async def test_a_vllm_that_cannot_return_routes_names_the_setting_that_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("vllm_core", "vllm_stepper"):
        monkeypatch.setattr(f"policy.{module}.vllm_build", lambda: "gpu")
    case = VLLM["vllm-moe"]
    engine = case.make()
    try:
        with pytest.raises(EngineClosed, match=r"Model Runner V2.*engine\.vllm\.routes=false"):
            await engine.load_weights(case.snapshot(1))
    finally:
        await engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
@pytest.mark.skipif(vllm_build() != "gpu", reason="needs the extra `vllm`")
@in_loop
async def test_on_a_gpu_vllms_own_routes_replayed_give_its_logprobs() -> None:
    case = VLLM["vllm-moe"]
    assert case.model is not None
    async with serving(case) as engine:
        for tokens in (9, 60, 60):  # the last two share whole blocks of a prefix cache
            request = ask(random_prompt(tokens), max_tokens=40)
            completion = await engine.generate(request)
            assert completion.prompt_routes is not None and (completion.prompt_routes >= 0).all()
            assert completion.routed_experts is not None and (completion.routed_experts[:-1] >= 0).all()
            assert (completion.routed_experts[-1] == -1).all()
            ids = torch.from_numpy(np.concatenate([request.prompt_ids, completion.token_ids]).astype(np.int64))
            routes = np.concatenate([completion.prompt_routes, completion.routed_experts]).astype(np.int64)
            with torch.no_grad():
                output = case.model(0)(ids, torch.tensor([0, len(ids)]), routed_experts=torch.from_numpy(routes))
            replayed, _ = token_logprobs(output.logits[tokens - 1 : -1], ids[tokens:], 1.0)
            assert_close(case, completion.logprobs, replayed.numpy())
