"""What asynchrony brings when tools are slow: the demo's training with max_staleness=2 against max_staleness=0.

    shoal bench async [--json] [--steps 50] [--pairs 2] [--words "KEY=VALUE ..."]

Both sides are the demo's config on the same machine; only the bound differs, and both wait for tools whose latency is
lognormal (median 150 ms, sigma 1; each call waits its own). The synchronous side keeps all its episodes in flight at
once. Sides alternate.
Throughput: sampled tokens of consumed trajectories per second, from the end of step 2 to the end of the last step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

RESULT = Path(__file__).parent / "results" / "async.json"
WARM_UP_STEPS = 2


def run_side(staleness: int, words: Sequence[str], *, steps: int, seed: int, root: Path) -> dict[str, Any]:
    """One training in processes of its own; what its metrics say."""
    subprocess.run(
        [
            *(sys.executable, "-m", "rl.cli", "train", "env=calculator", f"seed={seed}", f"steps={steps}"),
            *("env.kwargs.latency_median_s=0.15", "env.kwargs.latency_sigma=1.0"),
            *(f"rollout.max_staleness={staleness}", "evaluation.every=0", f"run.root={root}", "monitor.wandb=disabled"),
            *words,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).resolve().parent.parent,
    )
    folder = root / "latest"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["kind"] == "step"]
    steady = rows[WARM_UP_STEPS:]
    seconds = steady[-1]["time_s"] - rows[WARM_UP_STEPS - 1]["time_s"]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "max_staleness": staleness,
        "seed": seed,
        "tokens_per_second": sum(row["trainer/tok_s"] * row["time/step"] for row in steady) / seconds,
        "seconds_per_step": seconds / len(steady),
        "trainer_idle_ratio": sum(row["time/wait_for_batch"] for row in steady) / seconds,
        "rollout_idle_ratio": 1 - sum(row["rollout/busy_s"] or 0.0 for row in steady) / seconds,  # None: counted later
        "observed_staleness_max": max(row["off_policy/lag/max"] for row in rows),
        "observed_staleness_mean": statistics.fmean(row["off_policy/lag/mean"] for row in steady),
        "success_after": summary["success_after"],
        "ci95": summary["ci95"],
        "n": summary["n"],
    }


def measure(steps: int, pairs: int, words: Sequence[str] = ()) -> dict[str, Any]:
    sides: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for pair in range(pairs):
            for staleness in (0, 2):
                sides.append(run_side(staleness, words, steps=steps, seed=pair + 1, root=Path(root)))
                print(json.dumps(sides[-1]), file=sys.stderr, flush=True)
    ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in zip(sides[::2], sides[1::2], strict=True)]
    overlap = all(
        a["ci95"][0] <= b["ci95"][1] and b["ci95"][0] <= a["ci95"][1]
        for a, b in zip(sides[::2], sides[1::2], strict=True)
    )
    return {
        "name": "async",
        "ratios": {"async_over_sync": statistics.median(ratios)},
        "figures": {"per_pair": ratios, "reward_intervals_overlap": overlap, "steps": steps, "sides": sides},
        "machine": describe_machine(),
        "paired": True,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--words", default="", help="settings of both sides, e.g. 'evaluation.final_tasks=8'")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = measure(args.steps, args.pairs, args.words.split())
    save_result(args.output, result)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"async over sync, trained tokens/s: {result['ratios']['async_over_sync']:.2f}x  ({args.output.name})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
