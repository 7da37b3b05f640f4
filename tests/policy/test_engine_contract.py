"""What every engine must do, run against each of them. A new engine joins by adding a case."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from policy.engine.protocol import (
    EngineClosed,
    EngineError,
    SamplingSpec,
    UnsupportedRequest,
)
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
)
from tests.policy.serving import (
    ask,
    assert_equal_completions,
    in_loop,
    random_prompt,
    serving,
    sure,
    until,
)


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
