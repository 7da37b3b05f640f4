"""What every engine must do, run against each of them. A new engine joins by adding a case."""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from policy.engine.protocol import (
    Completion,
    Engine,
    EngineClosed,
    EngineError,
    GenerationRequest,
    SamplingSpec,
    UnsupportedRequest,
)
from policy.model.checkpoint_io import expected_tensors, load_numpy_tensors, to_numpy_tensors
from policy.model.hybrid import HybridModel
from policy.model.logprobs import token_logprobs
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from tests.fakes import FakeClock
from tests.policy.engine_cases import (
    CASES,
    MAX_RUNNING,
    MAX_TOKENS,
    VLLM_PARAMETERS,
    VOCAB,
    EngineCase,
    every_engine,
    every_local_engine,
    every_real_engine,
)


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test to its end, or for four minutes: vLLM starts slowly on a busy machine."""

    @functools.wraps(test)
    def run(**arguments: object) -> None:
        asyncio.run(asyncio.wait_for(test(**arguments), 240))

    return run


@contextlib.asynccontextmanager
async def serving(case: EngineCase, *, seed: int = 0, **arguments: object) -> AsyncIterator[Engine]:
    """An engine that holds version 1."""
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


# --- what a completion is ---


@every_engine
@in_loop
async def test_nothing_is_served_before_the_first_weights(case: EngineCase) -> None:
    engine = case.make()
    assert engine.policy_version == -1
    with pytest.raises(EngineError, match="before it holds weights"):
        await engine.generate(ask([1, 2]))
    await engine.load_weights(case.snapshot(5))
    completion = await engine.generate(ask([1, 2], max_tokens=3))
    assert completion.policy_versions.tolist() == [5, 5, 5]
    await engine.close()


@every_engine
@in_loop
async def test_a_completion_has_one_entry_per_token_in_every_column(case: EngineCase) -> None:
    async with serving(case) as engine:
        completion = await engine.generate(ask([1, 2, 3], max_tokens=7))
    assert completion.finish_reason == "length"
    columns = [completion.token_ids, completion.logprobs, completion.policy_versions]
    assert [(column.shape, column.dtype) for column in columns] == [
        ((7,), np.int32),
        ((7,), np.float32),
        ((7,), np.int32),
    ]
    assert (completion.logprobs <= 0).all()
    if engine.capabilities.routed_experts:
        assert completion.routed_experts is not None
        assert completion.routed_experts.shape == (7, 4, 2)
        assert completion.routed_experts.dtype == np.int16
    else:
        assert completion.routed_experts is None


@every_engine
@in_loop
async def test_sampling_ends_after_a_stop_token_which_is_kept(case: EngineCase) -> None:
    async with serving(case) as engine:
        how = sure(engine, 3)
        free = await engine.generate(ask([1, 2, 3], max_tokens=40, **how))
        stop = int(free.token_ids[20])
        stopped = await engine.generate(ask([1, 2, 3], max_tokens=40, **how, stop_token_ids=(stop, VOCAB - 1)))
    at = min(free.token_ids.tolist().index(i) for i in (stop, VOCAB - 1) if i in free.token_ids)
    assert stopped.token_ids.tolist() == free.token_ids[: at + 1].tolist()
    assert stopped.finish_reason == "stop"


@every_engine
@in_loop
async def test_a_conversation_ends_at_the_longest_the_model_takes(case: EngineCase) -> None:
    async with serving(case) as engine:
        completions = await asyncio.gather(
            engine.generate(ask(random_prompt(MAX_TOKENS - 5), max_tokens=50)),
            engine.generate(ask(random_prompt(MAX_TOKENS - 1), max_tokens=50)),
        )
    assert [len(completion.token_ids) for completion in completions] == [5, 1]
    assert [completion.finish_reason for completion in completions] == ["length", "length"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@in_loop
async def test_a_seed_decides_the_tokens_whatever_else_runs(case: EngineCase) -> None:
    async with serving(case) as engine:
        mine = ask(random_prompt(9), max_tokens=30, seed=11)
        alone = await engine.generate(mine)
        company = [ask(random_prompt(5 + i, seed=i), max_tokens=10 + 3 * i, temperature=0.8) for i in range(6)]
        crowd = [*company[:3], replace(mine, request_id="again"), *company[3:]]
        together = (await asyncio.gather(*map(engine.generate, crowd)))[3]
        other_seed = await engine.generate(ask(mine.prompt_ids, max_tokens=30, seed=12))
    assert_equal_completions(alone, together)
    assert alone.token_ids.tolist() != other_seed.token_ids.tolist()


@pytest.mark.parametrize("case", VLLM_PARAMETERS)
@in_loop
async def test_what_an_engine_cannot_do_is_refused_by_name(case: EngineCase) -> None:
    """One that takes a seed on vLLM's CPU build ends the engine."""
    async with serving(case) as engine:
        for name, value in {"seed": 3, "top_p": 0.9, "top_k": 5}.items():
            with pytest.raises(UnsupportedRequest, match=f"'vllm' cannot take {name}"):
                await engine.generate(ask([1], **{name: value}))
        with pytest.raises(UnsupportedRequest, match=r"'vllm' cannot take temperature 0\.005: 0 or .* 0\.01"):
            await engine.generate(ask([1], temperature=0.005))  # vLLM would make 0.01 of it
        with pytest.raises(UnsupportedRequest, match="'vllm' cannot take session_id"):
            await engine.generate(ask([1], session_id="a"))
        assert len((await engine.generate(ask([1], max_tokens=2))).token_ids) == 2


