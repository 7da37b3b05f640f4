"""One episode: a policy and an environment take turns until one of them, or a limit, ends it.

    reset -> lead: prompt ids -> [ sample -> parse -> environment step -> reply ids ]* -> reward

Every way out gives a `Trajectory` with exactly one stop reason. Limits end the episode through `host.finish`, so that
what stands is scored; failures leave the reward None and are kept as data. Only cancellation is raised.

Who leads decides which messages come next: `take_turns` lets the environment answer each turn of the policy;
`rollout.serve.external_episode` lets an agent program ask for turns. Sampling, recording, limits, scoring and failures
are those of `Episode` for both.
"""

import asyncio
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

import numpy as np

from envs.message import Message
from envs.outcome import EnvFailure, EnvHost, ResetOutcome, StepOutcome
from policy.engine.protocol import Completion, GenerationRequest, SamplingSpec
from rollout.play.context import EpisodeContext
from rollout.play.token_row import TokenRow
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory

T = TypeVar("T")
log = logging.getLogger(__name__)

ENGINE_GRACE_S = 30.0
"""How far an engine may overrun a request's deadline before it counts as hung."""
CLOSE_TIMEOUT_S = 10.0


class DeadlinePassed(Exception):
    """The episode's deadline passed: what stands is to be scored."""


class Overdue(TimeoutError):
    """Somebody did not answer in time."""


