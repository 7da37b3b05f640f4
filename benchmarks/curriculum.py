"""How many groups the levels curriculum needs against uniform sampling, from one warm start to one target.

    shoal bench curriculum --env calculator --warm calc.safetensors [--json] [--seeds 1,2,3] [--steps 60]

Both sides train the same environment on levels 0..MAX with the same groups, seeds and warm start; only
curriculum.sampler differs. The target is fixed before any training: held-out success at level 5 of the warm start (of
`--final-tasks` problems, in the result before the first step) plus 0.3. Every `--every` steps the policy is evaluated
on `--tasks` held-out problems of level 5, the same for all; a side has reached the target at the first of two
evaluations in a row at or above it, and is not trained further. Counted are the groups that the learner took until
then and those that were dropped, not those still in flight. A side that never gets there counts with the groups of its
whole run, as a lower bound.

Each training is a run folder under `--root`; one that is finished is not repeated, one that was cut short goes on, so
the command can be stopped and started again. The warm start is made with

    shoal sft env=calculator curriculum=uniform curriculum.max_level=5 engine.max_model_tokens=384 sft.output=...
"""

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

CHECKOUT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "curriculum.json"
SIDES = ("uniform", "levels")
LEVEL = 5
GAIN = 0.3
LIMIT = 0.6
"""Criterion: groups of levels / groups of uniform, median over seeds."""
IN_A_ROW = 2
POLL_S = 1.0
STOP_S = 300.0
"""Deadline of a run that was asked to end."""


def train(args: argparse.Namespace, side: str, seed: int) -> Path:
    """The run folder of one training; trains, or goes on, until its end or until it has reached the target."""
    name = f"{args.env}-{side}-{seed}".replace("_", "-")
    folder = args.root / name
    if is_settled(folder):
        return folder
    command = [sys.executable, "-m", "rl.cli"]
    if (folder / "config.yaml").exists():
        command += ["resume", str(folder.absolute())]
    else:
        command += [
            *("train", f"env={args.env}", f"curriculum={side}", f"curriculum.max_level={args.max_level}"),
            *(f"policy.init={args.warm}", f"seed={seed}", f"steps={args.steps}", f"evaluation.level={LEVEL}"),
            *(f"evaluation.every={args.every}", f"evaluation.tasks={args.tasks}"),
            *(f"evaluation.final_tasks={args.final_tasks}", f"run.root={args.root}", f"run.name={name}"),
            *("monitor.wandb=disabled", "monitor.progress=false", *args.overrides),
            *(args.levels.split() if side == "levels" else ()),
        ]
    process = subprocess.Popen(command, stdout=sys.stderr, cwd=CHECKOUT)
    try:
        while process.poll() is None and not is_settled(folder):
            time.sleep(POLL_S)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # it ends after the step in flight
        process.wait(timeout=STOP_S)
    finally:
        process.kill()
    if not is_settled(folder):
        raise RuntimeError(f"{name} ended with status {process.returncode} before its last step")
    return folder


def is_settled(folder: Path) -> bool:
    """The run came to its last step, or reached the target in `IN_A_ROW` evaluations."""
    if (folder / "summary.json").exists():
        return True
    curve = read_curve(folder)
    last = curve[-IN_A_ROW:]
    return len(curve) > IN_A_ROW and all(point[1] >= curve[0][1] + GAIN for point in last)


def read_rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that is still being written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def read_curve(folder: Path) -> list[list[float]]:
    """[step, success, problems] of each evaluation, the one of the warm start first."""
    by_step = {row["step"]: row for row in read_rows(folder, "evaluation")}
    return [[step, row["eval/success"], row["eval/n"]] for step, row in sorted(by_step.items())]


def ended_by_step(folder: Path, groups_per_step: int) -> dict[int, int]:
    """Learner step -> groups that it and the steps before took, with those that the gate or a failure dropped."""
    found = {0: 0}
    for row in read_rows(folder, "step"):
        dropped = row["faults/dropped_groups"] + row["curriculum/gated_groups"]
        found[row["step"]] = row["step"] * groups_per_step + round(dropped)
    return found


