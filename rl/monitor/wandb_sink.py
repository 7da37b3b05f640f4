"""Weights & Biases: one writer, the driver's process; offline unless asked; nothing of ours depends on it.

Rows reach wandb with their own step key "trainer/step". `log(step=...)` is never used: wandb drops what comes later
for an earlier step, as an evaluation does. A process that resumes a run writes under the same wandb id.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import TrainConfig
from rl.monitor.sinks import Tracker

STEP = "trainer/step"
RENAMED = {"step": STEP, "policy_version": "trainer/policy_version", "time_s": "time/s"}
"""Columns of metrics.jsonl -> wandb's keys; all other keys are the same."""
OVERVIEW = {
    "eval/success": "overview/1 held-out success",
    "reward/mean": "overview/2 reward",
    "time/trainer_idle_ratio": "overview/3 learner waits",
    "time/rollout_idle_ratio": "overview/4 engines idle",
    "off_policy/lag/mean": "overview/5 staleness",
    "policy/mismatch_kl/mean": "overview/6 mismatch KL",
    "policy/entropy": "overview/7 entropy",
    "group/frac_mixed": "overview/8 groups that teach",
    "env/error_ratio": "overview/9 environment errors",
}
"""The few curves that matter, once more in a section of their own: hundreds of series bury them."""
BEST = {"eval/success": "max", "reward/mean": "max", "off_policy/lag/max": "max", "policy/mismatch_kl/mean": "max"}
"""Metric -> what wandb's summary keeps of it."""


def wandb_id(folder: Path) -> str:
    """The same for every process of a run, different for runs of one name in other folders."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]


class WandbTracker:
    """A started wandb run as a `Tracker`."""

    def __init__(self, run: Any, *, artifacts: bool) -> None:
        self._run = run
        self._artifacts = artifacts
        run.define_metric(STEP, hidden=True)
        run.define_metric("*", step_metric=STEP)
        for metric, kept in BEST.items():
            run.define_metric(metric, step_metric=STEP, summary=kept)

    def log(self, data: dict[str, Any]) -> None:
        kind = data["kind"]
        if kind in ("step", "evaluation"):
            self._run.log(scalars(data))
        elif kind == "detail":
            self._log_detail(data)
        elif kind == "alert" and data["state"] == "raised":
            self._run.alert(title=data["rule"], text=data["text"], level=data["level"].upper())
        elif kind == "checkpoint" and self._artifacts:
            self._log_checkpoint(data)

    def finish(self) -> None:
        self._run.finish()

    def _log_detail(self, data: Mapping[str, Any]) -> None:
        import wandb

        items: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=(found["counts"], found["edges"]))
            for name, found in data["histograms"].items()
        }
        if data["samples"]:
            columns = ["step", *data["samples"][0]]
            rows: list[Any] = [[data["step"], *sample.values()] for sample in data["samples"]]
            items["samples/trajectories"] = wandb.Table(columns=columns, data=rows)
        if items:
            self._run.log({STEP: data["step"], **items})

    def _log_checkpoint(self, data: Mapping[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": data["step"]})
        artifact.add_dir(data["path"])
        self._run.log_artifact(artifact, aliases=[f"step-{data['step']}"])


def scalars(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl under wandb's keys. Null (it was not finite) stays null: charts leave it out."""
    numbers = {key: value for key, value in row.items() if key != "kind"}
    copies = {OVERVIEW[key]: value for key, value in numbers.items() if key in OVERVIEW}
    return {RENAMED.get(key, key): value for key, value in numbers.items()} | copies


def start_wandb(folder: Path, config: TrainConfig) -> Tracker:
    """A wandb run inside the run folder: silent, without a prompt, without a copy of the console."""
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    if config.monitor.upload_checkpoints:  # wandb copies what it will upload: not into the home folder
        quiet["WANDB_DATA_DIR"] = str(folder / "wandb")
    for name, value in quiet.items():
        os.environ.setdefault(name, value)  # read by wandb when it is imported
    import wandb

    run = wandb.init(
        project=config.monitor.wandb_project,
        id=wandb_id(folder),
        resume="allow",
        name=folder.name,
        dir=folder,
        mode="online" if config.monitor.wandb == "online" else "offline",
        config=asdict(config),
        settings=wandb.Settings(init_timeout=30.0, finish_timeout=20.0, disable_git=True, disable_code=True),
    )
    return WandbTracker(run, artifacts=config.monitor.upload_checkpoints)
