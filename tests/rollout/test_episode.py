"""The episode loop: the token record, limits, failures, cancellation."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.message import ImagePart, Message
from envs.outcome import EnvFailure
from policy.engine.protocol import Completion, EngineError, GenerationRequest
from policy.sync.snapshot import PolicySnapshot
from rollout.dialects.dialect import Dialect
from rollout.dialects.parsed_turn import ParsedTurn
from rollout.dialects.tiny_dialect import TinyDialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.episode import run_episode
from rollout.play.swap_lock import RolloutLock
from rollout.record.trajectory import StopReason, Trajectory
from tests.fakes import FakeClock, ScriptedEngine
from tests.rollout.fakes_episode import TASK, ScriptedHost, forever, tool_message

TINY = TinyDialect()
SETTINGS = EpisodeSettings(
    temperature=1.0, max_turn_tokens=16, max_turns=0, max_model_tokens=256, deadline_s=10.0, seed=1
)
SPECIAL = TINY.tokenizer.special_id
USER, ASSISTANT, RESULT, CALL, END = map(SPECIAL, ("<user>", "<assistant>", "<result>", "<call>", "<end>"))


class Engine(ScriptedEngine):
    """Says the given completions in turn, and remembers which sessions were closed."""

    def __init__(self, *completions: Sequence[int], fault: Callable[[Completion], Completion] | None = None) -> None:
        left = iter(completions)
        super().__init__(lambda prompt_ids, rng: next(left), vocab_size=512)
        self._fault = fault
        self.closed_sessions: list[str] = []

    async def generate(self, request: GenerationRequest) -> Completion:
        if self.policy_version < 0:
            await self.load_weights(PolicySnapshot.create(3, {}))
        completion = await super().generate(request)
        return self._fault(completion) if self._fault else completion

    async def close_session(self, session_id: str) -> None:
        self.closed_sessions.append(session_id)


def play(host: ScriptedHost, engine: ScriptedEngine, **changes: Any) -> Trajectory:
    arguments: dict[str, Any] = {"dialect": TINY, "settings": SETTINGS, "lock": RolloutLock("turn")}
    arguments |= {"task": TASK, "member": 0, "group_id": "g"} | changes
    return asyncio.run(run_episode(EpisodeContext(host=host, engine=engine, **arguments)))


def test_a_two_turn_episode_is_recorded_token_by_token() -> None:
    host, engine = ScriptedHost(turns=2), Engine([CALL, 97, END], [56, END])
    row = play(host, engine)
    assert row.token_ids.tolist() == [USER, 113, ASSISTANT, CALL, 97, END, RESULT, 114, 49, ASSISTANT, 56, END]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert row.policy_versions.tolist() == [-1, -1, -1, 3, 3, 3, -1, -1, -1, -1, 3, 3]
    assert row.rollout_logprobs.tolist() == [0, 0, 0, -0.5, -0.5, -0.5, 0, 0, 0, 0, -0.5, -0.5]
    assert [(turn.start, turn.end, turn.parse_status) for turn in row.turns] == [(3, 6, "ok"), (10, 12, "none")]
    assert row.turns[0].message.tool_calls[0].name == "a" and row.turns[0].reply == (tool_message("r1"),)
    assert row.turns[1].message.text == "8"
    assert (row.stop_reason, row.reward, row.reward_parts) == (StopReason.TERMINATED, 1.0, {"answer": 1.0})
    assert row.meta == {"level": 0, "num_tool_calls": 2}
    assert (row.trajectory_id, row.prompt, row.problem_digest) == ("g/0", (Message.user("q"),), "d")
    assert row.routed_experts is None and row.error is None


class HostileDialect:
    """A tokenizer that spells "ab" in two ways, drops case, and merges over the seams of messages.

    Ids 0..25 are the letters, 26..51 the same letters again, 52 = "ab", 53 = "ba", 60 = stop. Text is joined before it
    is encoded, so that decoding and encoding a conversation again gives other ids almost always.
    """

    stop_token_ids = (60, 61)
    banned_token_ids: tuple[int, ...] = ()
    vocab_size = 64
    tokenizer: Any = None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            pair = {"ab": 52, "ba": 53}.get(text[:2])
            ids.append((ord(text[0]) - 97) % 26 if pair is None else pair)
            text = text[1 if pair is None else 2 :]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join({52: "ab", 53: "ba"}.get(i, chr(97 + i % 26)) for i in ids if i < 60)

    def prompt(self, messages: Sequence[Message], tools: object) -> list[int]:
        return self.encode("".join(message.text for message in messages))

    reply = prompt

    def completion(self, message: Message, tools: object) -> list[int]:
        return [*self.encode(message.text), 60]

    def parse(self, token_ids: Sequence[int], tools: object) -> ParsedTurn:
        return ParsedTurn.of(self.decode(token_ids), [])


HOSTILE: Dialect = HostileDialect()
LETTERS = st.text("abc", min_size=1, max_size=6)
COMPLETION = st.builds(
    lambda ids, stop: [*ids, stop], st.lists(st.integers(0, 53), max_size=8), st.sampled_from([60, 61])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(COMPLETION, min_size=1, max_size=4), LETTERS, st.integers(3, 40))
def test_with_a_hostile_tokenizer_the_row_is_exactly_what_the_engine_saw_and_said(
    completions: list[list[int]], prompt: str, max_model_tokens: int
) -> None:
    engine = Engine(*completions)
    host = ScriptedHost(turns=len(completions), prompt=(Message.user(prompt),))
    limits = replace(SETTINGS, max_turn_tokens=6, max_model_tokens=max_model_tokens)
    row = play(host, engine, dialect=HOSTILE, settings=limits)

    seen = [request.prompt_ids.tolist() for request in engine.requests]
    assert len(seen) == row.num_turns
    assert len(row.token_ids) <= max_model_tokens
    said = []
    for prompt_ids, turn in zip(seen, row.turns, strict=True):
        assert prompt_ids == row.token_ids[: turn.start].tolist()  # every prompt is a prefix of the row
        assert row.loss_mask[turn.start : turn.end].all()
        said.append(row.token_ids[turn.start : turn.end].tolist())
    assert said == [ids[: len(out)] for ids, out in zip(completions, said, strict=False)]
    rebuilt: list[int] = []
    for prompt_ids, out in zip(seen, said, strict=True):  # prompt, output, the prompt's new part, output ...
        assert prompt_ids[: len(rebuilt)] == rebuilt
        rebuilt = prompt_ids + out
    assert rebuilt == row.token_ids.tolist()
    assert row.loss_mask.sum() == sum(map(len, said)) == np.count_nonzero(row.rollout_logprobs)
    assert ((row.policy_versions == -1) == (row.loss_mask == 0)).all()
    assert row.stop_reason in (StopReason.TERMINATED, StopReason.TRUNCATED_TOKENS) and row.reward == 1.0


def test_the_hostile_tokenizer_is_hostile() -> None:
    row = play(ScriptedHost(turns=2, prompt=(Message.user("a"),)), Engine([1, 60], [26, 60]), dialect=HOSTILE)
    assert HostileDialect().encode(HostileDialect().decode(row.token_ids.tolist())) != row.token_ids.tolist()


def test_a_turn_that_reaches_its_token_limit_ends_the_episode_and_is_scored_as_it_stands() -> None:
    host = ScriptedHost(turns=2, reward=0.25)
    row = play(host, Engine([97] * 99), settings=replace(SETTINGS, max_turn_tokens=5))
    assert (row.stop_reason, row.reward) == (StopReason.TRUNCATED_TOKENS, 0.25)
    assert row.num_sampled_tokens == 5 and row.turns[0].finish_reason == "length"
    assert [phase for phase, _ in host.log] == ["open", "finish", "close"]  # the cut message was not handed over


def test_a_reply_that_leaves_no_room_to_sample_is_not_appended() -> None:
    # prompt 3 + completion 3 + reply 4 = 10 tokens: one more is needed to sample
    for limit, tokens, turns in ((10, 6, 1), (11, 11, 2)):
        row = play(
            ScriptedHost(turns=2),
            Engine([CALL, 97, END], [56, END]),
            settings=replace(SETTINGS, max_model_tokens=limit),
        )
        assert (row.stop_reason, row.reward) == (StopReason.TRUNCATED_TOKENS, 1.0)
        assert (len(row.token_ids), row.num_turns) == (tokens, turns)
        assert row.turns[0].reply == (tool_message("r1"),)


def test_a_prompt_that_leaves_no_room_gives_a_row_that_is_not_trained_on() -> None:
    row = play(ScriptedHost(), Engine(), settings=replace(SETTINGS, max_model_tokens=3))
    assert row.stop_reason == StopReason.TRUNCATED_TOKENS and not row.is_trainable and len(row.token_ids) == 0


@pytest.mark.parametrize(("own", "environment", "turns"), [(2, 8, 2), (0, 3, 3), (5, 1, 1)])
def test_the_smaller_turn_limit_holds(own: int, environment: int, turns: int) -> None:
    host = ScriptedHost(turns=9, max_turns=environment)
    row = play(host, Engine(*[[97, END]] * 9), settings=replace(SETTINGS, max_turns=own))
    assert (row.stop_reason, row.reward, row.num_turns) == (StopReason.TRUNCATED_TURNS, 1.0, turns)
    assert row.token_ids[-1] == END  # nothing is appended that nobody answers


def test_an_environment_that_truncates_itself_is_not_scored_twice() -> None:
    host = ScriptedHost(turns=1, truncated=True)
    assert play(host, Engine([97, END])).stop_reason == StopReason.TRUNCATED_TURNS
    assert [phase for phase, _ in host.log] == ["open", "step", "close"]


def test_past_the_deadline_nothing_more_is_sampled_and_what_stands_is_scored() -> None:
    clock = FakeClock()

    async def slow(phase: str, key: str) -> None:
        clock.advance(11 if phase == "step" else 0)

    row = play(ScriptedHost(turns=3, before=slow), Engine([97, END]), clock=clock)
    assert (row.stop_reason, row.reward, row.num_turns) == (StopReason.DEADLINE, 1.0, 1)
    assert row.seconds == row.env_seconds == 11


def test_an_environment_that_hangs_is_cut_at_the_deadline() -> None:
    async def hang(phase: str, key: str) -> None:
        if phase == "step":
            await forever(phase, key)

    row = play(ScriptedHost(before=hang), Engine([97, END]), settings=replace(SETTINGS, deadline_s=0.05))
    assert (row.stop_reason, row.reward) == (StopReason.DEADLINE, 1.0)
    row = play(ScriptedHost(before=forever), Engine(), settings=replace(SETTINGS, deadline_s=0.05))
    assert row.stop_reason == StopReason.INFRA_ERROR and row.error is not None and row.error.where == "reset"
    assert "reset: no answer within 0.0" in row.error.message


@pytest.mark.parametrize(
    ("finish_reason", "stop"), [("deadline", StopReason.DEADLINE), ("abort", StopReason.CANCELLED)]
)
def test_an_engine_that_stops_early_ends_the_episode(finish_reason: Any, stop: StopReason) -> None:
    engine = Engine([97, END], fault=lambda completion: replace(completion, finish_reason=finish_reason))
    row = play(ScriptedHost(), engine)
    assert row.stop_reason == stop and row.num_sampled_tokens == 2
    assert row.reward == (None if stop.is_error else 1.0)


def broken(**changes: Any) -> Engine:
    return Engine([97, END], fault=lambda completion: replace(completion, **changes))


def failing_engine(completion: Completion) -> Completion:
    raise EngineError("the engine died")


def cancelled_engine(completion: Completion) -> Completion:
    raise asyncio.CancelledError


AUTHOR = EnvFailure(kind="env", where="step", message="boom", traceback="author's traceback")
FAILURES = {
    "the author's step raises": (ScriptedHost(failures={"step": AUTHOR}), Engine([97, END]), "env_error", "step"),
    "it cannot be constructed": (
        ScriptedHost(failures={"open": EnvFailure(kind="env", where="construct", message="x")}),
        Engine(),
        "env_error",
        "reset",
    ),
    "the pool lost it": (
        ScriptedHost(failures={"step": EnvFailure(kind="infra", where="step", message="x")}),
        Engine([97, END]),
        "infra_error",
        "step",
    ),
    "the pool raises": (ScriptedHost(failures={"step": OSError("gone")}), Engine([97, END]), "infra_error", "step"),
    "the pool times out": (
        ScriptedHost(failures={"step": TimeoutError("?")}),
        Engine([97, END]),
        "infra_error",
        "step",
    ),
    "the score fails": (
        ScriptedHost(failures={"finish": EnvFailure(kind="env", where="reward", message="x")}),
        Engine([97] * 99),
        "env_error",
        "reward",
    ),
    "no reward": (ScriptedHost(reward=None), Engine([97, END]), "env_error", "reward"),
    "a reward that is NaN": (ScriptedHost(reward=float("nan")), Engine([97, END]), "env_error", "reward"),
    "the engine fails": (ScriptedHost(), Engine([97, END], fault=failing_engine), "infra_error", "sample"),
    "the engine's future is cancelled": (
        ScriptedHost(),
        Engine([97, END], fault=cancelled_engine),
        "infra_error",
        "sample",
    ),
    "a logprob is NaN": (
        ScriptedHost(),
        broken(logprobs=np.array([-1, np.nan], np.float32)),
        "infra_error",
        "sample",
    ),
    "a logprob is missing": (ScriptedHost(), broken(logprobs=np.zeros(1, np.float32)), "infra_error", "sample"),
    "the message cannot be rendered": (
        ScriptedHost(prompt=[Message(role="user", content=(ImagePart(data=b""),))]),
        Engine(),
        "env_error",
        "render",
    ),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failure_gives_one_stop_reason_no_reward_and_its_cause(what: str) -> None:
    host, engine, stop, where = FAILURES[what]
    row = play(host, engine)
    assert row.stop_reason == stop and row.stop_reason.is_error
    assert row.reward is None and row.reward_parts == {} and not row.is_trainable
    assert row.error is not None and row.error.where == where
    assert [phase for phase, _ in host.log].count("close") == 1
    assert engine.closed_sessions == ["g/0@0.0"]


def test_the_author_s_traceback_and_what_was_sampled_are_kept() -> None:
    row = play(ScriptedHost(failures={"step": AUTHOR}), Engine([97, END]))
    assert row.error is not None
    assert (row.error.kind, row.error.message, row.error.traceback) == ("env", "boom", "author's traceback")
    assert row.num_sampled_tokens == 2


def test_a_malformed_call_is_handed_to_the_environment_as_data() -> None:
    host = ScriptedHost(turns=2)
    row = play(host, Engine([CALL, END], [56, END]))
    assert row.turns[0].parse_status == "malformed" and row.stop_reason == StopReason.TERMINATED
    assert host.seen["g/0@0.0"][0].tool_calls[0].error == "call without a tool name"


def test_cancellation_closes_everything_and_is_raised() -> None:
    host, engine = ScriptedHost(before=forever), Engine([97, END])

    async def main() -> None:
        task = asyncio.create_task(
            run_episode(
                EpisodeContext(
                    task=TASK,
                    group_id="g",
                    host=host,
                    engine=engine,
                    dialect=TINY,
                    settings=SETTINGS,
                    lock=RolloutLock("turn"),
                )
            )
        )
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert host.log == [("open", "g/0@0.0"), ("close", "g/0@0.0")] and engine.closed_sessions == ["g/0@0.0"]


def test_a_failing_close_does_not_change_the_episode() -> None:
    class Unclosable(ScriptedHost):
        async def close(self, key: str) -> None:
            raise OSError("gone")

    engine = Engine([97, END])
    assert play(Unclosable(), engine).reward == 1.0
    assert engine.closed_sessions == ["g/0@0.0"]


def test_a_swap_between_turns_is_seen_in_the_versions() -> None:
    for mode, versions in (("turn", [3, 3, 4, 4]), ("trajectory", [3, 3, 3, 3])):
        lock, engine = RolloutLock(mode), Engine([97, END], [98, END])
        swaps: list[asyncio.Task[None]] = []

        async def swap(lock: RolloutLock, engine: Engine) -> None:
            async with lock.swap():
                await engine.load_weights(PolicySnapshot.create(4, {}))

        async def before(
            phase: str, key: str, lock: RolloutLock = lock, engine: Engine = engine,
            swaps: list[asyncio.Task[None]] = swaps,
        ) -> None:  # fmt: skip
            if phase == "step" and not swaps:
                swaps.append(asyncio.create_task(swap(lock, engine)))
                for _ in range(5):
                    await asyncio.sleep(0)

        row = play(ScriptedHost(turns=2, before=before), engine, lock=lock)
        assert row.policy_versions[row.loss_mask == 1].tolist() == versions


def test_routes_stand_at_sampled_tokens_only() -> None:
    routes = np.array([[[1, 2]], [[3, 4]]], np.int16)  # (L, M, k) = (2, 1, 2)
    row = play(ScriptedHost(), broken(routed_experts=routes))
    assert row.routed_experts is not None and row.routed_experts.dtype == np.int16
    assert row.routed_experts.tolist() == [[[-1, -1]]] * 3 + [[[1, 2]], [[3, 4]]]


def test_failpoints_are_entered_in_the_order_of_the_loop() -> None:
    phases: list[str] = []
    play(ScriptedHost(turns=2), Engine([97, END], [97, END]), failpoint=phases.append)
    assert phases == ["reset", "sample", "tool", "sample", "tool"]


def test_requests_say_everything_and_seeds_tell_turns_members_and_uses_apart() -> None:
    def requests(**changes: Any) -> list[GenerationRequest]:
        engine = Engine([97, END], [97, END])
        play(ScriptedHost(turns=2), engine, **changes)
        return engine.requests

    first, second = requests()
    assert first.session_id == second.session_id == "g/0@0.0" and first.request_id != second.request_id
    assert first.sampling.stop_token_ids == (END,) and first.sampling.banned_token_ids == TINY.banned_token_ids
    assert (first.sampling.temperature, first.sampling.max_tokens) == (1.0, 16)
    seeds = {r.sampling.seed for r in (first, second, *requests(member=1), *requests(group_id="h"))}
    seeds |= {r.sampling.seed for r in requests(settings=replace(SETTINGS, salt="eval"))}
    assert len(seeds) == 8
    again = requests(attempt=2, retry=1)
    assert [r.sampling.seed for r in again] == [first.sampling.seed, second.sampling.seed]
    assert again[0].session_id == "g/0@2.1"
    assert SETTINGS.sampling_seed("g", 0, 1) == 3628397048823391213  # fixed for ever: replays depend on it
