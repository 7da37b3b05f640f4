"""A run on vLLM whose engine process is killed again and again while it samples: is anything lost, doubled or stale?

    shoal bench vllm_kills [--json] [--kills 20] [--process inproc|core]

`shoal train engine=vllm` with one worker, in a folder that is removed again. Each time the process that computes is
back and a step has been trained since, it gets SIGKILL, at a random moment of the next second: the worker's, or with
`--process core` that of vLLM's core, a child of it. Afterwards the ledger and the stored rows are counted.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import read_audit
from rollout.record.recorder import TrajectoryReader

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
GROUPS_PER_STEP, GROUP_SIZE, MAX_STALENESS = 2, 4, 2
STEPS_PER_KILL, STEPS_AFTER = 6, 3
"""More than a worker trains between its return and its next end, so that the run is not over before the last one."""
TRANSPORTS = {"inproc": "objects", "core": "files"}
RESTART_S = 400.0
"""A killed process is replaced, imports vLLM, is given weights and has a step trained by then."""


def train(root: Path, kills: int, process: str = "inproc") -> RunFolder:
    """The folder of a finished run that lost its engine `kills` times. Raises RuntimeError where it fails."""
    words = (
        "engine=vllm", f"engine.vllm.process={process}", f"engine.vllm.transport={TRANSPORTS[process]}",
        f"steps={STEPS_PER_KILL * kills + STEPS_AFTER}",
        "rollout.workers=1", "seed=3",
        f"rollout.groups_per_step={GROUPS_PER_STEP}", f"rollout.group_size={GROUP_SIZE}",
        f"rollout.max_staleness={MAX_STALENESS}", "env.kwargs.latency_median_s=0.2", "cluster.heartbeat_s=1",
        "evaluation.every=0", "evaluation.final_tasks=8", "monitor.wandb=disabled", f"run.root={root}",
    )  # fmt: skip
    with (root / "output.txt").open("w+") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "rl.cli", "train", *words], cwd=CHECKOUT, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            folder = kill_while_sampling(root, kills, process)
            run.wait(timeout=2 * RESTART_S)
        finally:
            run.kill()
        if run.returncode:
            output.seek(0)
            raise RuntimeError(f"the run ended with status {run.returncode}: {output.read()[-2000:]}")
    return folder


def core_of(worker_pid: int) -> int:
    """The process of vLLM's core, a child of a worker."""
    for line in subprocess.check_output(["ps", "-o", "pid=,args=", "--ppid", str(worker_pid)], text=True).splitlines():
        pid, _, args = line.strip().partition(" ")
        if "EngineCore" in args:
            return int(pid)
    raise RuntimeError(f"worker {worker_pid} has no core of its own")


def kill_while_sampling(root: Path, kills: int, process: str) -> RunFolder:
    """SIGKILL to each life of the engine, at a random moment of the second after the first step since its return."""
    rng = random.Random(0)
    folder = None
    for killed in range(kills):
        until = time.monotonic() + RESTART_S
        back_at = None  # the step at which this life began to serve; groups from before its end may be trained later
        while folder is None or back_at is None or folder.state().step <= back_at:
            if time.monotonic() > until:
                raise RuntimeError(f"no step was trained in {RESTART_S:.0f} s after kill {killed}")
            time.sleep(0.1)
            if not (root / "latest" / "run.json").exists():
                continue
            folder = RunFolder.resolve(root, "latest")
            if back_at is None and len(times_of(folder, "worker_restarted")) == killed:
                back_at = folder.state().step
        time.sleep(rng.random())
        pid = int((folder.logs / "worker-0.lives").read_text().split()[-1])
        os.kill(core_of(pid) if process == "core" else pid, signal.SIGKILL)
    assert folder is not None
    return folder


def times_of(folder: RunFolder, kind: str) -> list[float]:
    """Of the run's events of a kind."""
    written = folder.events.read_text().rpartition("\n")[0] if folder.events.exists() else ""
    events = [json.loads(line) for line in written.splitlines()]
    return [event["time_s"] for event in events if event["kind"] == kind]


def count(folder: RunFolder) -> dict[str, Any]:
    """What became of the groups, and how long a worker was away."""
    audit = read_audit(folder.ledger)
    with TrajectoryReader(folder.trajectories) as reader:
        rows = reader.list(limit=100_000)
    trained = [row for row in rows if row["status"] == "consumed"]
    members = {(row["group_id"], row["member"]) for row in trained}
    lag = [row["step"] - 1 - row["min_version"] for row in trained if row["num_sampled_tokens"]]
    lost, back = times_of(folder, "worker_lost"), times_of(folder, "worker_restarted")
    steps = folder.state().step
    return {
        "kills": len(lost),
        "steps": steps,
        "groups_leased_again": audit["redispatched"],
        "lost": steps * GROUPS_PER_STEP * GROUP_SIZE - len(members),
        "doubled": len(trained) - len(members),
        "stale": sum(not 0 <= value <= MAX_STALENESS for value in lag),
        "engines": sorted({row["engine"] for row in rows}),
        "ledger_balanced": audit["balanced"],
        "recovery_s": {
            "median": round(statistics.median(b - a for a, b in zip(lost, back, strict=True)), 1),
            "max": round(max(b - a for a, b in zip(lost, back, strict=True)), 1),
        },
    }


def is_intact(found: dict[str, Any]) -> bool:
    return found["ledger_balanced"] and not (found["lost"] or found["doubled"] or found["stale"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--kills", type=int, default=20, help="at most 20, the restarts of a worker")
    parser.add_argument("--process", choices=["inproc", "core"], default="inproc")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="shoal-kills-") as root:
        found = count(train(Path(root), args.kills, args.process))
    name = "vllm_kills" if args.process == "inproc" else "vllm_kills_core"
    met = is_intact(found) and found["kills"] == args.kills
    result = {"name": name, "figures": found, "met": met, "machine": describe_machine()}
    save_result(RESULTS / f"{name}.json", result)
    print(json.dumps(result) if args.json else json.dumps(found, indent=2))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
