"""The dashboard on a run far larger than usual, by a real browser; and what it costs a run to be watched.

    shoal bench dashboard [--pairs 4] [--steps 60] [--only scale|cost] [--json]

Scale: a run folder of 25,000 steps with 40 metrics, 100,000 trajectories and one more of 200 MB, written by the code
that writes real ones. A fresh server and a fresh browser open its overview (cold), then every view that the page's own
navigation offers, a search that finds nothing, and the large trajectory. The first chart is a sketch by the page's own
code, `first_library_chart_s` the same one drawn by the chart library: marks of the page in a browser that is left alone
until it has drawn. `driven` are the same two under Playwright, whose debugger has the library parsed again. A view's
time is from the click to its last chart or row. Server memory is its highest resident size.

Cost: pairs of the same short training, one of them watched by one page, in alternating order. `server_cpu_share` is the
server's CPU seconds over the run's; `slowdown` is watched over unwatched time, with a 95% t interval over the pairs.
`parts` tells when each was measured, on which machine and beside which load.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result

FOLDER = Path(__file__).resolve().parent
RUN = "large-run"
STEPS, TRAJECTORIES, GROUP_SIZE, LARGE_BYTES = 25_000, 100_000, 8, 200 * 10**6
METRICS = (
    *("reward/mean", "reward/bench", "group/frac_mixed", "group/frac_all_good", "group/frac_all_bad"),
    *("off_policy/lag/mean", "off_policy/lag/max", "policy/mismatch_kl/mean", "policy/mismatch_kl/max"),
    *("policy/ess_ratio", "policy/importance_ratio/mean", "policy/importance_ratio/max", "loss/policy"),
    *("policy/entropy", "optim/grad_norm", "policy/clip_fraction", "policy/kl", "optim/lr", "advantage/std"),
    *("trainer/tok_s", "trainer/tokens", "rollout/episodes_s", "rollout/busy_s", "time/trainer_idle_ratio"),
    *("time/step", "time/wait_for_batch", "time/forward_backward", "time/sync", "time/checkpoint", "time/other"),
    *("queue/ready_groups", "queue/in_flight", "queue/oldest_age_s", "episode/turns/mean", "episode/tokens/mean"),
    *("tool/calls_mean", "tool/error_ratio", "stop/terminated", "env/error_ratio", "workers/healthy"),
)
TRAIN = (
    *("train", "env=calculator", "cluster=inprocess", "evaluation.every=0", "evaluation.final_tasks=4"),
    *("monitor.wandb=disabled", "monitor.progress=false", "policy.init=random", "learner.self_check_tolerance=1e9"),
)
SIZE = {"metric_points": STEPS * len(METRICS), "trajectories": TRAJECTORIES + 1, "largest_bytes": LARGE_BYTES}
SETTLE_S, ALONE_S = 2.0, 8.0
"""A browser is given the first to start, and the second to draw before somebody looks."""
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Two-sided 95% quantile of Student's t by degrees of freedom."""


# --- a large run ------------------------------------------------------------------------------------------------------


def make_large_run(root: Path) -> None:
    """A finished run named RUN under `root`, in the layout of today."""
    from rl.runs.run_folder import RunFolder

    folder = RunFolder.create(root, "bench", "tiny", name=RUN)
    folder.write_config("seed: 1\nsteps: 25000\npolicy:\n  dialect: tiny\nrollout:\n  max_staleness: 2\n")
    rng = np.random.default_rng(0)
    with folder.metrics.open("w") as file:
        for step, values in enumerate(rng.random((STEPS, len(METRICS))).round(6).tolist(), start=1):
            row = {"kind": "step", "step": step, "policy_version": step, "time_s": step * 2.0}
            file.write(json.dumps(row | dict(zip(METRICS, values, strict=True))) + "\n")
    with folder.events.open("w") as file:
        for n in range(5_000):
            file.write(json.dumps({"kind": "checkpoint", "time_s": n * 10.0, "step": n * 5}) + "\n")
    with folder.spans.open("w") as file:
        for n in range(50_000):
            span = {"process": f"worker-{n % 4}", "activity": "generate", "start_s": n * 1.0, "end_s": n + 0.9}
            file.write(json.dumps(span) + "\n")
    (folder.logs / "worker-0.log").write_text("a line of a log, as long as they are\n" * 200_000)
    _write_trajectories(folder.trajectories)
    _write_ledger(folder.ledger)


