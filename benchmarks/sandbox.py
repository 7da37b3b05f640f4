"""How long running a line of untrusted code takes in each kind of sandbox, beside a bare subprocess.

    shoal bench sandbox [--runs 200] [--json] [--output FILE]

`start_ms` is the whole of one run as a caller sees it: send `1 + 1`, fork, confine, run, reply, clean up. The jail
keeps its zygotes, bubblewrap starts anew for every run. `open_ms` is paid once in a process. `subprocess` is
`python -I -S -c 1+1` without any isolation. Kinds take turns, run by run; one that cannot work here is left out.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from envs.sandbox.limits import SandboxUnavailable
from envs.sandbox.sandbox import Sandbox, open_sandbox
from envs.worker_thread import run_sync

RESULT = Path(__file__).parent / "results" / "sandbox.json"
KINDS = ("jail", "bwrap", "none")
BATCH = 32
_TIMEOUT_S = 60.0


def milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered) * 1e3, 2),
        "min": round(ordered[0] * 1e3, 2),
        "p95": round(ordered[int(0.95 * len(ordered))] * 1e3, 2),
    }


def timed(sandbox: Sandbox | None) -> float:
    started = time.perf_counter()
    if sandbox is None:
        subprocess.run([sys.executable, "-I", "-S", "-c", "1+1"], check=True, timeout=_TIMEOUT_S)
    else:
        assert run_sync(sandbox.run("1 + 1"), _TIMEOUT_S).value == 2
    return time.perf_counter() - started


def throughput(sandbox: Sandbox) -> float:
    """Runs a second where many ask at once."""

    async def batch() -> None:
        await asyncio.gather(*(sandbox.run("1 + 1") for _ in range(BATCH)))

    started = time.perf_counter()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, batch()).result(_TIMEOUT_S)
    return round(BATCH / (time.perf_counter() - started), 1)


def measure(runs: int) -> dict[str, Any]:
    opened: dict[str, Sandbox | None] = {"subprocess": None}
    figures: dict[str, Any] = {}
    for kind in KINDS:
        started = time.perf_counter()
        try:
            opened[kind] = open_sandbox(kind)
        except SandboxUnavailable as error:
            print(error, file=sys.stderr)
            continue
        figures[kind] = {"open_ms": round((time.perf_counter() - started) * 1e3, 1)}
    seconds: dict[str, list[float]] = {kind: [] for kind in opened}
    for sandbox in opened.values():
        timed(sandbox)  # the first run starts a zygote
    for _ in range(runs):
        for kind, sandbox in opened.items():
            seconds[kind].append(timed(sandbox))
    for kind, sandbox in opened.items():
        figures.setdefault(kind, {})["start_ms"] = milliseconds(seconds[kind])
        if sandbox is not None:
            figures[kind]["runs_per_second"] = throughput(sandbox)
            sandbox.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=200, help="of each kind")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--output", type=Path, default=RESULT)
    words = parser.parse_args()
    figures = measure(words.runs)
    base = figures["subprocess"]["start_ms"]["median"]
    ratios = {f"{kind}_over_subprocess": round(f["start_ms"]["median"] / base, 2) for kind, f in figures.items()}
    result = {
        "name": "sandbox",
        "ratios": {name: ratio for name, ratio in ratios.items() if not name.startswith("subprocess")},
        "figures": figures,
        "runs": words.runs,
        "machine": describe_machine(),
        "paired": True,
    }
    result = save_result(words.output, result)
    if words.json:
        print(json.dumps(result))
        return
    for kind, found in figures.items():
        print(f"{kind:<12}{found}")


if __name__ == "__main__":
    main()
