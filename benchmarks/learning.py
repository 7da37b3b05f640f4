"""Does RL raise held-out success in every text environment, all by one preset?

    shoal bench learning [--json] [--only bank,help_desk] [--seeds 1,2,3] [--root runs/bench-learning]

`shoal train env=ENV seed=SEED steps=40` from the shipped warm starts, one run after the other, each in processes of its
own: 1,000 held-out tasks before the first step and after the last. After each run the result is written; the run takes
the place of that of the same environment and seed, the others stay. An environment passes if in every seed, of three
at least, success rises by 0.15 or more and the two intervals (Wilson 95%) are disjoint. A run that fails is noted with
its last words, and the rest goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from conf.loading import read_config
from rl.runs.run_folder import RunFolder

CHECKOUT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "learning.json"
ENVIRONMENTS = ("calculator", "tool_gate", "shop_db", "shell_box", "grid_quest", "bank", "help_desk")
STEPS = 40
GAIN = 0.15
SEEDS = 3
"""Fewer show nothing."""
RUN_TIMEOUT_S = 1800.0
"""Six times the longest run seen beside other work."""
SETTINGS = (
    "env.level", "policy.preset", "policy.init", "learner.optimizer.lr", "learner.optimizer.schedule",
    "rollout.groups_per_step", "rollout.group_size", "rollout.max_staleness", "env.tool_cost", "evaluation.temperature",
)  # fmt: skip
"""What is told of a run's config. Only tool_cost may differ between environments: their conf groups set it."""


def train(root: Path, env: str, seed: int, words: list[str]) -> dict[str, Any]:
    """What a run leaves, or {"env", "seed", "error"} of one that failed."""
    root = root / f"{env}-{seed}"
    own = [f"run.root={root}", "monitor.wandb=disabled", "monitor.progress=false"]
    command = [sys.executable, "-m", "rl.cli", "train", f"env={env}", f"seed={seed}", f"steps={STEPS}", *words, *own]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"env": env, "seed": seed, "error": f"no end within {RUN_TIMEOUT_S:g} s"}
    if done.returncode:
        return {"env": env, "seed": seed, "error": f"status {done.returncode}: {done.stderr.strip()[-1000:]}"}
    return read_run(RunFolder.resolve(root, "latest"))


def read_run(folder: RunFolder) -> dict[str, Any]:
    """The figures of a finished run. Seconds are of training and all evaluations, the start apart."""
    summary, config = json.loads(folder.summary.read_text()), read_config(folder.config.read_text())
    kept = ("success", "ci95", "n", "errors", "facts")
    return {
        "env": summary["env"],
        "seed": summary["seed"],
        "steps": summary["steps"],
        "before": {name: summary["before"][name] for name in kept},
        "after": {name: summary["after"][name] for name in kept},
        "seconds": summary["train_seconds"],
        "start_seconds": summary["start_seconds"],
        "overlap": summary["held_out_overlap"],
        "settings": {name: attrgetter(name)(config) for name in SETTINGS},
    }


def judge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one environment. The gain is the mean over seeds, `least_gain` that of the worst."""
    ended = [run for run in runs if "error" not in run]
    gains = [round(run["after"]["success"] - run["before"]["success"], 4) for run in ended]
    disjoint = all(run["after"]["ci95"][0] > run["before"]["ci95"][1] for run in ended)
    return {
        "seeds": len(ended),
        "failed": len(runs) - len(ended),
        "gain": round(statistics.fmean(gains), 4) if gains else None,
        "least_gain": min(gains, default=None),
        "disjoint": bool(ended) and disjoint,
        "passes": len(runs) == len(ended) >= SEEDS and min(gains) >= GAIN and disjoint,
    }


def result_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What is written: all runs in order, and what they say of each environment."""
    names = [env for env in ENVIRONMENTS if any(run["env"] == env for run in runs)]
    environments = {env: judge([run for run in runs if run["env"] == env]) for env in names}
    return {
        "name": "learning",
        "passes": sum(found["passes"] for found in environments.values()),
        "environments": environments,
        "runs": sorted(runs, key=lambda run: (ENVIRONMENTS.index(run["env"]), run["seed"])),
        "machine": describe_machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--only", default=",".join(ENVIRONMENTS), help="comma-separated environments")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--root", type=Path, default=CHECKOUT / "runs" / "bench-learning", help="for the run folders")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="settings of every run, e.g. steps=100; not into the usual file")
    args = parser.parse_args()
    chosen, seeds = args.only.split(","), [int(seed) for seed in args.seeds.split(",")]
    if unknown := set(chosen) - set(ENVIRONMENTS):
        parser.error(f"--only: {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    if args.overrides and args.output == RESULT:
        parser.error("figures of other settings need a file of their own: --output")
    runs = json.loads(args.output.read_text())["runs"] if args.output.exists() else []
    for env in chosen:
        for seed in seeds:
            run = train(args.root.absolute(), env, seed, args.overrides)
            print(json.dumps(run), file=sys.stderr, flush=True)
            runs = [other for other in runs if (other["env"], other["seed"]) != (env, seed)] + [run]
            save_result(args.output, result_of(runs))
    result = result_of(runs)
    if args.json:
        print(json.dumps(result))
    else:
        for env, found in result["environments"].items():
            print(f"{env}: " + " ".join(f"{name}={value}" for name, value in found.items()))
    return 1 if any(result["environments"][env]["failed"] for env in chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