def _write_trajectories(path: Path) -> None:
    """One real row, copied by SQL, and the large one."""
    import sqlite3

    from rollout.record.recorder import Recorder

    recorder = Recorder(path)
    recorder.write([_group("train/bench/0", num_tokens=100, num_chars=400)])
    recorder.flush(60.0)
    recorder.close()
    db = sqlite3.connect(path)
    columns = [str(row[1]) for row in db.execute("PRAGMA table_info(trajectories)") if row[1] != "row"]
    changed = {
        "id": f"'train/bench/' || (n / {GROUP_SIZE}) || '/' || (n % {GROUP_SIZE})",
        "group_id": f"'train/bench/' || (n / {GROUP_SIZE})",
        "member": f"n % {GROUP_SIZE}",
        "reward": "(n * 7919 % 1000) / 1000.0",
        "worker": "'worker-' || (n % 4)",
        "status": "CASE WHEN n < 90000 THEN 'consumed' ELSE 'committed' END",
        "step": "CASE WHEN n < 90000 THEN n / 32 + 1 END",
    }
    picked = ", ".join(changed.get(name, name) for name in columns)
    with db:
        db.execute(
            f"WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {TRAJECTORIES - 1}) "
            f"INSERT INTO trajectories ({', '.join(columns)}) "
            f"SELECT {picked} FROM numbers, (SELECT * FROM trajectories WHERE row = 1)"
        )
    db.close()
    recorder = Recorder(path)
    tokens = 10**6
    recorder.write([_group("train/bench/large", num_tokens=tokens, num_chars=LARGE_BYTES - 17 * tokens)])
    recorder.close(deadline_s=300.0)


def _group(group_id: str, *, num_tokens: int, num_chars: int) -> Any:
    from envs.message import Message, TextPart
    from envs.task import Task
    from rollout.record.trajectory import StopReason, Trajectory, TrajectoryGroup, Turn

    task = Task(task_id=group_id, env_id="Bench-v0", env_name="bench", seed=1, level=1)
    said = Message(role="assistant", content=(TextPart(text="x" * num_chars),))
    sampled = np.ones(num_tokens, np.uint8)
    sampled[0] = 0
    trajectory = Trajectory(
        trajectory_id=f"{group_id}/0",
        group_id=group_id,
        task=task,
        member=0,
        token_ids=np.full(num_tokens, 65, np.int32),
        loss_mask=sampled,
        rollout_logprobs=np.where(sampled == 1, -1.0, 0.0).astype(np.float32),
        policy_versions=np.where(sampled == 1, 0, -1).astype(np.int32),
        turns=(Turn(start=1, end=num_tokens, message=said),),
        prompt=(Message(role="user", content=(TextPart(text="say x"),)),),
        reward=1.0,
        stop_reason=StopReason.TERMINATED,
        temperature=1.0,
        worker="worker-0",
        seconds=2.0,
        env_seconds=0.5,
    )
    return TrajectoryGroup(group_id=group_id, task=task, attempt=1, trajectories=(trajectory,))


