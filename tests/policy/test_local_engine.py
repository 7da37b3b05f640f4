"""The local engine's own parts: drawing, slots, the synchronous stepper, and a step thread that fails."""

import asyncio
import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig
from policy.engine.batch_stepper import PREFILL_TOKENS, BatchStepper
from policy.engine.local_engine import LocalEngine
from policy.engine.protocol import Completion, EngineClosed, EngineError, GenerationRequest, SamplingSpec
from policy.engine.running_batch import Ticket
from policy.engine.sampling import stream_key
from policy.model.checkpoint_io import to_numpy_tensors
from policy.model.hybrid import PRESETS, HybridModel
from policy.model.logprobs import token_logprobs
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from policy.sync.weight_offer import OfferedSnapshot
from tests.fakes import FakeClock

VOCAB = 61
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "head_dim": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SHAPES = {
    "dense": PRESETS["tiny_hybrid"].override(SMALL | {"intermediate_size": 48}),
    "moe": PRESETS["tiny_moe"].override(SMALL | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
}
CPU = torch.device("cpu")
both_shapes = pytest.mark.parametrize("shape", ["dense", "moe"])


@functools.cache
def model_of(shape: str, seed: int) -> HybridModel:
    torch.set_num_threads(1)
    model = HybridModel(SHAPES[shape])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def snapshot_of(shape: str, seed: int, version: int) -> PolicySnapshot:
    return PolicySnapshot.create(version, to_numpy_tensors(model_of(shape, seed)))


def random_prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, VOCAB, length).astype(np.int32)


# --- the stepper, without threads ---


class SteppedEngine:
    """A stepper with version 1 of the weights, driven by hand."""

    def __init__(self, shape: str = "dense", *, seed: int = 0, max_running: int = 4, max_sessions: int = 8) -> None:
        settings = EngineConfig(max_running=max_running, max_sessions=max_sessions, max_model_tokens=192)
        self.shape = shape
        self.clock = FakeClock()
        self.stepper = BatchStepper(HybridModel(SHAPES[shape]), settings, clock=self.clock)
        self.loop = asyncio.new_event_loop()
        self.loop.close()  # replies are made on it, but nobody waits
        self.num_requests = 0
        self.swap(1, seed=seed)

    def swap(self, version: int, *, seed: int, cache_policy: str = "recompute") -> None:
        with torch.inference_mode():
            self.stepper.swap(snapshot_of(self.shape, seed, version), cache_policy)  # type: ignore[arg-type]

    def add(self, prompt: Sequence[int] | np.ndarray, *, session_id: str | None = None, **spec: object) -> Ticket:
        self.num_requests += 1
        prompt_ids = np.array(prompt, np.int32)
        request = GenerationRequest(
            request_id=str(self.num_requests),
            prompt_ids=prompt_ids,
            session_id=session_id,
            sampling=SamplingSpec(**spec),  # type: ignore[arg-type]
        )
        ticket = Ticket(
            request=request,
            prompt_ids=prompt_ids,
            reply=self.loop.create_future(),
            arrived_s=self.clock(),
            stream=stream_key(request.sampling.seed or 0),
        )
        self.stepper.add(ticket)
        return ticket

    def steps(self, count: int) -> None:
        with torch.inference_mode():
            for _ in range(count):
                self.stepper.step()

    def finish(self) -> list[Completion | EngineError]:
        """Run until nothing is left; outcomes in the order of the requests."""
        while self.stepper.has_work:
            self.steps(1)
        finished, self.stepper.finished = self.stepper.finished, []
        return [outcome for _, outcome in sorted(finished, key=lambda pair: int(pair[0].request.request_id))]

    def ask(self, prompt: Sequence[int] | np.ndarray, **spec: object) -> Completion:
        self.add(prompt, **spec)  # type: ignore[arg-type]
        (outcome,) = self.finish()
        assert isinstance(outcome, Completion)
        return outcome


