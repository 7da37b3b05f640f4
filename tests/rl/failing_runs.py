"""Runs whose environment, engine or weights fail, and what they left."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import TrainConfig
from envs.outcome import EnvHost
from rl.cli.main import main
from rl.runs.run_folder import RunFolder
from rollout.dialects.dialect import make_dialect
from rollout.record.recorder import StoredTrajectory, TrajectoryReader
from rollout.worker import RolloutWorker
from tests.fakes import Script, ScriptedEngine

LOOSE = "learner.self_check_tolerance=1e9"  # a scripted engine has no true logprobs


def playing(script: Script) -> Any:
    """Builder of workers whose policy is `script`."""

    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        return with_engine(ScriptedEngine(script), config, name, host)

    return build


def with_engine(engine: Any, config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
    dialect = make_dialect(config.policy)
    return RolloutWorker(name, engine=engine, dialect=dialect, host=host, config=config.rollout, seed=config.seed)


def one_env(name: str, **kwargs: object) -> list[str]:
    """Overrides for an environment of tests/envs/failing_envs.py."""
    return ["env=custom", f"env.name={name.lower()}", f"env.id=tests.envs.failing_envs:{name}"] + [
        f"env.kwargs.{key}={value}" for key, value in kwargs.items()
    ]


def rows_of(folder: RunFolder, split: str = "train") -> list[StoredTrajectory]:
    with TrajectoryReader(folder.trajectories) as reader:
        return [reader.get(row["row"]) for row in reader.list({"split": split}, limit=100_000)]


def lines_of(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["kind"] == kind]


def cli(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err
