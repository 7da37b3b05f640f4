"""One episode: a policy and an environment take turns until one of them, or a limit, ends it.

    reset -> prompt ids -> [ sample -> parse -> environment step -> reply ids ]* -> reward

Every way out gives a `Trajectory` with exactly one stop reason. Limits end the episode through `host.finish`, so that
what stands is scored; failures leave the reward None and are kept as data. Only cancellation is raised.
"""

import asyncio
import hashlib
import logging
import math
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

from envs.message import Message
from envs.outcome import EnvFailure, EnvHost, ResetOutcome, StepOutcome
from envs.task import Task
from policy.engine.protocol import Completion, Engine, GenerationRequest, SamplingSpec
from rollout.dialects.dialect import Renderer
from rollout.play.swap_lock import RolloutLock
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory, Turn

T = TypeVar("T")
log = logging.getLogger(__name__)

ENGINE_GRACE_S = 30.0
"""How far an engine may overrun a request's deadline before it counts as hung."""
CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSettings:
    """How the episodes of a run are sampled and bounded."""

    temperature: float
    max_turn_tokens: int
    """Most tokens of one turn."""
    max_turns: int
    """Most turns; 0 = the environment's own limit. The smaller of both holds."""
    max_model_tokens: int
    """Most tokens of the whole conversation."""
    deadline_s: float
    """Past it an episode ends and is scored as it stands."""
    score_timeout_s: float = 120.0
    """Longest wait for the score of an episode that a limit ended; must exceed the host's own reward deadline."""
    seed: int
    """Of the run."""
    salt: str = ""
    """Tells apart uses of one run that may meet the same group id, such as evaluations."""

    def sampling_seed(self, group_id: str, member: int, turn: int) -> int:
        """The same for every attempt of a turn, and in every process: a retried episode samples the same tokens."""
        name = f"{self.seed}/{self.salt}/{group_id}/{member}/{turn}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


async def run_episode(
    *,
    task: Task,
    member: int,
    group_id: str,
    host: EnvHost,
    engine: Engine,
    renderer: Renderer,
    settings: EpisodeSettings,
    lock: RolloutLock,
    attempt: int = 0,
    retry: int = 0,
    worker: str = "",
    failpoint: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.monotonic,
) -> Trajectory:
    """Play one episode of `task` to its end.

    `attempt` is the lease's, `retry` counts the tries inside it; together they name the episode's environment and
    engine session, so that a late answer to an earlier try can never reach this one. `failpoint` is called with
    "reset", "sample" and "tool" on entering them. `clock` gives seconds.
    """
    episode = _Episode(
        task=task,
        trajectory_id=f"{group_id}/{member}",
        key=f"{group_id}/{member}@{attempt}.{retry}",
        host=host,
        engine=engine,
        renderer=renderer,
        settings=settings,
        lock=lock,
        failpoint=failpoint,
        clock=clock,
        seeds=lambda turn: settings.sampling_seed(group_id, member, turn),
    )
    try:
        async with lock.trajectory():
            await episode.play()
    except Exception as error:  # episode capture: whatever failed becomes data of this one trajectory
        episode.fail(error)
    finally:
        await episode.close()
    return episode.trajectory(group_id=group_id, member=member, attempt=attempt, worker=worker)


class _DeadlinePassed(Exception):
    """The episode's deadline passed: what stands is to be scored."""


class _Overdue(TimeoutError):
    """Somebody did not answer in time."""