def _write_ledger(path: Path) -> None:
    from envs.task import Task
    from rollout.record.ledger import Ledger

    ledger = Ledger(path)
    names = [f"train/bench/{n}" for n in range(TRAJECTORIES // GROUP_SIZE)]
    with ledger.batch():
        ledger.issue([Task(task_id=name, env_id="Bench-v0", env_name="bench", seed=1, level=1) for name in names])
        for number, name in enumerate(names):
            ledger.commit(name, ledger.lease(name, "worker-0", 60.0), "digest")
            if number < 90_000 // GROUP_SIZE:
                ledger.consume([name], step=number // 4 + 1)
    ledger.close()


# --- a server and a browser -------------------------------------------------------------------------------------------


@contextmanager
def dashboard(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`shoal dash` over `root`, and its address."""
    command = [sys.executable, "-m", "rl.cli", "dash", "--root", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parent)
    try:
        assert server.stdout is not None
        yield server, server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait(10)


def chromium_path() -> str:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("this benchmark needs Chromium: apt-get install chromium")
    return chromium


@contextmanager
def browser_page() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def marks_of(address: str) -> dict[str, float]:
    """Seconds from a new tab's navigation to the page's first mark of each name, in a browser that nobody drives."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(prefix="shoal-browser-") as profile:
        flags = ("--headless=new", "--no-sandbox", "--remote-debugging-port=0", "--window-size=1400,900")
        words = [chromium_path(), *flags, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            place = Path(profile, "DevToolsActivePort")
            for _ in range(200):
                if place.exists():
                    break
                time.sleep(0.1)
            time.sleep(SETTLE_S)  # its own start is not measured
            port = place.read_text().split()[0]
            opening = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?{quote(address)}", method="PUT")
            urllib.request.urlopen(opening, timeout=30).close()
            time.sleep(ALONE_S)
            with sync_playwright() as playwright:
                pages = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{port}").contexts[0].pages
                page = next(each for each in pages if each.url.startswith(address.partition("#")[0]))
                marks = page.evaluate("performance.getEntriesByType('mark').map((m) => [m.name, m.startTime])")
        finally:
            browser.kill()
            browser.wait(10)
    return {name: round(at / 1000, 3) for name, at in reversed(marks)}


def time_to(page: Any, address: str, condition: str, deadline_s: float = 60.0) -> float:
    """Seconds from asking for `address` until a JavaScript condition holds in the page."""
    started = time.perf_counter()
    page.goto(address, wait_until="commit")  # a chart is seen before everything is loaded
    while not page.evaluate(condition):
        if time.perf_counter() - started > deadline_s:
            raise SystemExit(f"{address} took longer than {deadline_s:g} s")
        time.sleep(0.01)
    return round(time.perf_counter() - started, 3)


READY = "document.getElementById('view')?.dataset.ready === (location.hash || '#/')"
CHART = "document.querySelector('.chart .trace') !== null"
LIBRARY_CHART = "document.querySelector('.chart .plot-container .trace') !== null"


def measure_scale(root: Path) -> dict[str, Any]:
    """Seconds of the first chart and of every view, and the server's highest resident MB."""
    with dashboard(root) as (server, address):
        alone = marks_of(f"{address}#/run/{RUN}/overview")
    with dashboard(root) as (server, address), browser_page() as page:
        started = time.perf_counter()
        first = time_to(page, f"{address}#/run/{RUN}/overview", CHART)
        while not page.evaluate(LIBRARY_CHART):
            time.sleep(0.01)
        by_library = round(time.perf_counter() - started, 3)
        views = {"runs": time_to(page, f"{address}#/", READY)}
        views["overview"] = time_to(page, f"{address}#/run/{RUN}/overview", READY)
        hashes = [link.get_attribute("href") for link in page.locator("#nav a").all()]
        places = {name.split("/")[3]: name for name in hashes if name and name.startswith(f"#/run/{RUN}/")}
        del places["overview"]  # it is open: the same address again would show nothing
        places |= {
            "trajectories, text that is nowhere": f"#/run/{RUN}/trajectories?text=nowhere",
            "trajectories, reward of none": f"#/run/{RUN}/trajectories?min_reward=2",
            "trajectory of 200 MB": f"#/run/{RUN}/trajectory/{TRAJECTORIES + 1}",
            "its tokens": f"#/run/{RUN}/tokens/{TRAJECTORIES + 1}?offset=900000",
        }
        views |= {name: time_to(page, address + place, READY) for name, place in places.items()}
        return {
            "first_chart_s": alone["sketch"],
            "first_library_chart_s": alone["chart"],
            "driven": {"first_chart_s": first, "first_library_chart_s": by_library},
            "views_s": views,
            "server_peak_mb": _peak_mb(server.pid),
        }


def _peak_mb(pid: int) -> float:
    line = next(row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmHWM"))
    return round(int(line.split()[1]) / 1000, 1)


def _cpu_s(pid: int) -> float:
    """User and system seconds of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- what a watched run costs -----------------------------------------------------------------------------------------


def measure_cost(root: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Pairs of one training, watched and not, the first of each pair taking turns. The browser is on this machine, too:
    the slow-down counts what it takes from the run; the share counts the server alone."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for pair in range(pairs):
        for watched in (True, False) if pair % 2 else (False, True):
            took_s, run_cpu_s, server_cpu_s = _train(root / f"pair-{pair}-{watched}", watched, steps)
            seconds[watched].append(took_s)
            if watched:
                shares.append(server_cpu_s / run_cpu_s)
    logs = [math.log(a / b) for a, b in zip(seconds[True], seconds[False], strict=True)]
    mean, half = statistics.mean(logs), T_975[pairs - 1] * statistics.stdev(logs) / math.sqrt(pairs)
    return {
        "pairs": pairs,
        "steps": steps,
        "server_cpu_share": round(statistics.mean(shares), 4),
        "server_cpu_share_worst": round(max(shares), 4),
        "slowdown": round(math.exp(mean), 3),
        "slowdown_ci95": [round(math.exp(mean - half), 3), round(math.exp(mean + half), 3)],
        "watched_s": [round(value, 2) for value in seconds[True]],
        "unwatched_s": [round(value, 2) for value in seconds[False]],
    }


def _train(root: Path, watched: bool, steps: int) -> tuple[float, float, float]:
    """(seconds, CPU seconds of the run, CPU seconds of the server) while a page shows the run's overview."""
    root.mkdir()
    command = [sys.executable, "-m", "rl.cli", *TRAIN, f"steps={steps}", f"run.root={root}", "run.name=short"]
    if not watched:
        return (*_timed(command), 0.0)
    with dashboard(root) as (server, address), browser_page() as page:
        page.goto(address)  # the page and the library are loaded before the run begins
        before = _cpu_s(server.pid)
        took_s, cpu_s = _timed(command, lambda: _watch(page, address, root / "short" / "metrics.jsonl"))
        return took_s, cpu_s, _cpu_s(server.pid) - before


def _watch(page: Any, address: str, metrics: Path) -> None:
    deadline = time.monotonic() + 60
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    page.goto(f"{address}#/run/short/overview")


def _timed(command: list[str], meanwhile: Any = None) -> tuple[float, float]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=FOLDER.parent)
    if meanwhile:
        meanwhile()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """One part and its conditions; the machine's load is that of the minute before."""
    utc = datetime.now(UTC).isoformat(timespec="minutes")
    return {"utc": utc, "machine": describe_machine(), "figures": measure()}


def joined(earlier: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is written. A part that was not measured stays as `earlier` has it, with its machine and its time."""
    figures, ratios, conditions = ({**earlier.get(name, {})} for name in ("figures", "ratios", "parts"))
    for name, part in parts.items():
        figures |= part["figures"]
        ratios |= {key: part["figures"][key] for key in ("server_cpu_share", "slowdown") if key in part["figures"]}
        conditions[name] = {"utc": part["utc"], "machine": part["machine"]}
    newest = max(conditions.values(), key=lambda part: part["utc"])
    return {
        "name": "dashboard",
        "ratios": ratios,
        "figures": figures,
        "machine": newest["machine"],
        "parts": conditions,
        "paired": "slowdown" in ratios,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    pairs = (0, *range(2, 11))
    parser.add_argument("--pairs", type=int, default=4, choices=pairs, help="of runs; 0 = scale alone; default: 4")
    parser.add_argument("--steps", type=int, default=60, help="learner steps of each run; default: 60")
    parser.add_argument("--only", choices=["scale", "cost"], help="of the two; the other keeps its figures")
    parser.add_argument("--output", type=Path, default=FOLDER / "results" / "dashboard.json")
    parser.add_argument("--json", action="store_true", help="the result as the last line of output")
    arguments = parser.parse_args(argv)
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.only != "cost":
            (root / "large").mkdir()
            make_large_run(root / "large")
            parts["scale"] = measured(lambda: SIZE | measure_scale(root / "large"))
        if arguments.pairs and arguments.only != "scale":
            parts["cost"] = measured(lambda: measure_cost(root, arguments.pairs, arguments.steps))
    is_other_kept = arguments.only and arguments.output.exists()
    result = joined(json.loads(arguments.output.read_text()) if is_other_kept else {}, parts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_result(arguments.output, result)
    print(json.dumps(result) if arguments.json else json.dumps(result["figures"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