def learner_logprobs(shape: str, seed: int, prompt: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate([prompt, token_ids]).astype(np.int64))
    with torch.no_grad():
        logits = model_of(shape, seed)(ids, torch.tensor([0, len(ids)])).logits
    return token_logprobs(logits[len(prompt) - 1 : -1], ids[len(prompt) :], 1.0)[0].numpy()


@both_shapes
def test_a_swap_that_recomputes_gives_new_logprobs_and_one_that_keeps_does_not(shape: str) -> None:
    errors = {}
    for cache_policy in ("recompute", "keep"):
        engine = SteppedEngine(shape)
        prompts = [random_prompt(40 + i, seed=i) for i in range(3)]
        for i, prompt in enumerate(prompts):
            engine.add(prompt, max_tokens=60, seed=i)
        engine.steps(30)
        engine.swap(2, seed=1, cache_policy=cache_policy)
        outcomes = engine.finish()
        errors[cache_policy] = 0.0
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            assert isinstance(outcome, Completion)
            assert outcome.policy_versions.tolist() == [1] * 31 + [2] * 29  # a step of admission samples twice
            for seed, part in ((0, slice(0, 31)), (1, slice(31, 60))):
                expected = learner_logprobs(shape, seed, prompt, outcome.token_ids)
                error = np.abs(outcome.logprobs - expected)[part].max()
                if seed == 0:
                    assert error < 1e-4
                else:
                    errors[cache_policy] = max(errors[cache_policy], error)
    assert errors["recompute"] < 1e-4
    assert errors["keep"] > 1e-2


@pytest.mark.parametrize(("cache_policy", "cached"), [("recompute", 0), ("keep", 24)])
def test_a_swap_decides_over_the_states_of_sessions_and_never_keeps_a_prompts_logits(
    cache_policy: str, cached: int
) -> None:
    engine = SteppedEngine()
    prompt = random_prompt(20)
    first = engine.ask(prompt, session_id="a", max_tokens=5)
    engine.swap(2, seed=1, cache_policy=cache_policy)
    sibling = engine.ask(prompt, max_tokens=5)
    assert sibling.cached_tokens == 0
    np.testing.assert_allclose(sibling.logprobs, learner_logprobs("dense", 1, prompt, sibling.token_ids), atol=1e-4)
    second = engine.ask([*prompt, *first.token_ids, 7, 8], session_id="a", max_tokens=5)
    assert second.cached_tokens == cached


@both_shapes
def test_a_slot_starts_from_zero_state_after_an_abort(shape: str) -> None:
    engine = SteppedEngine(shape, max_running=2, max_sessions=2)
    reference = engine.ask(random_prompt(9, seed=4), max_tokens=20, seed=3)
    tickets = [engine.add(random_prompt(150, seed=i), max_tokens=40) for i in range(2)]
    engine.steps(10)
    for ticket in tickets:
        engine.stepper.abort(ticket.request.request_id)
    aborted = engine.finish()
    assert [len(outcome.token_ids) for outcome in aborted if isinstance(outcome, Completion)] == [11, 11]
    again = engine.ask(random_prompt(9, seed=4), max_tokens=20, seed=3)
    assert again.token_ids.tolist() == reference.token_ids.tolist()
    np.testing.assert_allclose(again.logprobs, reference.logprobs, atol=1e-5)


def test_weights_that_overflow_fail_their_requests_and_leave_no_trace() -> None:
    engine = SteppedEngine()
    reference = engine.ask(random_prompt(70), max_tokens=30, seed=1)
    tensors = to_numpy_tensors(model_of("dense", 0))
    with torch.inference_mode():
        engine.add(random_prompt(60), max_tokens=100)
        engine.steps(5)
        engine.stepper.swap(PolicySnapshot.create(2, {n: a * np.float32(1e30) for n, a in tensors.items()}), "keep")
    engine.add(random_prompt(100), max_tokens=5, session_id="a")
    outcomes = engine.finish()
    for outcome in outcomes:
        assert isinstance(outcome, EngineError)
        assert "policy version 2 are not finite" in str(outcome)
    assert engine.stepper.stats().sessions == 0
    engine.swap(3, seed=0)
    again = engine.ask(random_prompt(70), max_tokens=30, seed=1)
    assert again.token_ids.tolist() == reference.token_ids.tolist()
    np.testing.assert_allclose(again.logprobs, reference.logprobs, atol=1e-5)


