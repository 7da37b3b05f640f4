"""A run under a scripted clock, and what it left: each number of the Overview can be told from it."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.loading import read_config
from conf.schema import TrainConfig
from envs.outcome import EnvHost
from envs.registry import make_env
from policy.engine.protocol import Completion, EngineStats, GenerationRequest
from rl.cluster.protocol import LearnerClient
from rollout.dialects.dialect import make_dialect
from rollout.record.lineage import STATE_AFTER
from rollout.record.trajectory import TrajectoryGroup
from rollout.schedule.lease import Lease, NotReady
from rollout.worker import RolloutWorker
from tests.fakes import ScriptedEngine
from tests.rl.training import small_config, sometimes_right, train_in_process
from tests.virtual_time import VirtualLoop, seconds_by

TOKEN_S, LOAD_S, TRAIN_S, SNAPSHOT_S, SAVE_S = 0.05, 0.251, 1.503, 0.307, 0.611
LEARNER_S = 1.2
"""Of TRAIN_S, what the learner says of itself."""
HEARTBEAT_S = 0.01
LOST, HOPELESS = "train/calculator/2", "train/calculator/5"
"""A group whose first lease is refused, and one whose leases all are."""


class _Engine(ScriptedEngine):
    """Busy as long as it has a request, and slow to load weights."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(sometimes_right, token_s=TOKEN_S, clock=loop.time)
        self._loop, self._num_running, self._since_s, self._busy_s = loop, 0, 0.0, 0.0

    async def generate(self, request: GenerationRequest) -> Completion:
        if not self._num_running:
            self._since_s = self._loop.time()
        self._num_running += 1
        try:
            return await super().generate(request)
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._busy_s += self._loop.time() - self._since_s

    async def load_weights(self, snapshot: Any, **how: Any) -> None:
        await asyncio.sleep(LOAD_S)
        await super().load_weights(snapshot, **how)

    def stats(self) -> EngineStats:
        running_s = self._loop.time() - self._since_s if self._num_running else 0.0
        return replace(super().stats(), busy_s=self._busy_s + running_s)


class _Worker(RolloutWorker):
    """Refuses some leases."""

    async def run_lease(self, lease: Lease) -> TrajectoryGroup:
        if lease.group_id == HOPELESS or (lease.group_id == LOST and lease.attempt == 1):
            await asyncio.sleep(0.013)
            raise NotReady("as the script says")
        return await super().run_lease(lease)


def _build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
    engine, dialect = _Engine(asyncio.get_running_loop()), make_dialect(config.policy)
    return _Worker(name, engine=engine, dialect=dialect, host=host, config=config.rollout, seed=config.seed)


class _SlowLearner:
    """The real learner; its calls take scripted times."""

    def __init__(self, inner: LearnerClient) -> None:
        self._inner = inner

    async def step(self, groups: Sequence[TrajectoryGroup]) -> Any:
        report = await self._inner.step(groups)
        await asyncio.sleep(TRAIN_S)
        return replace(report, metrics=report.metrics | {"time/forward_backward": LEARNER_S})

    async def snapshot(self) -> object:
        await asyncio.sleep(SNAPSHOT_S)
        return await self._inner.snapshot()

    async def save(self, folder: str, step: int, state: dict[str, Any]) -> str:
        await asyncio.sleep(SAVE_S)
        return await self._inner.save(folder, step, state)

    async def restore(self, path: str) -> int:
        return await self._inner.restore(path)

    async def close(self) -> None:
        await self._inner.close()


def scripted_run(tmp_path_factory: pytest.TempPathFactory) -> "Stored":
    config = small_config(
        tmp_path_factory.mktemp("scripted"), "rollout.max_staleness=1", "steps=7", "rollout.workers=2",
        f"cluster.heartbeat_s={HEARTBEAT_S}", "learner.self_check_tolerance=1e9", "run.checkpoint_every=3",
        "rollout.max_attempts=2",
    )  # fmt: skip
    make_env("Calculator-v0").close()  # imported now: on an environment's own thread it would take virtual time
    run = train_in_process(config, build=_build, wrap_learner=_SlowLearner, loop=VirtualLoop)
    return Stored(run.folder.path)


# --- what it left -----------------------------------------------------------------------------------------------------


class Stored:
    """The rows of a run, read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config((folder / "config.yaml").read_text())
        self.metrics = self._lines("metrics")
        self.steps = [row for row in self.metrics if row["kind"] == "step"]
        self.spans, self.happened = self._lines("spans"), self._lines("events")
        with closing(sqlite3.connect(folder / "ledger.sqlite")) as db:
            sql = "SELECT unix_s, event, group_id, reason FROM events JOIN groups USING (ordinal) ORDER BY number"
            found = db.execute(sql).fetchall()
        self.ledger = [(unix_s - 1000.0, event, group, reason) for unix_s, event, group, reason in found]
        with closing(sqlite3.connect(folder / "trajectories.db")) as db:
            db.row_factory = sqlite3.Row
            self.rows = [dict(row) for row in db.execute("SELECT * FROM trajectories ORDER BY row")]
        for row in self.rows:
            row["meta"] = json.loads(row["meta"])
            row["mask"] = np.frombuffer(row["loss_mask"], "u1") == 1

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def trained(self, step: int) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["step"] == step]

    def window(self, step: int) -> tuple[float, float]:
        """When a step began and ended."""
        begun_s = min(s["start_s"] for s in self.spans if (s["process"], s["activity"]) == ("learner", "wait"))
        return self.steps[step - 2]["time_s"] if step > 1 else begun_s, self.steps[step - 1]["time_s"]

    def states(self, at_s: float) -> dict[str, tuple[str, float]]:
        """Group -> state, and since when, as the ledger's events tell."""
        return {g: (STATE_AFTER[event], t) for t, event, g, _ in self.ledger if t <= at_s and event != "refused"}

    def count(self, event: str, until_s: float, *, but: str = "") -> int:
        return sum(t <= until_s and e == event and reason != (but or "-") for t, e, _, reason in self.ledger)

    @cached_property
    def workers(self) -> list[str]:
        return sorted({row["worker"] for row in self.rows})

    def busy_s(self, start_s: float, end_s: float) -> float:
        """Engines take model steps whenever they have a lease: environments answer at once here."""
        spans = [seconds_by(self.spans, worker, "generate", start_s, end_s) for worker in self.workers]
        return sum(spans) / len(spans)