@every_engine
@in_loop
async def test_requests_without_a_seed_differ(case: EngineCase) -> None:
    async with serving(case) as engine:
        one, other = [await engine.generate(ask([1, 2, 3], max_tokens=30)) for _ in range(2)]
    assert one.token_ids.tolist() != other.token_ids.tolist()


# --- ending early ---


@every_engine
@in_loop
async def test_an_aborted_request_returns_what_it_has(case: EngineCase) -> None:
    async with serving(case) as engine:
        await engine.abort("nobody")
        request = ask(random_prompt(4), max_tokens=MAX_TOKENS)
        running = asyncio.create_task(engine.generate(request))
        await until(lambda: engine.stats().sampled_tokens >= 5)
        await engine.abort(request.request_id)
        completion = await running
        assert completion.finish_reason == "abort"
        assert 5 <= len(completion.token_ids) < MAX_TOKENS - 4
        assert len(completion.logprobs) == len(completion.policy_versions) == len(completion.token_ids)
        await until(lambda: engine.stats().running == 0)


@every_engine
@in_loop
async def test_a_request_past_its_deadline_returns_what_it_has(case: EngineCase) -> None:
    clock = FakeClock()
    async with serving(case, clock=clock) as engine:
        running = asyncio.create_task(engine.generate(ask(random_prompt(4), max_tokens=MAX_TOKENS, deadline_s=8.0)))
        await until(lambda: engine.stats().sampled_tokens >= 5)
        clock.advance(8.0)
        completion = await running
        late = await engine.generate(ask([1], deadline_s=-1.0))
    assert completion.finish_reason == "deadline"
    assert 5 <= len(completion.token_ids) < MAX_TOKENS - 4
    assert (late.finish_reason, len(late.token_ids)) == ("deadline", 0)


