"""`shoal eval`: a run's newest checkpoint on its held-out tasks."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

from conf.loading import read_config
from conf.schema import TrainConfig
from envs.tasks.task_source import held_out_tasks
from rl.cluster.start import start_cluster
from rl.loop.evaluate import evaluate
from rl.loop.tasks import evaluation_levels, task_entries
from rl.monitor.evaluation import Evaluation
from rl.runs.checkpoint import load_latest
from rl.runs.run_folder import RunFolder


def evaluate_run(run: str, *, overrides: Sequence[str] = (), root: str = "runs", as_json: bool = False) -> int:
    """`shoal eval RUN`: evaluate a run's newest checkpoint on its held-out tasks. Prints; returns the exit code."""
    folder = RunFolder.resolve(root, run)
    config = read_config(folder.config.read_text(), overrides)
    evaluation = asyncio.run(_evaluate_run(config, folder.path))
    if as_json:
        row = {
            "env": config.env.name,
            "success": evaluation.success,
            "ci95": list(evaluation.ci95),
            "n": evaluation.n,
            "policy_version": evaluation.policy_version,
            "errors": evaluation.errors,
            "facts": evaluation.facts,
        }
        print(json.dumps(row))
        return 0
    low, high = evaluation.ci95
    print(
        f"{config.env.name}: held-out success {evaluation.success:.3f} (95% interval {low:.3f} to {high:.3f}), "
        f"{evaluation.n} tasks, policy version {evaluation.policy_version}, {evaluation.errors} failed episodes"
    )
    return 0


async def _evaluate_run(config: TrainConfig, path: Path) -> Evaluation:
    checkpoint = load_latest(path / "checkpoints")
    cluster = await start_cluster(config, path)
    try:
        version = await cluster.learner.restore(str(checkpoint.path))
        snapshot = await cluster.learner.snapshot()
        await asyncio.gather(*(worker.load_weights(snapshot) for worker in cluster.workers))
        tasks = await held_out_tasks(
            task_entries(config),
            cluster.host,
            count=config.evaluation.final_tasks,
            seed=config.evaluation.seed,
            levels=evaluation_levels(config),
        )
        evaluation, _ = await evaluate(
            cluster.workers,
            list(tasks.values()),
            version=version,
            step=checkpoint.step,
            temperature=config.evaluation.temperature,
        )
        return evaluation
    finally:
        await cluster.close()
