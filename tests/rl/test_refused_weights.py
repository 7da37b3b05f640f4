"""Weights that workers refuse, and an engine that lies about its logprobs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from conf.schema import TrainConfig
from envs.outcome import EnvHost
from policy.engine.local_engine import LocalEngine
from policy.engine.protocol import CachePolicy, Completion, GenerationRequest
from policy.model.hf_model import load_policy_model
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from rl.algorithm.learner import SelfCheckError
from rollout.worker import RolloutWorker
from tests.envs.failing_envs import answers
from tests.fakes import ScriptedEngine
from tests.rl.failing_runs import LOOSE, lines_of, one_env, rows_of, with_engine
from tests.rl.training import small_config, train_in_process

pytestmark = pytest.mark.slow


# --- weights that workers refuse, engines that lie


class Sabotaged(ScriptedEngine):
    """Gets a tensor of some versions changed on the way: {version: "drop" | "rename" | "truncate" | "flip"}."""

    def __init__(self, changes: dict[int, str]) -> None:
        super().__init__(answers("yes", "no"))
        self._changes = changes

    async def load_weights(self, snapshot: PolicySnapshot, *, cache_policy: CachePolicy = "recompute") -> None:
        if change := self._changes.get(snapshot.version):
            tensors = dict(snapshot.tensors)
            array = tensors.pop("model.norm.weight")
            changed = {
                "drop": {},
                "rename": {"model.norm.wait": array},
                "truncate": {"model.norm.weight": array[:-1]},
                "flip": {"model.norm.weight": array + np.float32(1e-3)},
            }
            snapshot = dataclasses.replace(snapshot, tensors=tensors | changed[change])
        await super().load_weights(snapshot, cache_policy=cache_policy)


def test_a_worker_that_refuses_weights_keeps_its_old_ones_and_the_run_goes_on(tmp_path: Path) -> None:
    changes = {2: "drop", 3: "rename", 4: "truncate", 5: "flip"}

    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        return with_engine(Sabotaged(changes if name == "worker-1" else {}), config, name, host)

    config = small_config(tmp_path, *one_env("Indifferent"), "rollout.workers=2", "steps=10", LOOSE)
    run = train_in_process(config, build=build)
    refused = lines_of(run.folder.events, "weights_refused")
    assert [(event["worker"], event["version"]) for event in refused] == [("worker-1", v) for v in changes]
    assert all("'model.norm.w" in event["error"] for event in refused)
    rows = [row.trajectory for row in rows_of(run.folder) if row.trajectory.worker == "worker-1"]
    versions = {int(version) for t in rows for version in t.policy_versions[t.loss_mask == 1]}
    assert versions and not versions & set(changes)
    assert run.audit["consumed"] == 20
    assert [m.version for m in run.controller.fleet.members] == [10, 10]


@pytest.mark.parametrize("version", [0, 2, 4])
def test_weights_that_all_workers_refuse_end_the_run_and_name_the_tensor(tmp_path: Path, version: int) -> None:
    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        return with_engine(Sabotaged({version: "truncate"}), config, name, host)

    config = small_config(tmp_path, *one_env("Indifferent"), "rollout.workers=2", "steps=4", LOOSE)
    with pytest.raises(WeightSyncError, match=rf"version {version}: 'model.norm.weight' has shape \(15,\)"):
        train_in_process(config, build=build)


class Biased(LocalEngine):
    """Reports logprobs that are off by 0.1."""

    async def generate(self, request: GenerationRequest) -> Completion:
        completion = await super().generate(request)
        return dataclasses.replace(completion, logprobs=completion.logprobs - np.float32(0.1))


def test_an_engine_whose_logprobs_are_off_stops_the_run_before_the_first_update(tmp_path: Path) -> None:
    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        engine = Biased(load_policy_model(config.policy, seed=config.seed), config.engine)
        return with_engine(engine, config, name, host)

    config = small_config(tmp_path, "steps=3", "rollout.max_turn_tokens=4")
    with pytest.raises(SelfCheckError, match=r"version 0: trajectory .* difference 1\.00e-01 > tolerance 1e-03"):
        train_in_process(config, build=build)
    assert lines_of(tmp_path / "runs" / "latest" / "metrics.jsonl", "step") == []
