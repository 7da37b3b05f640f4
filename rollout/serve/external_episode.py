"""An episode that an agent outside plays: Shoal offers a session, samples what it asks for and waits for its end.

    reset the task -> offer the session -> [ the agent asks for turns ]* -> reward or answer -> trajectories

Deadlines, locks, retries and failures are those of `rollout.play.episode`. The agent runs its tools itself. Its answer
is scored by the task's environment; a reward it brings is taken as it is. An agent that aborts, or is lost, leaves the
reward None.
"""

import asyncio
import math
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from envs.message import Message
from envs.outcome import EnvFailure, EnvHost, StepOutcome
from envs.task import Task
from policy.engine.protocol import Engine
from rollout.dialects.dialect import Renderer
from rollout.play.episode import EpisodeSettings
from rollout.play.swap_lock import RolloutLock
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.serving_session import Row, ServedSession, SessionEnd
from rollout.serve.serving_wire import ApiError

CLOSE_TIMEOUT_S = 10.0
STOPS = {
    "reward": StopReason.TERMINATED,
    "answer": StopReason.TERMINATED,
    "deadline": StopReason.DEADLINE,
    "abort": StopReason.ENV_ERROR,
    "lost": StopReason.INFRA_ERROR,
}


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What became of a session."""

    stop: StopReason
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    error: EpisodeError | None = None


class _EnvFailed(Exception):
    def __init__(self, failure: EnvFailure) -> None:
        super().__init__(failure.message)
        self.failure = failure


async def run_external_episode(
    *,
    desk: AgentDesk,
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
    """`run_episode` with an agent of `desk` in the lead. Of a session with rewritten histories the last row is the
    trajectory; `meta["untrained_rows"]` counts the others, whose tokens are left out."""
    rows = await play_session(
        desk=desk,
        task=task,
        session_id=f"{group_id}/{member}@{attempt}.{retry}",
        group_id=group_id,
        member=member,
        host=host,
        engine=engine,
        renderer=renderer,
        settings=settings,
        lock=lock,
        attempt=attempt,
        worker=worker,
        fixed_temperature=True,
        seeds=lambda turn: settings.sampling_seed(group_id, member, turn),
        failpoint=failpoint,
        clock=clock,
    )
    return rows[-1]


async def play_session(
    *,
    desk: AgentDesk,
    task: Task,
    session_id: str,
    group_id: str,
    member: int,
    host: EnvHost | None,
    engine: Engine,
    renderer: Renderer,
    settings: EpisodeSettings,
    lock: RolloutLock,
    attempt: int = 0,
    worker: str = "",
    fixed_temperature: bool,
    seeds: Callable[[int], int],
    failpoint: Callable[[str], None] = lambda phase: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Trajectory]:
    """Play one session to its end: a trajectory for each token row, at least one. `host` None: no environment."""
    failpoint("reset")
    session = ServedSession(
        session_id.replace("/", "."),  # it stands in addresses
        engine=engine,
        renderer=renderer,
        settings=settings,
        lock=lock,
        fixed_temperature=fixed_temperature,
        seeds=seeds,
        clock=clock,
    )
    digest, meta = "", {}
    try:
        async with lock.trajectory():
            if host is not None:
                digest, meta = await _open(session, host, session_id, task)
            desk.offer(session)
            verdict = await _judge(await _end_of(session), session, host, session_id, settings, meta)
    except Exception as error:  # episode capture: whatever failed becomes data of this one session
        verdict = _failure(error)
    finally:
        desk.forget(session)
        await _close(session, host, session_id, engine)
    rows = session.rows or [Row(tools="", temperature=settings.temperature, prompt=session.env_messages)]
    return [
        _trajectory(
            row,
            verdict,
            session,
            trajectory_id=f"{group_id}/{member}" + (f"-{n}" if n < len(rows) - 1 else ""),
            group_id=group_id,
            member=member,
            task=task,
            attempt=attempt,
            worker=worker,
            problem_digest=digest,
            meta=meta | {"untrained_rows": len(rows) - 1},
        )
        for n, row in enumerate(rows)
    ]


async def _open(session: ServedSession, host: EnvHost, key: str, task: Task) -> tuple[str, dict[str, Any]]:
    """Reset the task's environment; (problem digest, meta)."""
    reset = await asyncio.wait_for(host.open(key, task), session.left_s)
    if reset.failure is not None:
        raise _EnvFailed(reset.failure)
    session.env_messages, session.env_tools = reset.messages, reset.tools
    session.facts = {
        "task_id": task.task_id,
        "env_id": task.env_id,
        "env_name": task.env_name,
        "seed": task.seed,
        "level": task.level,
    }
    return reset.problem_digest, dict(reset.meta)


