"""Many environments on one event loop, with a deadline on every call into them.

One key = one episode = one instance. An environment that raises, exits, hangs or returns garbage becomes an outcome
with a failure; nothing it does raises out of the pool. What hangs in a coroutine is cancelled; what hangs in a thread
is abandoned with its thread and counted. Blocking code inside an `async def` (or in an `inline` environment) stops the
whole loop and cannot be cut: nothing in this process can help there, only the caller's own deadline.

Text leaves the pool here and is redacted here: outcomes, and what is logged of failures.

Waits: every operation waits for its own author's code, at most its deadline; `finish` and `close` first cancel a
running operation of the same key.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from envs.base import AgentEnv
from envs.declared import declared_timeouts
from envs.errors import EnvError, InfraFault, author_traceback, described, error_text
from envs.message import Message
from envs.outcome import EnvFailure, ResetOutcome, StepOutcome
from envs.pool.pool_limits import PoolLimits, TurnTaker
from envs.pool.printed import Printed, printing
from envs.redaction import redacted
from envs.registry import construct, find_class
from envs.task import Task
from envs.worker_thread import CANCEL_GRACE_S, WorkerThread, as_exception, boxed, outcome_of

logger = logging.getLogger(__name__)

DIGESTS_AT_ONCE = 64
_CLOSE_TIMEOUT_S = 5.0
_SHOWN_CHARS = 500


@dataclass(slots=True)
class _Episode:
    env_name: str
    env: AgentEnv | None = None
    running: "asyncio.Task[Any] | None" = None
    printed: Printed = field(default_factory=Printed)
    ended: bool = False
    """Finished from outside; a step that still waits for its turn must not reach the environment."""

    def with_printed(self, meta: dict[str, Any]) -> dict[str, Any]:
        """Facts at the end of an episode, with what was printed since the reset."""
        printed = self.printed.text
        return meta | ({"printed": printed} if printed else {})

    def meta_after_failure(self) -> dict[str, Any]:
        """Facts of an environment whose code failed, as far as it can still tell them."""
        try:
            return self.with_printed(self.env.meta() if self.env else {})
        except BaseException as error:  # episode capture: an author may have overridden meta()
            as_exception(error)
            return self.with_printed({})


class _Failed(Exception):
    """An author's code failed; carries what the outcome says."""

    def __init__(self, failure: EnvFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class EnvPool:
    """The in-process `EnvHost`.

    Example: pool = EnvPool(); await pool.open("a", task); await pool.step("a", message); await pool.close("a")
    """

    def __init__(
        self,
        *,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
        limits: PoolLimits | None = None,
    ) -> None:
        """Deadlines as in conf.schema.EnvConfig; an environment's own shorter ones win."""
        self._turns = TurnTaker(limits or PoolLimits())
        self._reset_timeout_s = reset_timeout_s
        self._step_timeout_s = step_timeout_s
        self._reward_timeout_s = reward_timeout_s
        self._episodes: dict[str, _Episode] = {}
        self._classes: dict[str, type[AgentEnv]] = {}
        self._num_failures = 0

    @property
    def stats(self) -> dict[str, int]:
        return {
            "open": len(self._episodes),
            "failures": self._num_failures,
            "abandoned_threads": WorkerThread.num_abandoned,
        }

    async def open(self, key: str, task: Task) -> ResetOutcome:
        await self.close(key)
        episode = self._episodes[key] = _Episode(task.env_name)
        try:
            async with self._turns.turn(task.env_name):
                outcome = await self._open(episode, task)
        except _Failed as failed:
            outcome = ResetOutcome(failure=failed.failure, meta=episode.with_printed({}))
        if self._episodes.get(key) is not episode:  # closed meanwhile, maybe opened again for another caller
            outcome = ResetOutcome(failure=outcome.failure or _no_episode(key, "reset"))
        elif outcome.failure is not None:
            del self._episodes[key]
        if outcome.failure is not None and episode.env is not None:
            await self._close_env(episode.env)
        return redacted(outcome)

    async def step(self, key: str, message: Message) -> StepOutcome:
        return redacted(await self._step(key, message))

    async def finish(self, key: str) -> StepOutcome:
        return redacted(await self._finish(key))

    async def close(self, key: str) -> None:
        episode = self._episodes.pop(key, None)
        if episode is None:
            return
        await _stop_running(episode)
        if episode.env is not None:
            await self._close_env(episode.env)

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(key) for key in list(self._episodes)))

    async def digests(self, tasks: list[Task]) -> list[str]:
        """Problem digests in the order of `tasks`.

        A task whose environment fails gets one of its own: it is dispatched, and its episode records the failure.
        """
        slots = asyncio.Semaphore(DIGESTS_AT_ONCE)

        async def digest(task: Task) -> str:
            episode = _Episode(task.env_name)
            async with slots:
                try:
                    return (await self._open(episode, task)).problem_digest
                except _Failed:
                    identity = repr((task.env_id, task.seed, task.level, sorted(task.kwargs.items())))
                    return hashlib.sha256(identity.encode()).hexdigest()
                finally:
                    if episode.env is not None:
                        await self._close_env(episode.env)

        return list(await asyncio.gather(*map(digest, tasks)))

    # --- parts ---

    async def _step(self, key: str, message: Message) -> StepOutcome:
        started = time.monotonic()
        episode = self._episodes.get(key)
        if episode is None or episode.env is None:
            return StepOutcome(failure=_no_episode(key, "step"))
        env = episode.env
        try:
            async with self._turns.turn(episode.env_name):
                if self._episodes.get(key) is not episode or episode.ended:  # meanwhile, waiting for its turn
                    return StepOutcome(failure=_no_episode(key, "step"))
                limit_s = min(self._step_timeout_s, env.step_timeout_s)
                work = _respond(env, message)
                replies, terminated, truncated, meta = await self._guard(episode, "step", limit_s, work)
            if not (terminated or truncated):
                return StepOutcome(messages=replies, meta=meta, seconds=time.monotonic() - started)
            return await self._scored(episode, env, started, replies, truncated=truncated)
        except _Failed as failed:
            return _failed_step(episode, started, failed)

    async def _finish(self, key: str) -> StepOutcome:
        started = time.monotonic()
        episode = self._episodes.get(key)
        if episode is None or episode.env is None:
            return StepOutcome(failure=_no_episode(key, "step"))
        episode.ended = True
        await _stop_running(episode)
        try:
            return await self._scored(episode, episode.env, started, (), truncated=True)
        except _Failed as failed:
            return _failed_step(episode, started, failed)

    async def _open(self, episode: _Episode, task: Task) -> ResetOutcome:
        making = self._construct(task)
        env = episode.env = await self._guard(episode, "construct", self._reset_timeout_s, making)
        limit_s = min(self._reset_timeout_s, env.reset_timeout_s)
        self._refuse_longer_deadlines(env)
        return await self._guard(episode, "reset", limit_s, _reset(env, task))

    def _refuse_longer_deadlines(self, env: AgentEnv) -> None:
        """A run's own waits are computed from its settings: a class cannot have more time than they give it."""
        for name, seconds in declared_timeouts(env).items():
            limit_s = getattr(self, f"_{name}")
            if seconds > limit_s:
                owner = type(env).__name__
                text = (
                    f"{owner} declares {name} = {seconds:g}, but env.{name} = {limit_s:g}: set env.{name}={seconds:g}"
                )
                raise self._failed("env", "construct", f"{text} or more")

    async def _construct(self, task: Task) -> AgentEnv:
        """Import and construct on a thread, which the environment then keeps; inline ones are made here."""
        owner = self._classes.get(task.env_id)
        if owner is not None and owner.inline:
            return construct(task.env_id, owner, task.kwargs)
        thread = WorkerThread()
        kept = False
        try:
            owner = self._classes[task.env_id] = await thread.run(find_class, task.env_id)
            if owner.inline:
                return construct(task.env_id, owner, task.kwargs)
            env = await thread.run(construct, task.env_id, owner, task.kwargs)
            env.adopt_thread(thread)
            kept = True
            return env
        finally:
            if not kept:
                thread.stop()

    async def _scored(
        self, episode: _Episode, env: AgentEnv, started: float, replies: tuple[Message, ...], *, truncated: bool
    ) -> StepOutcome:
        limit_s = min(self._reward_timeout_s, env.reward_timeout_s)
        reward, parts, meta = await self._guard(episode, "reward", limit_s, _score(env))
        return StepOutcome(
            messages=replies,
            reward=reward,
            reward_parts=parts,
            terminated=not truncated,
            truncated=truncated,
            meta=episode.with_printed(meta),
            seconds=time.monotonic() - started,
        )

    async def _guard(self, episode: _Episode, where: str, limit_s: float, work: Coroutine[Any, Any, Any]) -> Any:
        """Run an author's code for at most `limit_s`; raises _Failed for whatever goes wrong in it."""
        task = episode.running = asyncio.ensure_future(_captured(work, episode.printed))
        try:
            await asyncio.wait({task}, timeout=limit_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            episode.running = None
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
            late = episode.env.late_call if episode.env is not None else ""
            raise self._failed("env", where, f"timed out after {limit_s:g} s" + (f": {late}() still runs" * bool(late)))
        if task.cancelled():
            raise self._failed("infra", where, "ended from outside")
        value, error = outcome_of(task)
        if error is None:
            return value
        # Our own verdicts on an author's class or reward say everything; a traceback would only show our frames.
        trace = "" if isinstance(error, EnvError) and error.__cause__ is None else author_traceback(error)
        text = redacted((isinstance(error, EnvError) and error_text(error)) or described(error))
        kind = "infra" if isinstance(error, InfraFault) else "env"
        raise self._failed(kind, where, text[:_SHOWN_CHARS], trace)

    def _failed(self, kind: str, where: str, message: str, trace: str = "") -> _Failed:
        self._num_failures += 1
        logger.info("environment failed (%s, %s): %s\n%s", kind, where, message, trace)
        return _Failed(EnvFailure(kind=kind, where=where, message=message, traceback=trace))

    async def _close_env(self, env: AgentEnv) -> None:
        try:
            await self._guard(_Episode("", env), "close", _CLOSE_TIMEOUT_S, env.aclose())
        except _Failed:
            return  # counted and logged; the episode is over, nobody waits for it


async def _captured(work: Coroutine[Any, Any, Any], printed: Printed) -> tuple[Any, Exception | None]:
    """Episode capture: whatever an author's code raises is data from here on, and what it prints is the episode's."""
    printing.set(printed)
    return await boxed(work)


async def _reset(env: AgentEnv, task: Task) -> ResetOutcome:
    opening, info = await env.areset(seed=task.seed, options={"level": task.level})
    return ResetOutcome(messages=opening, **info)


async def _respond(env: AgentEnv, message: Message) -> tuple[tuple[Message, ...], bool, bool, dict[str, Any]]:
    return *await env.respond(message), env.meta()


async def _score(env: AgentEnv) -> tuple[float, dict[str, float], dict[str, Any]]:
    parts = await env.score()
    return sum(parts.values()), parts, env.meta()


async def _stop_running(episode: _Episode) -> None:
    running = episode.running
    if running is not None:
        running.cancel()
        await asyncio.wait({running}, timeout=CANCEL_GRACE_S)


def _failed_step(episode: _Episode, started: float, failed: _Failed) -> StepOutcome:
    seconds = time.monotonic() - started
    return StepOutcome(failure=failed.failure, meta=episode.meta_after_failure(), seconds=seconds)


def _no_episode(key: str, where: str) -> EnvFailure:
    return EnvFailure(kind="infra", where=where, message=f"no open episode {key!r}")
