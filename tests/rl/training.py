"""Whole trainings in one process for tests: the real controller around a small model or a scripted engine."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conf.loading import load_config, resolved_yaml
from conf.schema import TrainConfig
from envs.library.calculator import TOOL_OF_SYMBOL
from envs.outcome import EnvHost
from envs.tasks.curriculum import Curriculum
from envs.tasks.task_source import TaskSource, held_out_tasks
from policy.engine.protocol import Engine
from policy.model.tokenizer import ByteTokenizer
from rl.cluster.inprocess import InProcessCluster, build_pool
from rl.cluster.learner_service import build_learner
from rl.cluster.protocol import LearnerClient
from rl.loop.controller import Controller, Progress
from rl.loop.tasks import task_entries
from rl.monitor.monitor import Monitor
from rl.runs.run_folder import RunFolder
from rollout.dialects.dialect import make_dialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.group import run_group
from rollout.play.swap_lock import RolloutLock
from rollout.record.ledger import Ledger
from rollout.record.recorder import Recorder
from rollout.worker import RolloutWorker
from tests.fakes import ScriptedEngine

SMALL = (
    "cluster=inprocess",
    "policy.init=random",
    "policy.overrides={hidden_size: 16, intermediate_size: 16, head_dim: 8, linear_key_head_dim: 8, "
    "linear_value_head_dim: 8, linear_num_key_heads: 1, linear_num_value_heads: 1}",
    "rollout.groups_per_step=2",
    "rollout.group_size=4",
    "evaluation.every=0",
    "evaluation.final_tasks=4",
    "monitor.wandb=disabled",
    "monitor.progress=false",
    "run.checkpoint_every=1000",
)


def small_config(tmp_path: Path, *overrides: str) -> TrainConfig:
    """Two groups of four a step on a model of a few thousand parameters; later overrides win."""
    return load_config([*SMALL, f"run.root={tmp_path / 'runs'}", *overrides])


def sometimes_right(prompt_ids: np.ndarray, rng: np.random.Generator) -> list[int]:
    """A calculator policy: half of the time it calls the right tool and answers its result, else it guesses."""
    tokenizer = ByteTokenizer()
    mark = tokenizer.special_id
    ids = prompt_ids.tolist()
    if mark("<result>") in ids:
        return [*ids[ids.index(mark("<result>")) + 1 : -1], mark("<end>")]
    if rng.random() < 0.5:
        return [*tokenizer.encode(str(int(rng.integers(10, 9999)))), mark("<end>")]
    text = tokenizer.decode(ids[1:-1]).removesuffix("=?")
    symbol = next(symbol for symbol in TOOL_OF_SYMBOL if symbol in text)
    left, right = text.split(symbol)
    call = [mark("<call>"), *tokenizer.encode(TOOL_OF_SYMBOL[symbol]), mark("<arg>"), *tokenizer.encode(left)]
    return [*call, mark("<arg>"), *tokenizer.encode(right), mark("<end>")]


def scripted_worker(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
    """A worker whose engine plays `sometimes_right`."""
    return RolloutWorker(
        name,
        engine=ScriptedEngine(sometimes_right),
        dialect=make_dialect(config.policy),
        host=host,
        config=config.rollout,
        seed=config.seed,
    )


@dataclass(kw_only=True, slots=True)
class Run:
    """What a finished controller leaves for assertions."""

    controller: Controller
    weights: dict[str, np.ndarray]
    folder: RunFolder
    audit: dict[str, object]


def train_in_process(
    config: TrainConfig,
    *,
    build: Callable[[TrainConfig, str, EnvHost], RolloutWorker] | None = None,
    meanwhile: Callable[[Controller], Awaitable[None]] | None = None,
    wrap_learner: Callable[[LearnerClient], LearnerClient] = lambda learner: learner,
    loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Run:
    """Run the real controller to its end, `meanwhile` beside it. On a `loop` with a time of its own, that is the run's
    clock."""

    async def run() -> Run:
        clock = asyncio.get_running_loop().time if loop else time.monotonic
        folder = RunFolder.create(config.run.root, config.env.name, "test")
        folder.write_config(resolved_yaml(config))
        monitor = Monitor(folder.path, config, clock=clock)
        cluster = InProcessCluster(config, build=build)
        cluster.learner = wrap_learner(cluster.learner)
        ledger = Ledger(folder.ledger, clock=clock, unix_clock=clock if loop else time.time)
        recorder = Recorder(folder.trajectories)
        entries = task_entries(config)
        held_out = await held_out_tasks(entries, cluster.host, count=4, seed=config.evaluation.seed)
        controller = Controller(
            config,
            cluster=cluster,
            folder=folder,
            monitor=monitor,
            ledger=ledger,
            recorder=recorder,
            source=TaskSource(
                entries,
                cluster.host,
                seed=config.seed,
                held_out=frozenset(held_out),
                curriculum=Curriculum(entries, config.curriculum, seed=config.seed),
            ),
            held_out=held_out,
            progress=Progress(),
            clock=clock,
        )
        beside = asyncio.create_task(meanwhile(controller)) if meanwhile else None
        try:
            await controller.run()
            snapshot = await cluster.learner.snapshot()
            monitor.close()
            return Run(controller=controller, weights=dict(snapshot.tensors), folder=folder, audit=ledger.audit())
        finally:
            if beside:
                beside.cancel()
            await cluster.close()
            recorder.close()
            ledger.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(asyncio.wait_for(run(), 100))


def train_plainly(config: TrainConfig, make_engine: Callable[[], Engine]) -> dict[str, np.ndarray]:
    """Synchronous training as one would write it on a page, without scheduler, buffer or controller: the reference."""

    async def run() -> dict[str, np.ndarray]:
        host, learner, engine = build_pool(config), build_learner(config), make_engine()
        dialect, entries = make_dialect(config.policy), task_entries(config)
        held_out = await held_out_tasks(entries, host, count=4, seed=config.evaluation.seed)
        source = TaskSource(entries, host, seed=config.seed, held_out=frozenset(held_out))
        settings = EpisodeSettings(
            temperature=config.rollout.temperature,
            max_turn_tokens=config.rollout.max_turn_tokens,
            max_turns=config.rollout.max_turns,
            max_model_tokens=engine.capabilities.max_model_tokens,
            deadline_s=config.rollout.episode_deadline_s,
            seed=config.seed,
        )
        for _ in range(config.steps):
            await engine.load_weights(learner.snapshot())
            groups = []
            for _ in range(config.rollout.groups_per_step):
                task = await source.next()
                groups.append(
                    await run_group(
                        EpisodeContext(
                            task=task,
                            group_id=task.task_id,
                            host=host,
                            engine=engine,
                            dialect=dialect,
                            settings=settings,
                            lock=RolloutLock("none"),
                        ),
                        group_size=config.rollout.group_size,
                    )
                )
            learner.step(groups)
        await engine.close()
        return dict(learner.snapshot().tensors)

    return asyncio.run(asyncio.wait_for(run(), 100))


def first_is_best(rewards: list[float | None]) -> list[float | None]:
    """An advantage with a signal whatever the rewards are: random models earn none."""
    return [1.0 if i == 0 else -1.0 / (len(rewards) - 1) for i in range(len(rewards))]