def test_fifty_updates_leave_what_a_fresh_engine_says() -> None:
    engine = SteppedEngine()
    for version in range(2, 52):
        engine.add(random_prompt(10), max_tokens=12, session_id="a")
        engine.steps(1)
        engine.swap(version, seed=version % 3, cache_policy="keep" if version % 2 else "recompute")
    engine.finish()
    engine.swap(52, seed=5)
    fresh = SteppedEngine(seed=5)
    prompt = random_prompt(33)
    one, other = (e.ask(prompt, max_tokens=60, temperature=0.0) for e in (engine, fresh))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-6)


def test_sessions_that_find_no_room_prefill_again_and_say_the_same() -> None:
    def play(max_sessions: int) -> tuple[list[list[int]], int]:
        engine = SteppedEngine(max_sessions=max_sessions)
        prompts = [random_prompt(20, seed=i) for i in range(7)]
        said: list[list[int]] = []
        for turn in range(3):
            for i, prompt in enumerate(prompts):
                engine.add(prompt, session_id=f"s{i}", max_tokens=8, seed=10 * turn + i)
            outcomes = engine.finish()
            for i, outcome in enumerate(outcomes):
                assert isinstance(outcome, Completion)
                said.append(outcome.token_ids.tolist())
                prompts[i] = np.concatenate([prompts[i], outcome.token_ids, [turn, i]])
        return said, engine.stepper.stats().cached_tokens

    roomy, roomy_cached = play(20)
    tight, tight_cached = play(4)
    assert roomy == tight
    assert roomy_cached == sum(7 * n for n in (20 + 7, 20 + 8 + 2 + 7))
    assert tight_cached < roomy_cached


def test_long_prompts_that_wait_do_not_starve_a_running_request() -> None:
    engine = SteppedEngine(max_running=64, max_sessions=64)
    engine.add([1], max_tokens=100)
    engine.steps(1)
    for i in range(30):
        engine.add(random_prompt(180, seed=i), max_tokens=1)
    before = engine.stepper.stats()
    engine.steps(1)
    after = engine.stepper.stats()
    num_admitted = PREFILL_TOKENS // 180
    assert after.prefilled_tokens - before.prefilled_tokens == num_admitted * 180
    assert after.sampled_tokens - before.sampled_tokens == num_admitted + 1
    assert after.waiting == 30 - num_admitted


def test_a_sibling_that_comes_later_forks_the_same_prefill() -> None:
    engine = SteppedEngine("moe")
    prompt = random_prompt(30)
    first = engine.ask(prompt, max_tokens=10, seed=1)
    later = engine.ask(prompt, max_tokens=10, seed=1)
    assert (first.cached_tokens, later.cached_tokens) == (0, 30)
    assert later.token_ids.tolist() == first.token_ids.tolist()
    assert first.routed_experts is not None
    assert later.routed_experts is not None
    np.testing.assert_array_equal(first.routed_experts, later.routed_experts)


def test_routes_are_those_each_token_takes_as_an_input_in_the_learners_forward() -> None:
    engine = SteppedEngine("moe")
    prompt = random_prompt(30)
    completion = engine.ask(prompt, max_tokens=12)
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))
    with torch.no_grad():
        routes = model_of("moe", 0)(ids, torch.tensor([0, len(ids)])).routed_experts
    assert routes is not None
    assert completion.routed_experts is not None
    expected = routes[len(prompt) : -1].sort(-1).values.numpy()
    np.testing.assert_array_equal(np.sort(completion.routed_experts[:-1], -1), expected)
    assert (completion.routed_experts[-1] == -1).all()  # not fed yet


def test_a_session_closed_under_a_running_request_is_not_kept() -> None:
    engine = SteppedEngine()
    engine.add(random_prompt(5), session_id="a", max_tokens=10)
    engine.steps(2)
    engine.stepper.close_session("a")
    engine.finish()
    assert engine.stepper.stats().sessions == 0