def groups_to(curve: list[list[float]], target: float, groups: dict[int, int]) -> int | None:
    """Groups until the first of two evaluations in a row at or above the target (the last one stands alone); None if
    it was never reached."""
    for i, (step, success, _) in enumerate(curve):
        if success >= target and all(later[1] >= target for later in curve[i : i + IN_A_ROW]):
            return groups[int(step)]
    return None


def measure_side(args: argparse.Namespace, side: str, seed: int) -> dict[str, Any]:
    folder = train(args, side, seed)
    curve = read_curve(folder)
    groups = ended_by_step(folder, groups_per_step(folder))
    target = curve[0][1] + GAIN
    reached = groups_to(curve, target, groups)
    return {
        "sampler": side,
        "seed": seed,
        "target": round(target, 4),
        "groups": reached if reached is not None else max(groups.values()),
        "reached": reached is not None,
        "curve": [[groups[int(step)], success, n] for step, success, n in curve],
    }


def groups_per_step(folder: Path) -> int:
    from conf.loading import read_config

    return read_config((folder / "config.yaml").read_text()).rollout.groups_per_step


def command_of(args: argparse.Namespace) -> str:
    """What to type to repeat it, without folders."""
    own = ("env", "seeds", "steps", "max_level", "every", "tasks", "final_tasks", "levels")
    options = [f"--{name.replace('_', '-')} {shlex.quote(str(getattr(args, name)))}" for name in own]
    return " ".join(["shoal bench curriculum", *options, f"--warm {args.warm.name}", *args.overrides])


def compare(sides: list[dict[str, Any]]) -> float:
    """Median over seeds of groups of levels / groups of uniform; a seed whose levels never arrive counts as infinite
    (here: 10), for its count is only a lower bound."""
    ratios = []
    for seed in sorted({side["seed"] for side in sides}):
        by = {side["sampler"]: side for side in sides if side["seed"] == seed}
        ratios.append(by["levels"]["groups"] / by["uniform"]["groups"] if by["levels"]["reached"] else 10.0)
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--env", default="calculator", help="a conf group")
    parser.add_argument("--warm", type=Path, required=True, help="weights of the warm start for all levels")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--max-level", type=int, default=5)
    parser.add_argument("--every", type=int, default=5, help="steps between evaluations")
    parser.add_argument("--tasks", type=int, default=150, help="held-out problems of an evaluation during training")
    parser.add_argument("--final-tasks", type=int, default=400, help="of the first and the last")
    parser.add_argument("--root", type=Path, default=CHECKOUT / "runs" / "bench-curriculum")
    parser.add_argument("--levels", default="", help="settings of levels alone, e.g. 'curriculum.promote=0.5'")
    parser.add_argument("overrides", nargs="*", help="settings of both sides, e.g. engine.max_model_tokens=384")
    args = parser.parse_args()
    args.warm, args.root = args.warm.absolute(), args.root.absolute()
    sides = []
    for seed in map(int, args.seeds.split(",")):
        for side in SIDES:
            sides.append(measure_side(args, side, seed))
            print(json.dumps(sides[-1]), file=sys.stderr, flush=True)
    ratio = compare(sides)
    earlier = json.loads(RESULT.read_text()) if RESULT.exists() else {"ratios": {}, "figures": {}}
    key = f"levels_over_uniform_{args.env}"
    result = {
        "name": "curriculum",
        "ratios": earlier["ratios"] | {key: round(ratio, 3)},
        "figures": earlier["figures"]
        | {args.env: {"limit": LIMIT, "met": ratio <= LIMIT, "command": command_of(args), "sides": sides}},
        "machine": describe_machine(),
        "paired": True,
    }
    save_result(RESULT, result)
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"{args.env}: levels needs {ratio:.2f} of uniform's groups to the warm start's success at level {LEVEL} "
            f"+ {GAIN} (limit {LIMIT})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
