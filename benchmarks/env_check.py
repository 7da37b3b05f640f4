"""Does every built-in environment keep its promises at its lowest, its middle and its highest level, over 20 seeds?

    shoal bench env_check [--json] [--only Calculator-v0,ShopDB-v0] [--seeds 20] [--output FILE]

Runs `shoal env check` on each, at levels 0, 5 and 9: a probe for each way in which environments have been seen to break
their promises. The result has each environment's probes, what a failed one saw, and the seconds. The exit code is 1
where a probe failed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: benchmarks/envs.py would be imported as `envs`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from envs.registry import BUILT_IN
from rl.cli.environments.env_check import check

RESULT = Path(__file__).parent / "results" / "env_check.json"
LEVELS = (0, 5, 9)
NUM_SEEDS = 20


def checked(env_id: str, num_seeds: int) -> dict[str, Any]:
    started = time.monotonic()
    report = check(env_id, levels=LEVELS, num_seeds=num_seeds)
    return {
        "passed": report.passed,
        "seconds": round(time.monotonic() - started, 1),
        "probes": {
            result.probe.name: {"passed": result.failure is None, "seconds": round(result.seconds, 2)}
            for result in report.results
        },
        "failures": {
            name: {"seed": failure.seed, "level": failure.level, "seen": failure.seen}
            for name, failure in report.failures.items()
        },
    }


def measure(env_ids: list[str], num_seeds: int) -> dict[str, Any]:
    environments: dict[str, dict[str, Any]] = {}
    for env_id in env_ids:
        environments[env_id] = checked(env_id, num_seeds)
        words = "passed" if environments[env_id]["passed"] else f"FAILED {environments[env_id]['failures']}"
        print(f"{env_id:<16}{environments[env_id]['seconds']:>7} s  {words}", file=sys.stderr, flush=True)
    figures = {
        "levels": LEVELS,
        "seeds": num_seeds,
        "passed": sum(found["passed"] for found in environments.values()),
        "checked": len(environments),
        "environments": environments,
    }
    return {"name": "env_check", "ratios": {}, "figures": figures, "machine": describe_machine(), "paired": False}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--only", default=",".join(BUILT_IN), help="comma-separated ids")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="of each level")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = measure(args.only.split(","), args.seeds)
    save_result(args.output, result)
    figures = result["figures"]
    print(json.dumps(result) if args.json else f"{figures['passed']} of {figures['checked']} environments passed")
    return 0 if figures["passed"] == figures["checked"] else 1


if __name__ == "__main__":
    sys.exit(main())