class _EnvFailed(Exception):
    """An environment or its host reported a failure."""

    def __init__(self, failure: EnvFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(kw_only=True, slots=True)
class _Episode:
    """The state of one running episode; `where` names the phase for failure reports."""

    task: Task
    trajectory_id: str
    key: str
    host: EnvHost
    engine: Engine
    renderer: Renderer
    settings: EpisodeSettings
    lock: RolloutLock
    failpoint: Callable[[str], None]
    clock: Callable[[], float]
    seeds: Callable[[int], int]
    """Turn number -> sampling seed."""

    record: TokenRecord = field(default_factory=TokenRecord)
    turns: list[Turn] = field(default_factory=list)
    prompt: tuple[Message, ...] = ()
    problem_digest: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    started: float = field(init=False)
    env_seconds: float = 0.0
    where: str = "reset"
    stop: StopReason | None = None
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    error: EpisodeError | None = None

    def __post_init__(self) -> None:
        self.started = self.clock()

    async def play(self) -> None:
        reset = await self._reset()
        try:
            await self._take_turns(reset)
        except _DeadlinePassed:
            await self._finish(StopReason.DEADLINE)

    async def _take_turns(self, reset: ResetOutcome) -> None:
        max_turns = min(self.settings.max_turns or reset.max_turns, reset.max_turns)
        given = self.renderer.prompt(reset.messages, reset.tools)
        for turn in count(1):
            if len(self.record) + len(given) >= self.settings.max_model_tokens:
                return await self._finish(StopReason.TRUNCATED_TOKENS)
            self.record.append_given(given)
            completion = await self._sample(turn, reset)
            if completion.finish_reason == "abort":
                self.stop = StopReason.CANCELLED
                return None
            if completion.finish_reason == "deadline":
                return await self._finish(StopReason.DEADLINE)
            if completion.finish_reason == "length":
                return await self._finish(StopReason.TRUNCATED_TOKENS)
            step = await self._act()
            if step.terminated or step.truncated:
                return self._score(step, StopReason.TERMINATED if step.terminated else StopReason.TRUNCATED_TURNS)
            if turn >= max_turns:
                return await self._finish(StopReason.TRUNCATED_TURNS)
            self.where = "render"
            given = self.renderer.reply(step.messages, reset.tools)
        return None

    async def _reset(self) -> ResetOutcome:
        self.failpoint("reset")
        reset = await self._from_host("reset", self.host.open(self.key, self.task), self._left_s())
        self.meta = dict(reset.meta)
        if reset.failure is not None:
            raise _EnvFailed(reset.failure)
        self.prompt, self.problem_digest = reset.messages, reset.problem_digest
        self.where = "render"
        return reset

    async def _sample(self, turn: int, reset: ResetOutcome) -> Completion:
        self.where = "sample"
        prompt_ids = self.record.token_ids
        async with self.lock.turn():
            if (left_s := self._left_s()) <= 0:
                raise _DeadlinePassed
            self.failpoint("sample")
            can = self.engine.capabilities
            request = GenerationRequest(
                request_id=f"{self.key}/{turn}",
                prompt_ids=prompt_ids,
                sampling=SamplingSpec(
                    temperature=self.settings.temperature,
                    max_tokens=min(self.settings.max_turn_tokens, self.settings.max_model_tokens - len(prompt_ids)),
                    stop_token_ids=self.renderer.stop_token_ids,
                    banned_token_ids=self.renderer.banned_token_ids,
                    seed=self.seeds(turn) if can.per_request_seed else None,
                ),
                session_id=self.key if can.sessions else None,
                deadline_s=left_s,
            )
            asked = self.clock()
            completion = await _within(left_s + ENGINE_GRACE_S, "engine", self.engine.generate(request))
            sample_s = self.clock() - asked
        self.record.append_sampled(completion)
        parsed = self.renderer.parse(completion.token_ids.tolist(), reset.tools)
        self.turns.append(
            Turn(
                start=len(prompt_ids),
                end=len(self.record),
                message=parsed.message,
                finish_reason=completion.finish_reason,
                parse_status=parsed.status,
                sample_s=sample_s,
            )
        )
        return completion

    async def _act(self) -> StepOutcome:
        """Hand the last turn's message to the environment."""
        self.where = "step"
        self.failpoint("tool")
        before = self.env_seconds
        try:
            step = await self._from_host("step", self.host.step(self.key, self.turns[-1].message), self._left_s())
        except _Overdue:
            raise _DeadlinePassed from None
        self._take(step)
        self.turns[-1] = replace(self.turns[-1], reply=step.messages, env_s=self.env_seconds - before)
        return step

    async def _finish(self, stop: StopReason) -> None:
        """A limit was reached: have the episode scored as it stands."""
        self.where = "reward"
        step = await self._from_host("score", self.host.finish(self.key), self.settings.score_timeout_s)
        self._take(step)
        self._score(step, stop)

    async def _from_host(self, what: str, call: Coroutine[Any, Any, T], seconds: float) -> T:
        asked = self.clock()
        try:
            return await _within(seconds, what, call)
        finally:
            self.env_seconds += self.clock() - asked

    def _take(self, step: StepOutcome) -> None:
        self.meta |= step.meta
        if step.failure is not None:
            raise _EnvFailed(step.failure)

    def _score(self, step: StepOutcome, stop: StopReason) -> None:
        if step.reward is None or not math.isfinite(step.reward):
            message = f"the episode ended with reward {step.reward!r}; it must be a finite number"
            raise _EnvFailed(EnvFailure(kind="env", where="reward", message=message))
        self.stop, self.reward, self.reward_parts = stop, float(step.reward), dict(step.reward_parts)

    def _left_s(self) -> float:
        return self.settings.deadline_s - (self.clock() - self.started)

    def fail(self, error: Exception) -> None:
        """Keep what failed. An environment's own failure, or what it sent cannot be rendered, is not worth a retry."""
        if isinstance(error, _EnvFailed):
            failure = error.failure
            self.error = EpisodeError(
                kind=failure.kind,
                where="reset" if failure.where == "construct" else failure.where,
                message=failure.message,
                traceback=failure.traceback,
            )
            self.stop = StopReason.ENV_ERROR if failure.kind == "env" else StopReason.INFRA_ERROR
        else:
            self.error = EpisodeError(
                kind="policy" if self.where == "render" else "infra",
                where=self.where,
                message=f"{type(error).__name__}: {error}",
                traceback="".join(traceback.format_exception(error)),
            )
            self.stop = StopReason.ENV_ERROR if self.where == "render" else StopReason.INFRA_ERROR

    async def close(self) -> None:
        """Free the environment and the engine's session. A failure here cannot change what was recorded."""
        for name, call in (("environment", self.host.close), ("session", self.engine.close_session)):
            try:
                await _within(CLOSE_TIMEOUT_S, name, call(self.key))
            except Exception:  # episode capture: the record is complete, closing must not undo it
                log.warning("could not close the %s of episode %s", name, self.key, exc_info=True)

    def trajectory(self, *, group_id: str, member: int, attempt: int, worker: str) -> Trajectory:
        assert self.stop is not None, "an episode ended without a stop reason"
        return Trajectory(
            trajectory_id=self.trajectory_id,
            group_id=group_id,
            task=self.task,
            member=member,
            token_ids=self.record.token_ids,
            loss_mask=self.record.loss_mask,
            rollout_logprobs=self.record.logprobs,
            policy_versions=self.record.policy_versions,
            routed_experts=self.record.routed_experts,
            turns=tuple(self.turns),
            prompt=self.prompt,
            reward=self.reward,
            reward_parts=self.reward_parts,
            stop_reason=self.stop,
            error=self.error,
            temperature=self.settings.temperature,
            meta=self.meta,
            problem_digest=self.problem_digest,
            attempt=attempt,
            worker=worker,
            engine=self.engine.capabilities.name,
            seconds=self.clock() - self.started,
            env_seconds=self.env_seconds,
        )


async def _within(seconds: float, what: str, call: Coroutine[Any, Any, T]) -> T:
    """Await `call` for at most `seconds`. Raises `_Overdue` then, whatever `call` raises, and CancelledError only
    where this task itself is cancelled."""
    guard = asyncio.timeout(max(seconds, 0.0))
    try:
        async with guard:
            return await call
    except TimeoutError:
        if guard.expired():
            raise _Overdue(f"{what}: no answer within {seconds:g} s") from None
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError(f"{what}: was cancelled from inside") from None  # a future that died with its engine
