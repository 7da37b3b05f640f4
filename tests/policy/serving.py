"""Engines that serve in a test, what they are asked, and what the learner says of their tokens."""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import torch

from policy.engine.protocol import (
    Completion,
    Engine,
    GenerationRequest,
    SamplingSpec,
)
from policy.model.logprobs import token_logprobs
from tests.policy.engine_cases import (
    VOCAB,
    EngineCase,
)


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test to its end, or for four minutes: vLLM starts slowly on a busy machine."""

    @functools.wraps(test)
    def run(**arguments: object) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), 240))

    return run


@contextlib.asynccontextmanager
async def serving(case: EngineCase, *, seed: int = 0, **arguments: object) -> AsyncIterator[Engine]:
    """An engine that holds version 1. Each has an engine of its own: vLLM's share their process's parallel groups."""
    engine = case.make(**arguments)
    try:
        await engine.load_weights(case.snapshot(1, seed=seed))
        yield engine
    finally:  # processes of its own would stay until the last test has ended
        await engine.close()


request_ids = itertools.count()


def ask(
    prompt: np.ndarray | list[int], *, session_id: str | None = None, deadline_s: float = 60.0, **spec: object
) -> GenerationRequest:
    """A request; what is not said is the engine's contract default."""
    return GenerationRequest(
        request_id=f"r{next(request_ids)}",
        prompt_ids=np.array(prompt, np.int32),
        sampling=SamplingSpec(**spec),  # type: ignore[arg-type]
        session_id=session_id,
        deadline_s=deadline_s,
    )


def sure(engine: Engine, seed: int) -> dict[str, Any]:
    """Sampling that gives the same tokens each time: by a seed where the engine takes one."""
    return {"seed": seed} if engine.capabilities.per_request_seed else {"temperature": 0.0}


def assert_close(case: EngineCase, one: np.ndarray, other: np.ndarray, message: str = "") -> None:
    """Logprobs agree as closely as the engine computes."""
    gap = np.abs(np.asarray(one) - np.asarray(other))
    assert gap.shape == np.shape(one) == np.shape(other)
    assert gap.mean() <= case.noise[0] and gap.max() <= case.noise[1], f"{message} mean {gap.mean()} max {gap.max()}"


def random_prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).astype(np.int32)


async def until(predicate: Callable[[], bool]) -> None:
    """Wait for something that happens on another thread."""
    async with asyncio.timeout(20):
        while not predicate():
            await asyncio.sleep(0.0005)


def learner_logprobs(
    case: EngineCase, seed: int, request: GenerationRequest, completion: Completion, *, routes_from: int = 0
) -> np.ndarray:
    """Logprobs of a completion from one forward pass over the whole conversation, with the routes that were recorded.

    Those of the tokens before `routes_from` are the learner's own: other weights recorded them.
    """
    assert case.model is not None
    model, spec = case.model(seed), request.sampling
    ids = torch.from_numpy(np.concatenate([request.prompt_ids, completion.token_ids]).astype(np.int64))
    banned = torch.zeros(VOCAB, dtype=torch.bool)
    banned[list(spec.banned_token_ids)] = True
    routes = recorded_routes(request, completion)
    if routes is not None:
        routes[:routes_from] = -1
    with torch.no_grad():
        logits = model(ids, torch.tensor([0, len(ids)]), routed_experts=routes).logits
    first = len(request.prompt_ids)
    return token_logprobs(logits[first - 1 : -1], ids[first:], spec.temperature, banned)[0].numpy()


def recorded_routes(request: GenerationRequest, completion: Completion) -> torch.Tensor | None:
    """(tokens of the conversation, M, k), -1 where the engine told none."""
    sampled, prompt = completion.routed_experts, completion.prompt_routes
    if sampled is None:
        return None
    if prompt is None:
        prompt = np.full((len(request.prompt_ids), *sampled.shape[1:]), -1, np.int16)
    return torch.from_numpy(np.concatenate([prompt, sampled]).astype(np.int64))


def assert_equal_completions(one: Completion, other: Completion) -> None:
    assert one.token_ids.tolist() == other.token_ids.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert one.finish_reason == other.finish_reason
