"""`shoal eval`: checkpoints of a run on its held-out tasks, and two of them against each other on the same."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.loading import read_config
from conf.schema import TrainConfig
from envs.tasks.task_source import held_out_tasks
from rl.cluster.start import start_cluster
from rl.loop.evaluate import evaluate
from rl.loop.tasks import evaluation_levels, task_entries
from rl.monitor.evaluation import Evaluation
from rl.monitor.paired import compare_paired
from rl.runs.checkpoint import list_checkpoints, load_latest, read_checkpoint
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError
from rollout.record.trajectory import Trajectory

ALL = "all"


def evaluate_run(
    folder: RunFolder, *, overrides: Sequence[str] = (), checkpoint: str = "", against: str = "", as_json: bool = False
) -> int:
    """Evaluate checkpoints on the run's held-out tasks. Prints; returns the exit code.

    `checkpoint`: a learner step, "all", or "" for the newest. `against`: a learner step, or "" for no comparison.
    Raises `UsageError`, naming those that there are, for a step that has no checkpoint.
    """
    paths = _chosen(folder, checkpoint, against)
    config = read_config(folder.config.read_text(), overrides)
    played = asyncio.run(_evaluate(config, folder.path, sorted(set(paths), key=_step)))
    shown = {path: evaluation for path, (evaluation, _) in played.items()}
    newest = shown[paths[0]]
    paired = compare_paired(played[paths[-1]][1], played[paths[0]][1]) if against else None
    if as_json:
        curve = [_row(config, shown[path]) for path in sorted(shown, key=_step)]
        told = {"evaluations": curve, "paired": asdict(paired) if paired else None}
        print(json.dumps(_row(config, newest) | told))
        return 0
    for path in sorted(shown, key=_step):
        _print(config, shown[path])
    if paired:
        print(f"step {newest.step} against step {shown[paths[-1]].step}: {paired.sentence}")
    return 0


def _chosen(folder: RunFolder, checkpoint: str, against: str) -> list[Path]:
    """What to evaluate: first the one asked for (of all the newest), last the one to compare it with."""
    known = {_step(path): path for path in list_checkpoints(folder.path / "checkpoints")}

    def of(step: str, option: str) -> Path:
        if not step.isdecimal() or int(step) not in known:
            there = ", ".join(map(str, known)) or "none"
            raise UsageError(f"{option} {step}: {folder.name} has no such checkpoint. There are: {there}")
        return known[int(step)]

    if checkpoint == ALL:
        if against:
            raise UsageError("--against compares one checkpoint with another: --checkpoint N, not all")
        if not known:
            raise UsageError(f"--checkpoint all: {folder.name} has no checkpoint")
        return list(known.values())[::-1]
    first = of(checkpoint, "--checkpoint") if checkpoint else load_latest(folder.path / "checkpoints").path
    if not against:
        return [first]
    other = of(against, "--against")
    if other == first:
        raise UsageError(f"--against {against}: that is the checkpoint itself")
    return [first, other]


async def _evaluate(
    config: TrainConfig, folder: Path, checkpoints: Sequence[Path]
) -> dict[Path, tuple[Evaluation, list[Trajectory]]]:
    """Each on the same tasks, one after the other. `checkpoints` from old to new: workers take newer weights only."""
    for path in checkpoints:  # a damaged one is told before anything starts
        read_checkpoint(path)
    cluster = await start_cluster(config, folder)
    try:
        tasks = await held_out_tasks(
            task_entries(config),
            cluster.host,
            count=config.evaluation.final_tasks,
            seed=config.evaluation.seed,
            levels=evaluation_levels(config),
        )
        found = {}
        for path in checkpoints:
            version = await cluster.learner.restore(str(path))
            snapshot = await cluster.learner.snapshot()
            await asyncio.gather(*(worker.load_weights(snapshot) for worker in cluster.workers))
            found[path] = await evaluate(
                cluster.workers,
                list(tasks.values()),
                version=version,
                step=_step(path),
                temperature=config.evaluation.temperature,
            )
        return found
    finally:
        await cluster.close()


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _row(config: TrainConfig, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "env": config.env.name,
        "step": evaluation.step,
        "success": evaluation.success,
        "ci95": list(evaluation.ci95),
        "n": evaluation.n,
        "policy_version": evaluation.policy_version,
        "errors": evaluation.errors,
        "facts": evaluation.facts,
    }


def _print(config: TrainConfig, evaluation: Evaluation) -> None:
    low, high = evaluation.ci95
    print(
        f"{config.env.name}: held-out success {evaluation.success:.3f} (95% interval {low:.3f} to {high:.3f}), "
        f"{evaluation.n} tasks, step {evaluation.step}, policy version {evaluation.policy_version}, "
        f"{evaluation.errors} failed episodes"
    )