async def _end_of(session: ServedSession) -> SessionEnd:
    """Its end, at its deadline at the latest."""
    await asyncio.wait([session.ended], timeout=max(0.0, session.left_s))
    if not session.ended.done():
        taken = bool(session.holder)
        session.finish(
            SessionEnd(kind="deadline")
            if taken
            else SessionEnd(kind="lost", text="no agent took the session before its deadline")
        )
    return session.ended.result()


async def _judge(
    end: SessionEnd,
    session: ServedSession,
    host: EnvHost | None,
    key: str,
    settings: EpisodeSettings,
    meta: dict[str, Any],
) -> Verdict:
    stop = STOPS[end.kind]
    if end.kind in ("abort", "lost"):
        kind = "env" if end.kind == "abort" else "infra"
        return Verdict(stop=stop, error=EpisodeError(kind=kind, where="step", message=f"agent: {end.text}"))
    if end.kind == "reward":
        return Verdict(stop=_cut(session, stop), reward=end.reward, parts=end.parts or {"reward": end.reward or 0.0})
    if host is None:
        text = "the session ended without a reward" if end.kind == "deadline" else "there is no environment to score it"
        return Verdict(stop=StopReason.ENV_ERROR, error=EpisodeError(kind="env", where="reward", message=text))
    step = StepOutcome()
    if end.kind == "answer":
        step = await asyncio.wait_for(host.step(key, Message.assistant(end.text)), settings.score_timeout_s)
    if step.failure is None and step.reward is None:
        step = await asyncio.wait_for(host.finish(key), settings.score_timeout_s)
    if step.failure is not None:
        raise _EnvFailed(step.failure)
    if step.reward is None or not math.isfinite(step.reward):
        message = f"the episode ended with reward {step.reward!r}; it must be a finite number"
        raise _EnvFailed(EnvFailure(kind="env", where="reward", message=message))
    meta |= step.meta
    return Verdict(stop=_cut(session, stop), reward=float(step.reward), parts=dict(step.reward_parts))


def _cut(session: ServedSession, stop: StopReason) -> StopReason:
    """An end by the agent after a turn that hit its token limit is a truncation."""
    cut = session.rows and session.rows[-1].turns[-1].finish_reason == "length"
    return StopReason.TRUNCATED_TOKENS if cut and stop == StopReason.TERMINATED else stop


def _failure(error: Exception) -> Verdict:
    if isinstance(error, _EnvFailed):
        f = error.failure
        where = "reset" if f.where == "construct" else f.where
        kept = EpisodeError(kind=f.kind, where=where, message=f.message, traceback=f.traceback)
        return Verdict(stop=StopReason.ENV_ERROR if f.kind == "env" else StopReason.INFRA_ERROR, error=kept)
    text = "".join(traceback.format_exception(error))
    kept = EpisodeError(kind="infra", where="step", message=f"{type(error).__name__}: {error}", traceback=text)
    return Verdict(stop=StopReason.INFRA_ERROR, error=kept)


async def _close(session: ServedSession, host: EnvHost | None, key: str, engine: Engine) -> None:
    if not session.ended.done():
        with suppress(ApiError):
            session.finish(SessionEnd(kind="lost", text="the episode failed"))
    calls = [engine.close_session(session.session_id), *([host.close(key)] if host is not None else [])]
    # a failure here cannot change what was recorded
    await asyncio.gather(*(asyncio.wait_for(call, CLOSE_TIMEOUT_S) for call in calls), return_exceptions=True)


def _trajectory(
    row: Row, verdict: Verdict, session: ServedSession, *, meta: dict[str, Any], **names: Any
) -> Trajectory:
    record: TokenRecord = row.record
    calls = sum(len(turn.message.tool_calls) for turn in row.turns)
    return Trajectory(
        token_ids=record.token_ids,
        loss_mask=record.loss_mask,
        rollout_logprobs=record.logprobs,
        policy_versions=record.policy_versions,
        routed_experts=record.routed_experts,
        turns=tuple(row.turns),
        prompt=row.prompt,
        reward=verdict.reward,
        reward_parts=verdict.parts,
        stop_reason=verdict.stop,
        error=verdict.error,
        temperature=row.temperature,
        engine=session.engine_name,
        seconds=session.seconds,
        meta=meta | {"session": session.session_id, "num_tool_calls": calls},
        **names,
    )
