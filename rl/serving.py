"""Sessions over a run's newest checkpoint: made for whoever asks, recorded when they have ended."""

import asyncio
import itertools
import secrets
import signal
import sys
from argparse import Namespace
from collections.abc import Coroutine
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from conf.schema import TrainConfig
from envs.outcome import EnvHost
from envs.task import Task
from rl.cluster.inprocess import build_pool
from rl.cluster.learner_service import InProcessLearner
from rl.loop.tasks import task_entries
from rl.runs.checkpoint import load_latest
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError
from rollout.dialects.dialect import Dialect, make_dialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.swap_lock import RolloutLock
from rollout.record.recorder import Recorder
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.serve.agent_desk import AgentDesk
from rollout.serve.chat_request import ApiError
from rollout.serve.external_episode import play_session
from rollout.serve.serving_session import ServedSession
from rollout.worker import SCORE_GRACE_S, build_engine

END_TIMEOUT_S = 30.0
HEARTBEAT_S = 10.0


@dataclass(kw_only=True, slots=True)
class Counter:
    """Makes sessions for clients and records each when it has ended."""

    config: TrainConfig
    desk: AgentDesk
    host: EnvHost
    engine: Any
    dialect: Dialect
    recorder: Recorder
    deadline_s: float
    running: set[asyncio.Task[None]] = field(default_factory=set)
    numbers: Any = field(default_factory=itertools.count)

    async def make(self, body: dict[str, Any]) -> ServedSession:
        """Answers POST /v1/sessions: {"task": true} draws a task of the run, {"level": 2, "seed": 7} names it."""
        task = self._task(body, next(self.numbers))
        with_env = task.env_id != "external"
        offered: asyncio.Future[ServedSession] = asyncio.get_running_loop().create_future()
        record = self._record(task, with_env, offered)
        running = asyncio.create_task(record)
        self.running.add(running)
        running.add_done_callback(self.running.discard)
        await asyncio.wait([running, offered], return_when=asyncio.FIRST_COMPLETED, timeout=self.deadline_s)
        if not offered.done():
            raise ApiError("the task's environment could not be reset; shoal show tells why", code=503)
        return offered.result()

    def _task(self, body: dict[str, Any], number: int) -> Task:
        if unknown := body.keys() - {"task", "level", "seed"}:
            raise ApiError(f"the field {min(unknown)!r} is not served; task, level and seed are", param=min(unknown))
        name = f"serve/{number}"
        if not body.get("task"):
            return Task(task_id=name, env_id="external", env_name="external", seed=0)
        entries = task_entries(self.config)
        entry = entries[number % len(entries)]  # of a mix one after the other
        level, seed = body.get("level", entry.level), body.get("seed", number)
        if not isinstance(level, int) or not isinstance(seed, int) or not 0 <= level <= 9 or seed < 0:
            raise ApiError(f"level={level!r} must be 0 to 9 and seed={seed!r} a whole number from 0")
        return Task(
            task_id=name,
            env_id=entry.env_id,
            env_name=entry.name,
            seed=seed,
            level=level,
            kwargs=dict(entry.kwargs),
        )

    async def _record(self, task: Task, with_env: bool, offered: asyncio.Future[ServedSession]) -> None:
        context = EpisodeContext(
            task=task,
            group_id=task.task_id,
            worker="serve",
            session=f"{task.task_id}-{secrets.token_hex(4)}",
            host=self.host if with_env else None,
            engine=self.engine,
            dialect=self.dialect,
            settings=self._settings(),
            lock=RolloutLock("none"),
        )
        rows = await play_session(context, desk=_Offers(self.desk, offered))
        numbered: list[Trajectory] = [replace(row, member=n) for n, row in enumerate(rows)]
        group = TrajectoryGroup(group_id=task.task_id, task=task, attempt=0, trajectories=tuple(numbered))
        self.recorder.write([group])

    def _settings(self) -> EpisodeSettings:
        rollout = self.config.rollout
        return EpisodeSettings(
            temperature=rollout.temperature,
            max_turn_tokens=rollout.max_turn_tokens,
            max_turns=0,
            max_model_tokens=self.engine.capabilities.max_model_tokens,
            deadline_s=self.deadline_s,
            score_timeout_s=self.config.env.reward_timeout_s + SCORE_GRACE_S,
            seed=secrets.randbits(62),  # an equal conversation is to be sampled anew in each session
            other_temperatures=True,
        )


class _Offers(AgentDesk):
    """The desk of one session: it goes to the client that asked for it, not into the queue."""

    def __init__(self, desk: AgentDesk, offered: asyncio.Future[ServedSession]) -> None:
        super().__init__()
        self._desk = desk
        self._promise = offered

    def offer(self, session: ServedSession) -> None:
        session.holder = "client"
        self._desk.open(session)
        self._promise.set_result(session)

    def forget(self, session: ServedSession) -> None:
        self._desk.forget(session)


async def serve(config: TrainConfig, run: RunFolder, folder: RunFolder, args: Namespace, desk: AgentDesk) -> None:
    """Serve until Ctrl-C or SIGTERM; sessions that are open then end as lost."""
    checkpoint = load_latest(run.checkpoints)
    learner = InProcessLearner(config)
    version = await learner.restore(str(checkpoint.path))
    engine = build_engine(config)
    await engine.load_weights(await learner.snapshot())
    await learner.close()
    with closing(Recorder(folder.trajectories)) as recorder:
        counter = Counter(
            config=config,
            desk=desk,
            host=build_pool(config),
            engine=engine,
            dialect=make_dialect(config.policy),
            recorder=recorder,
            deadline_s=args.session_deadline,
        )
        desk.make_session = counter.make
        try:
            await desk.listen(args.host, args.port)
        except OSError as error:
            raise UsageError(f"cannot listen on {args.host}:{args.port}: {error.strerror}") from None
        key = next(iter(desk.tokens), "any")
        print(f"{desk.address}/v1", flush=True)
        print(f"policy version {version} of {run.name}, API key {key}, recorded in {folder.path}", file=sys.stderr)
        await _until_stopped(folder)
        for session_id in list(desk.session_ids()):
            desk.lose(desk.find(session_id).holder, "shoal serve was stopped")
        if counter.running:
            await asyncio.wait(counter.running, timeout=END_TIMEOUT_S)
        await desk.close()
    await engine.close()


async def _until_stopped(folder: RunFolder) -> None:
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    while not stop.is_set():
        folder.heartbeat(step=0)
        await _quietly(asyncio.wait_for(stop.wait(), HEARTBEAT_S))


async def _quietly(wait: Coroutine[Any, Any, object]) -> None:
    try:
        await wait
    except TimeoutError:
        return