def test_waiting_requests_end_at_their_deadline_too() -> None:
    engine = SteppedEngine(max_running=1)
    engine.add([1], max_tokens=150)
    engine.add([2], max_tokens=150)
    engine.steps(3)
    engine.clock.advance(61)
    outcomes = engine.finish()
    assert [(o.finish_reason, len(o.token_ids)) for o in outcomes if isinstance(o, Completion)] == [
        ("deadline", 4),
        ("deadline", 0),
    ]


# --- the step thread ---


class BrittleModel(HybridModel):
    """Fails at one decode step."""

    def __init__(self, shape: str, *, steps_left: int) -> None:
        super().__init__(SHAPES[shape])
        self.steps_left = steps_left

    def decode(self, token_ids, cache):  # type: ignore[no-untyped-def]
        self.steps_left -= 1
        if self.steps_left == 0:
            raise MemoryError("no room for the keys")
        return super().decode(token_ids, cache)


def test_an_engine_whose_step_fails_tells_everyone_why() -> None:
    async def check() -> None:
        engine = LocalEngine(BrittleModel("dense", steps_left=6), EngineConfig(max_running=2, max_model_tokens=64))
        await engine.load_weights(snapshot_of("dense", 0, 1))

        def generate(i: int) -> asyncio.Task[Completion]:
            sampling = SamplingSpec(max_tokens=40)
            prompt_ids = np.array([i], np.int32)
            return asyncio.create_task(
                engine.generate(GenerationRequest(request_id=str(i), prompt_ids=prompt_ids, sampling=sampling))
            )

        busy = await asyncio.gather(*map(generate, range(5)), return_exceptions=True)
        later = await asyncio.gather(
            generate(9), engine.load_weights(snapshot_of("dense", 0, 2)), return_exceptions=True
        )
        for outcome in [*busy, *later]:
            assert isinstance(outcome, EngineClosed)
            assert "no room for the keys" in str(outcome)
            assert isinstance(outcome.__cause__, MemoryError)
        await engine.close()

    asyncio.run(asyncio.wait_for(check(), 30))


class FickleTensors(dict[str, np.ndarray]):
    """Gives each tensor as it is once, and afterwards full of NaN."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        super().__init__(tensors)
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        array = super().__getitem__(name)
        if name not in self.seen:
            self.seen.add(name)
            return array
        return np.full_like(array, np.nan)


def test_an_offer_of_weights_to_be_pulled_is_refused_and_the_engine_serves_on() -> None:
    async def check() -> None:
        engine = LocalEngine(HybridModel(SHAPES["dense"]), EngineConfig(max_running=2, max_model_tokens=64))
        await engine.load_weights(snapshot_of("dense", 0, 1))
        manifest = snapshot_of("dense", 1, 2).manifest
        offer = OfferedSnapshot(version=2, manifest=manifest, host="127.0.0.1", port=1, token="", deadline_s=1)
        with pytest.raises(WeightSyncError, match="version 2 is an offer"):
            await engine.load_weights(offer)
        assert engine.policy_version == 1 and not engine.died
        await engine.close()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_weights_that_change_after_they_were_verified_are_refused_and_the_old_ones_go_on() -> None:
    async def check() -> None:
        engine = LocalEngine(HybridModel(SHAPES["dense"]), EngineConfig(max_running=2, max_model_tokens=64))
        await engine.load_weights(snapshot_of("dense", 0, 1))
        good = snapshot_of("dense", 1, 2)
        fickle = PolicySnapshot(version=2, manifest=good.manifest, tensors=FickleTensors(dict(good.tensors)))
        with pytest.raises(WeightSyncError, match="not finite"):
            await engine.load_weights(fickle)
        request = GenerationRequest(request_id="0", prompt_ids=random_prompt(5), sampling=SamplingSpec(max_tokens=4))
        completion = await engine.generate(request)
        assert completion.policy_versions.tolist() == [1, 1, 1, 1]
        expected = learner_logprobs("dense", 0, request.prompt_ids, completion.token_ids)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        await engine.close()

    asyncio.run(asyncio.wait_for(check(), 30))
