"""The demo on vLLM against the demo on the local engine: does it learn as much, and is every token vLLM's?

    shoal bench vllm_demo [--json] [--seed 1] [--words "steps=12 evaluation.final_tasks=200"]

Two runs of `shoal train env=calculator` as `make demo` starts it, with the same seed, engine=local and engine=vllm, one
after the other, in a folder that is removed again. `met`: the held-out success of vLLM lies within the interval of the
local engine's or above it, and all stored rows, training and held-out ones, were sampled by vLLM.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from rl.runs.run_folder import RunFolder
from rollout.record.recorder import TrajectoryReader

CHECKOUT = Path(__file__).resolve().parent.parent
RESULT = Path(__file__).parent / "results" / "vllm_demo.json"
RUN_TIMEOUT_S = 1500.0
"""The whole demo is promised within this on two cores."""
SCHEDULE = "learner.optimizer.schedule=cosine"
"""As in the Makefile."""


def train(root: Path, engine: str, seed: int, words: list[str]) -> dict[str, Any]:
    """What a finished run leaves. Raises RuntimeError where it fails."""
    own = [f"engine={engine}", f"seed={seed}", f"run.root={root / engine}", "monitor.wandb=disabled"]
    command = [sys.executable, "-m", "rl.cli", "train", "env=calculator", SCHEDULE, *own, *words]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"engine={engine} ended with status {done.returncode}: {done.stderr[-2000:]}")
    folder = RunFolder.resolve(root / engine, "latest")
    summary = json.loads(folder.summary.read_text())
    with TrajectoryReader(folder.trajectories) as reader:
        rows = reader.list(limit=10_000_000)
    kept = ("success_before", "success_after", "ci95", "n", "train_seconds")
    return {name: summary[name] for name in kept} | {
        "rows": len(rows),
        "engines": sorted({row["engine"] for row in rows if row["num_sampled_tokens"]}),
    }


def is_met(local: dict[str, Any], vllm: dict[str, Any]) -> bool:
    return vllm["success_after"] >= local["ci95"][0] and vllm["engines"] == ["vllm"] and local["engines"] == ["local"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--words", default="", help="further settings of both runs; nothing is written then")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-demo-") as root:
        found = {name: train(Path(root), name, args.seed, args.words.split()) for name in ("local", "vllm")}
    met = is_met(found["local"], found["vllm"])
    result = {"name": "vllm_demo", "figures": found, "met": met, "machine": describe_machine()}
    if not args.words:
        save_result(RESULT, result)
    print(json.dumps(result) if args.json else json.dumps(found, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
