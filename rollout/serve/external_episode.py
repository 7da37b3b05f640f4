"""An episode that an agent outside leads: Shoal offers a session, samples what it asks for and waits for its end.

    reset the task -> offer the session -> [ the agent asks for turns ]* -> reward or answer -> trajectories

Sampling, recording, deadlines, locks, scoring and failures are those of `rollout.play.episode`. The agent runs its
tools itself. Its answer is scored by the task's environment; a reward it brings is taken as it is. An agent that
aborts, or is lost, leaves the reward None.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace

from envs.message import Message
from envs.outcome import EnvFailure, StepOutcome
from rollout.play.context import EpisodeContext
from rollout.play.episode import DeadlinePassed, Episode, EpisodeFailed, play_episode
from rollout.record.trajectory import StopReason, Trajectory
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.chat_request import ApiError
from rollout.serve.serving_session import ServedSession, SessionEnd


async def run_external_episode(context: EpisodeContext, *, desk: AgentDesk) -> Trajectory:
    """`run_episode` with an agent of `desk` in the lead. Of a session with rewritten histories the last row is the
    trajectory; `meta["untrained_rows"]` counts the others, whose tokens are left out."""
    return (await play_session(context, desk=desk))[-1]


async def play_session(context: EpisodeContext, *, desk: AgentDesk) -> list[Trajectory]:
    """Play one session to its end: a trajectory for each token row, at least one."""

    async def lead(episode: Episode) -> None:
        session = ServedSession(episode)
        desk.offer(session)
        try:
            await _judge(await _end_of(session), episode)
        finally:
            desk.forget(session)
            with suppress(ApiError):  # it has ended, unless this episode was cancelled
                session.finish(SessionEnd(kind="lost", text="the episode was stopped"))

    rows = await play_episode(context, lead)
    return [
        replace(
            row,
            meta=row.meta
            | {
                "session": context.key,
                "num_tool_calls": sum(len(turn.message.tool_calls) for turn in row.turns),
                "untrained_rows": len(rows) - 1,
            },
        )
        for row in rows
    ]


async def _end_of(session: ServedSession) -> SessionEnd:
    """Its end, at its deadline at the latest. Raises what its engine raised."""
    await asyncio.wait([session.ended], timeout=max(0.0, session.left_s))
    if not session.ended.done():
        taken = bool(session.holder)
        session.finish(
            SessionEnd(kind="deadline")
            if taken
            else SessionEnd(kind="lost", text="no agent took the session before its deadline")
        )
    return session.ended.result()


async def _judge(end: SessionEnd, episode: Episode) -> None:
    """Give the episode its reward, or raise why it has none."""
    if end.kind in ("abort", "lost"):
        kind = "env" if end.kind == "abort" else "infra"
        raise EpisodeFailed(EnvFailure(kind=kind, where="step", message=f"agent: {end.text}"))
    if end.kind == "deadline":
        raise DeadlinePassed
    # an end by the agent after a turn that hit its token limit is a truncation
    cut = bool(episode.rows) and episode.rows[-1].turns[-1].finish_reason == "length"
    stop = StopReason.TRUNCATED_TOKENS if cut else StopReason.TERMINATED
    if end.kind == "reward":
        parts = end.parts or {"reward": end.reward or 0.0}
        return episode.score(StepOutcome(reward=end.reward, reward_parts=parts), stop)
    step = await episode.act(Message.assistant(end.text), timeout_s=episode.context.settings.score_timeout_s)
    if step.reward is None:
        return await episode.finish(stop)
    return episode.score(step, stop)
