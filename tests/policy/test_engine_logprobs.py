"""An engine's logprobs are the learner's, in sessions and groups too, and its greedy tokens the likeliest."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from policy.engine.protocol import (
    Completion,
    Engine,
    GenerationRequest,
)
from policy.model.checkpoint_io import expected_tensors, load_numpy_tensors, to_numpy_tensors
from policy.model.hybrid import HybridModel
from tests.policy.engine_cases import (
    MAX_RUNNING,
    VOCAB,
    EngineCase,
    every_local_engine,
    every_real_engine,
)
from tests.policy.serving import (
    ask,
    assert_close,
    assert_equal_completions,
    in_loop,
    learner_logprobs,
    random_prompt,
    serving,
    until,
)


@every_real_engine
def test_the_learner_loads_what_the_engine_expects(case: EngineCase) -> None:
    assert case.model is not None
    tensors = case.tensors(3)
    model = HybridModel(case.model(3).config)
    case.snapshot(1, seed=3).verify(expected_tensors(model))
    load_numpy_tensors(model, tensors)
    assert all(np.array_equal(array, tensors[name]) for name, array in to_numpy_tensors(model).items())


@every_real_engine
@pytest.mark.parametrize(
    ("lengths", "together"),
    [(range(1, 131), True), ((1, 2, 3, 4, 31, 32, 33, 63, 64, 65, 127, 128, 129), False)],
    ids=["every length in mixed batches", "around edges alone"],
)
@in_loop
async def test_logprobs_are_the_learners_whatever_the_prompts_length(
    case: EngineCase, lengths: Sequence[int], together: bool
) -> None:
    spec = {"max_tokens": 3, "temperature": 0.7, "banned_token_ids": (0, 5, 60)}
    requests = [ask(random_prompt(n), **spec) for n in lengths]  # type: ignore[arg-type]
    async with serving(case) as engine:
        if together:
            completions = await asyncio.gather(*map(engine.generate, requests))
        else:
            completions = [await engine.generate(request) for request in requests]
    pairs = list(zip(requests, completions, strict=True))
    expected = np.concatenate([learner_logprobs(case, 0, request, completion) for request, completion in pairs])
    assert_close(case, np.concatenate([completion.logprobs for completion in completions]), expected)
    assert not any(np.isin(completion.token_ids, spec["banned_token_ids"]).any() for completion in completions)


async def play(
    engine: Engine, *, session_id: str | None, first: int = 40, temperature: float = 1.0
) -> list[tuple[GenerationRequest, Completion]]:
    """A conversation of three turns; the environment answers each completion with 9 tokens."""
    prompt, turns = random_prompt(first), []
    for turn in range(3):
        request = ask(prompt, session_id=session_id, max_tokens=14, seed=turn, temperature=temperature)
        completion = await engine.generate(request)
        turns.append((request, completion))
        prompt = np.concatenate([prompt, completion.token_ids, random_prompt(9, seed=turn)])
    return turns


@every_local_engine
@in_loop
async def test_a_session_of_three_turns_has_the_learners_logprobs_and_skips_what_it_knows(case: EngineCase) -> None:
    async with serving(case) as engine:
        turns = await play(engine, session_id="a")
        without = await play(engine, session_id=None)
        greedy = await play(engine, session_id="b", temperature=0.0)
        assert engine.stats().sessions == 2
        await engine.close_session("a")
        await until(lambda: engine.stats().sessions == 1)
    for request, completion in turns + greedy:
        np.testing.assert_allclose(completion.logprobs, learner_logprobs(case, 0, request, completion), atol=1e-4)
    for (_, kept), (_, fresh) in zip(turns, without, strict=True):
        assert_equal_completions(kept, fresh)
    # All but the last sampled token of the turn before are in the state.
    assert [completion.cached_tokens for _, completion in turns] == [0, 40 + 13, 40 + 2 * 14 + 9 - 1]


@every_local_engine
@in_loop
async def test_a_session_whose_history_was_rewritten_starts_afresh(case: EngineCase) -> None:
    async with serving(case) as engine:
        first = await engine.generate(ask(random_prompt(20), session_id="a", max_tokens=5))
        rewritten = np.concatenate([random_prompt(20), first.token_ids, [1, 2]])
        rewritten[7] = (rewritten[7] + 1) % VOCAB
        request = ask(rewritten, session_id="a", max_tokens=5)
        completion = await engine.generate(request)
    assert completion.cached_tokens == 0
    np.testing.assert_allclose(completion.logprobs, learner_logprobs(case, 0, request, completion), atol=1e-4)


@every_local_engine
@in_loop
async def test_a_group_prefills_its_prompt_once_and_samples_as_fresh_runs_would(case: EngineCase) -> None:
    group = [ask(random_prompt(33), max_tokens=20, seed=i, temperature=0.9) for i in range(3 * MAX_RUNNING)]
    async with serving(case) as engine:
        forked = await asyncio.gather(*map(engine.generate, group))
        assert engine.stats().prefilled_tokens == 33
    assert [completion.cached_tokens for completion in forked] == [0] + [33] * (len(group) - 1)
    async with serving(case) as engine:
        for member in (0, 5, len(group) - 1):
            await engine.load_weights(case.snapshot(2))  # forget the prompt
            fresh = await engine.generate(group[member])
            assert fresh.cached_tokens == 0
            assert_equal_completions(forked[member], fresh)
    for request, completion in zip(group, forked, strict=True):
        np.testing.assert_allclose(completion.logprobs, learner_logprobs(case, 0, request, completion), atol=1e-4)


@every_real_engine
@in_loop
async def test_greedy_sampling_takes_the_likeliest_allowed_token(case: EngineCase) -> None:
    assert case.model is not None
    async with serving(case) as engine:
        free = await engine.generate(ask(random_prompt(12), max_tokens=1, temperature=0.0))
        banned = (int(free.token_ids[0]),)
        second = await engine.generate(ask(random_prompt(12), max_tokens=1, temperature=0.0, banned_token_ids=banned))
    with torch.no_grad():
        logits = case.model(0)(torch.from_numpy(random_prompt(12)).long(), torch.tensor([0, 12])).logits[-1]
    assert [int(free.token_ids[0]), int(second.token_ids[0])] == logits.topk(2).indices.tolist()