@every_engine
@in_loop
async def test_a_caller_that_goes_away_frees_its_place(case: EngineCase) -> None:
    async with serving(case) as engine:
        request = ask([1, 2], max_tokens=MAX_TOKENS)
        running = asyncio.create_task(engine.generate(request))
        await until(lambda: engine.stats().sampled_tokens >= 2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        again = await engine.generate(replace(request, sampling=SamplingSpec(max_tokens=2)))  # its id is free again
        assert again.finish_reason == "length"
        await until(lambda: engine.stats().running == 0)


@every_engine
@in_loop
async def test_closing_ends_what_runs_and_refuses_what_comes(case: EngineCase) -> None:
    async with serving(case) as engine:
        busy = [asyncio.create_task(engine.generate(ask([i], max_tokens=MAX_TOKENS))) for i in range(12)]
        await until(lambda: engine.stats().sampled_tokens >= 2)
        await engine.close()
        outcomes = await asyncio.gather(*busy, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {EngineClosed}
        with pytest.raises(EngineClosed):
            await engine.generate(ask([1]))
        with pytest.raises(EngineClosed):
            await engine.load_weights(case.snapshot(2))
        await engine.close()


@every_engine
@in_loop
async def test_closing_ends_weights_that_are_on_their_way(case: EngineCase) -> None:
    async with serving(case) as engine:
        loading = [asyncio.create_task(engine.load_weights(case.snapshot(version))) for version in (2, 3)]
        await asyncio.sleep(0)  # let them start
        await engine.close()
        outcomes = await asyncio.wait_for(asyncio.gather(*loading, return_exceptions=True), 10)
        assert {type(outcome) for outcome in outcomes} <= {EngineClosed, type(None)}


@every_engine
@in_loop
async def test_weights_are_swapped_in_the_order_of_the_calls(case: EngineCase) -> None:
    async with serving(case) as engine:
        await asyncio.gather(*(engine.load_weights(case.snapshot(version)) for version in range(2, 9)))
        assert engine.policy_version == 8


# --- load and bad requests ---


@every_engine
@in_loop
async def test_three_times_more_requests_than_fit_all_finish(case: EngineCase) -> None:
    async with serving(case) as engine:
        lengths = [3 + 5 * (i % 7) for i in range(3 * MAX_RUNNING)]
        sessions = [f"s{i}" if engine.capabilities.sessions else None for i in range(len(lengths))]
        requests = [ask(random_prompt(2 + i), max_tokens=n, session_id=sessions[i]) for i, n in enumerate(lengths)]
        completions = await asyncio.gather(*map(engine.generate, requests))
        assert [len(completion.token_ids) for completion in completions] == lengths
        stats = engine.stats()
    assert (stats.running, stats.waiting, stats.sampled_tokens) == (0, 0, sum(lengths))


HOSTILE = {
    "empty prompt": (ask([]), "0 tokens"),
    "a prompt as long as the model": (ask([1] * MAX_TOKENS), f"{MAX_TOKENS} tokens"),
    "a negative id": (ask([1, -1]), "-1 is not in"),
    "an id beyond the vocabulary": (ask([1, VOCAB]), f"{VOCAB} is not in"),
    "floats": (replace(ask([1]), prompt_ids=np.ones(3)), "float64"),
    "two dimensions": (replace(ask([1]), prompt_ids=np.ones((2, 2), np.int32)), r"\(2, 2\)"),
    "no tokens wanted": (ask([1], max_tokens=0), "max_tokens 0"),
    "everything banned": (ask([1], banned_token_ids=tuple(range(VOCAB))), "banned"),
    "a banned id beyond the vocabulary": (ask([1], banned_token_ids=(VOCAB,)), f"banned token id {VOCAB}"),
    "a stop id beyond the vocabulary": (ask([1], stop_token_ids=(-3,)), "stop token id -3"),
    "a negative temperature": (ask([1], temperature=-1.0), "temperature -1.0"),
    "a temperature that is not a number": (ask([1], temperature=float("nan")), "temperature nan"),
    "top_p of 0": (ask([1], top_p=0.0), "top_p 0.0"),
    "top_p above 1": (ask([1], top_p=1.5), "top_p 1.5"),
    "a negative top_k": (ask([1], top_k=-1), "top_k -1"),
    "no deadline": (ask([1], deadline_s=float("inf")), "deadline_s inf"),
}


@every_engine
@in_loop
async def test_hostile_requests_are_refused_by_name_and_disturb_nobody(case: EngineCase) -> None:
    async with serving(case) as engine:
        steady = ask(random_prompt(6), max_tokens=60, **sure(engine, 1))
        alone = await engine.generate(steady)
        running = asyncio.create_task(engine.generate(replace(steady, request_id="steady")))
        await asyncio.sleep(0)  # let it start
        for name, (request, message) in HOSTILE.items():
            with pytest.raises(UnsupportedRequest, match=message):
                await engine.generate(request)
                pytest.fail(name)
        with pytest.raises(UnsupportedRequest, match="in use"):
            await engine.generate(replace(steady, request_id="steady"))
        assert_equal_completions(await running, alone)


# --- weights ---


@every_engine
@in_loop
async def test_versions_switch_exactly_once_when_weights_are_swapped_under_a_request(case: EngineCase) -> None:
    async with serving(case) as engine:
        running = asyncio.create_task(engine.generate(ask(random_prompt(4), max_tokens=MAX_TOKENS)))
        await until(lambda: engine.stats().sampled_tokens >= 3)
        await engine.load_weights(case.snapshot(2, seed=1))
        assert engine.policy_version == 2
        versions = (await running).policy_versions
    assert versions[0] == 1
    assert versions[-1] == 2
    assert (np.diff(versions) != 0).sum() == 1


def drop(tensors: dict[str, np.ndarray], name: str) -> None:
    del tensors[name]


def rename(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors["language_model." + name] = tensors.pop(name)


def truncate(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name] = tensors[name][:-1]


def poison(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name] = tensors[name].copy()
    tensors[name].flat[0] = np.nan


def widen(tensors: dict[str, np.ndarray], name: str) -> None:
    tensors[name] = tensors[name].astype(np.float64)


@every_engine
@pytest.mark.parametrize("sabotage", [drop, rename, truncate, poison, widen])
@in_loop
async def test_sabotaged_weights_are_refused_by_name_and_the_old_ones_go_on(
    case: EngineCase, sabotage: Callable[[dict[str, np.ndarray], str], None]
) -> None:
    async with serving(case) as engine:
        request = ask(random_prompt(6), max_tokens=40, **sure(engine, 1))
        before = await engine.generate(request)
        tensors = case.tensors(1)
        name = sorted(tensors)[-1]  # the last to be loaded: nothing before it may have been changed
        sabotage(tensors, name)
        with pytest.raises(WeightSyncError, match=name):
            await engine.load_weights(PolicySnapshot.create(2, tensors))
        assert engine.policy_version == 1
        assert_equal_completions(await engine.generate(replace(request, request_id="after")), before)


@every_engine
@in_loop
async def test_weights_that_changed_after_their_manifest_was_made_are_refused(case: EngineCase) -> None:
    async with serving(case) as engine:
        snapshot = case.snapshot(2, seed=1)
        next(iter(snapshot.tensors.values())).flat[0] += 1
        with pytest.raises(WeightSyncError, match="digest"):
            await engine.load_weights(snapshot)
        with pytest.raises(WeightSyncError, match="-1"):
            await engine.load_weights(case.snapshot(-1))
        assert engine.policy_version == 1


# --- logits that mean something ---


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