class EpisodeFailed(Exception):
    """An environment, its host or an agent reported a failure."""

    def __init__(self, failure: EnvFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


Lead = Callable[["Episode"], Awaitable[None]]
"""Plays an episode that was reset until it has a stop reason; may raise whatever failed."""


async def run_episode(context: EpisodeContext) -> Trajectory:
    """Play one episode of the context's task to its end, the policy and the environment in turns."""
    (trajectory,) = await play_episode(context, take_turns)
    return trajectory


async def play_episode(context: EpisodeContext, lead: Lead) -> list[Trajectory]:
    """Play one episode as `lead` wants: a trajectory for each token row, at least one."""
    episode = Episode(context)
    try:
        async with context.lock.trajectory():
            await episode.play(lead)
    except Exception as error:  # episode capture: whatever failed becomes data of this one episode
        episode.fail(error)
    finally:
        await episode.close()
    return episode.trajectories()


async def take_turns(episode: "Episode") -> None:
    """The environment answers every turn of the policy, until it ends the episode or a limit does."""
    context, shown = episode.context, episode.shown
    settings, dialect = context.settings, context.dialect
    max_turns = min(settings.max_turns or shown.max_turns, shown.max_turns)
    row = episode.begin_row(TokenRow(temperature=settings.temperature, prompt=shown.messages))
    given = dialect.prompt(shown.messages, shown.tools)
    for turn in count(1):
        if len(row.record) + len(given) >= settings.max_model_tokens:
            return await episode.finish(StopReason.TRUNCATED_TOKENS)
        row.record.append_given(given)
        completion, sample_s = await episode.sample(row, turn)
        parsed = dialect.parse(completion.token_ids.tolist(), shown.tools)
        row.take(completion, parsed.message, parse_status=parsed.status, sample_s=sample_s)
        if completion.finish_reason == "abort":
            episode.stop = StopReason.CANCELLED
            return None
        if completion.finish_reason == "deadline":
            return await episode.finish(StopReason.DEADLINE)
        if completion.finish_reason == "length":
            return await episode.finish(StopReason.TRUNCATED_TOKENS)
        before = episode.env_seconds
        step = await episode.act(parsed.message)
        row.reply(step.messages, env_s=episode.env_seconds - before)
        if step.terminated or step.truncated:
            return episode.score(step, StopReason.TERMINATED if step.terminated else StopReason.TRUNCATED_TURNS)
        if turn >= max_turns:
            return await episode.finish(StopReason.TRUNCATED_TURNS)
        episode.where = "render"
        given = dialect.reply(step.messages, shown.tools)
    return None


@dataclass(slots=True)
class Episode:
    """The state of one running episode, and the only code that samples, scores, fails and closes one."""

    context: EpisodeContext
    """What it was given."""
    rows: list[TokenRow] = field(default_factory=list)
    """The token rows begun so far, oldest first."""
    shown: ResetOutcome = field(default_factory=ResetOutcome)
    """What the environment showed at its reset; empty before, and without an environment."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts from the environment for metrics; later ones replace earlier ones of the same name."""
    started: float = field(init=False)
    """When it began, in seconds of the context's clock. Its deadline counts from here."""
    env_seconds: float = 0.0
    """Seconds spent waiting for the environment so far."""
    where: str = "reset"
    """The phase it is in, for reports of a failure: "reset" | "render" | "sample" | "step" | "reward"."""
    stop: StopReason | None = None
    """Why it ended; None while it runs."""
    reward: float | None = None
    """Sum of the parts; None until it was scored, and for ever where it failed."""
    reward_parts: dict[str, float] = field(default_factory=dict)
    """The reward by cause, as the environment or the agent named them."""
    error: EpisodeError | None = None
    """What failed, where something did."""

    def __post_init__(self) -> None:
        self.started = self.context.clock()

    async def play(self, lead: Lead) -> None:
        await self._reset()
        try:
            await lead(self)
        except DeadlinePassed:
            await self.finish(StopReason.DEADLINE)

    async def _reset(self) -> None:
        self.context.failpoint("reset")
        if self.context.host is not None:
            opened = self.context.host.open(self.context.key, self.context.task)
            reset = await self._from_host("reset", opened, self.left_s())
            self.meta = dict(reset.meta)
            if reset.failure is not None:
                raise EpisodeFailed(reset.failure)
            self.shown = reset
        self.where = "render"

    def begin_row(self, row: TokenRow) -> TokenRow:
        self.rows.append(row)
        return row

    async def sample(
        self,
        row: TokenRow,
        turn: int,
        given: Sequence[int] = (),
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> tuple[Completion, float]:
        """Sample turn number `turn` behind the tokens of `row` and `given`; (completion, seconds it took).

        Nothing is recorded here. `max_tokens` and `seed` are an agent's own wishes. Raises `DeadlinePassed` where the
        episode has no time left, `Overdue` for an engine that hangs, and what the engine raises.
        """
        self.where = "sample"
        context, settings = self.context, self.context.settings
        prompt_ids = np.concatenate([row.record.token_ids, np.array(given, np.int32)])
        most = min(settings.max_turn_tokens, settings.max_model_tokens - len(prompt_ids))
        async with context.lock.turn():
            if (left_s := self.left_s()) <= 0:
                raise DeadlinePassed
            context.failpoint("sample")
            can = context.engine.capabilities
            if can.per_request_seed and seed is None:
                seed = context.sampling_seed(turn)
            request = GenerationRequest(
                request_id=f"{context.key}/{turn}",
                prompt_ids=prompt_ids,
                sampling=SamplingSpec(
                    temperature=row.temperature,
                    max_tokens=most if max_tokens is None else min(most, max_tokens),
                    stop_token_ids=context.dialect.stop_token_ids,
                    banned_token_ids=context.dialect.banned_token_ids,
                    seed=seed,
                ),
                session_id=context.key if can.sessions else None,
                deadline_s=left_s,
            )
            asked = context.clock()
            completion = await _within(left_s + ENGINE_GRACE_S, "engine", context.engine.generate(request))
            return completion, context.clock() - asked

    async def act(self, message: Message, *, timeout_s: float | None = None) -> StepOutcome:
        """Hand a turn's message to the environment, which has until the deadline, or `timeout_s`, to answer."""
        self.where = "step"
        self.context.failpoint("tool")
        seconds = self.left_s() if timeout_s is None else timeout_s
        try:
            step = await self._from_host("step", self._host.step(self.context.key, message), seconds)
        except Overdue:
            raise DeadlinePassed from None
        self._take(step)
        return step

    async def finish(self, stop: StopReason) -> None:
        """A limit was reached: have the episode scored as it stands."""
        self.where = "reward"
        step = await self._from_host(
            "score", self._host.finish(self.context.key), self.context.settings.score_timeout_s
        )
        self._take(step)
        self.score(step, stop)

    @property
    def _host(self) -> EnvHost:
        if self.context.host is None:
            message = "the session ended without a reward, and there is no environment to score it"
            raise EpisodeFailed(EnvFailure(kind="env", where="reward", message=message))
        return self.context.host

    async def _from_host(self, what: str, call: Coroutine[Any, Any, T], seconds: float) -> T:
        asked = self.context.clock()
        try:
            return await _within(seconds, what, call)
        finally:
            self.env_seconds += self.context.clock() - asked

    def _take(self, step: StepOutcome) -> None:
        self.meta |= step.meta
        if step.failure is not None:
            raise EpisodeFailed(step.failure)

    def score(self, step: StepOutcome, stop: StopReason) -> None:
        """End with the reward of `step`."""
        if step.reward is None or not math.isfinite(step.reward):
            message = f"the episode ended with reward {step.reward!r}; it must be a finite number"
            raise EpisodeFailed(EnvFailure(kind="env", where="reward", message=message))
        self.stop, self.reward, self.reward_parts = stop, float(step.reward), dict(step.reward_parts)

    def left_s(self) -> float:
        """Seconds to the deadline; negative behind it."""
        return self.context.settings.deadline_s - self.seconds

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self.context.clock() - self.started

    def fail(self, error: Exception) -> None:
        """Keep what failed. An environment's own failure, or what it sent cannot be rendered, is not worth a retry."""
        if isinstance(error, EpisodeFailed):
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
        key, host = self.context.key, self.context.host
        closes = ({"environment": host.close} if host else {}) | {"session": self.context.engine.close_session}
        for name, close in closes.items():
            try:
                await _within(CLOSE_TIMEOUT_S, name, close(key))
            except Exception:  # episode capture: the record is complete, closing must not undo it
                log.warning("could not close the %s of episode %s", name, key, exc_info=True)

    def trajectories(self) -> list[Trajectory]:
        """One for each row, at least one. The last is named for the member alone, those before it "-0", "-1" ..."""
        rows = self.rows or [TokenRow(temperature=self.context.settings.temperature, prompt=self.shown.messages)]
        return [self._trajectory(row, "" if row is rows[-1] else f"-{n}") for n, row in enumerate(rows)]

    def _trajectory(self, row: TokenRow, suffix: str) -> Trajectory:
        assert self.stop is not None, "an episode ended without a stop reason"
        context, record = self.context, row.record
        return Trajectory(
            trajectory_id=context.trajectory_id + suffix,
            group_id=context.group_id,
            task=context.task,
            member=context.member,
            token_ids=record.token_ids,
            loss_mask=record.loss_mask,
            rollout_logprobs=record.logprobs,
            policy_versions=record.policy_versions,
            routed_experts=record.routed_experts,
            turns=tuple(row.turns),
            prompt=row.prompt,
            reward=self.reward,
            reward_parts=self.reward_parts,
            stop_reason=self.stop,
            error=self.error,
            temperature=row.temperature,
            meta=self.meta,
            problem_digest=self.shown.problem_digest,
            attempt=context.attempt,
            worker=context.worker,
            engine=context.engine.capabilities.name,
            seconds=self.seconds,
            env_seconds=self.env_seconds,
        )


async def _within(seconds: float, what: str, call: Coroutine[Any, Any, T]) -> T:
    """Await `call` for at most `seconds`. Raises `Overdue` then, whatever `call` raises, and CancelledError only
    where this task itself is cancelled."""
    guard = asyncio.timeout(max(seconds, 0.0))
    try:
        async with guard:
            return await call
    except TimeoutError:
        if guard.expired():
            raise Overdue(f"{what}: no answer within {seconds:g} s") from None
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise RuntimeError(f"{what}: was cancelled from inside") from None  # a future that died with its engine
