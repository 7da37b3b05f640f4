"""The page beside a real training: what it shows is recomputed here from the stored rows, by code of its own.

The run is that of `make demo`, with its Ray processes, made small. It goes on while every view is opened, so what grows
is compared with the rows before and after the look; what is trained already stays, and is compared exactly.
"""

import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.rl.dashboard_runs import save_picture, start_server, until

pytestmark = pytest.mark.browser

RUN = "live-run"
TRAIN = (
    *("env=calculator", "seed=1", "learner.optimizer.schedule=cosine"),  # as in the Makefile
    "env.id=tests.envs.chatty_env:Chatty",  # the same, and its process has a log
    *("rollout.groups_per_step=4", "rollout.group_size=4", "steps=100000", "evaluation.every=10", "evaluation.tasks=8"),
    *("evaluation.final_tasks=8", "monitor.wandb=disabled", "monitor.progress=false", f"run.name={RUN}"),
)
FIRST_STEPS = 60 if os.environ.get("SHOAL_SCREENSHOTS") else 2
"""Before anybody looks: pictures show a curve."""
STOPPED = 130
"""Exit code of a run that Ctrl-C ended after a whole step."""
LATE_S = 2.0
"""A metric is on the page this long after it was written, at most."""
POINTS = "Number(document.querySelector(\"[data-keys^='reward/mean']\")?.dataset.points || 0)"
READY = "document.getElementById('view').dataset.ready === (location.hash || '#/')"
LOST_SERVER = r"Failed to load resource: net::ERR_(CONNECTION_REFUSED|CONNECTION_RESET|INCOMPLETE_CHUNKED_ENCODING)"
"""What the browser says of each attempt to reach a killed server."""

Visit = Callable[..., str]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_the_page_follows_a_live_run_through_a_killed_server_and_every_view_shows_its_rows(
    page: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / RUN
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    command = [sys.executable, "-m", "rl.cli", "train", *TRAIN, f"run.root={tmp_path}"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    server, address = start_server(tmp_path)
    outside: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    try:
        _wait(lambda: len(_steps(folder)) >= FIRST_STEPS, run, deadline_s=200.0 + 2.0 * FIRST_STEPS)
        page.goto(f"{address}#/run/{RUN}/overview")
        until(page, "document.getElementById('live').textContent === 'live'")
        assert max(_update_seconds(page, folder, run) for _ in range(3)) <= LATE_S
        _check_every_view(page, address, folder, run)
        assert problems == []

        page.goto(f"{address}#/run/{RUN}/overview")
        until(page, "document.getElementById('live').textContent === 'live'")
        server.send_signal(signal.SIGKILL)
        server.wait(10)
        until(page, "document.getElementById('live').textContent === 'reconnecting'")
        assert run.poll() is None, "the run was to outlive the server"
        server, again = start_server(tmp_path, port=int(address.rsplit(":", 1)[1].strip("/")))
        assert again == address
        have = len(_steps(folder))
        _wait(lambda: len(_steps(folder)) > have, run)
        run.send_signal(signal.SIGINT)  # it would go on for hours: how fast its steps are is the machine's matter
        assert run.wait(90.0) == STOPPED
        steps = _steps(folder)
        until(page, f"{POINTS} === {len(steps)}")
        time.sleep(1.2)  # what came twice would have come by now
        assert page.evaluate(POINTS) == len(steps)
        until(page, "document.getElementById('state').textContent.startsWith('interrupted at step')")
        _check_the_end(page, address, steps)
        assert [problem for problem in problems if not re.fullmatch(LOST_SERVER, problem)] == [] and outside == []
    finally:
        server.kill()
        server.wait(10)
        _end(run)


def _update_seconds(page: Any, folder: Path, run: subprocess.Popen[bytes]) -> float:
    """From a step's line in the file to the chart that has it."""
    have = len(_steps(folder))
    _wait(lambda: len(_steps(folder)) > have, run)
    written = time.monotonic()
    until(page, f"{POINTS} > {have}")
    return time.monotonic() - written


def _check_every_view(page: Any, address: str, folder: Path, run: subprocess.Popen[bytes]) -> None:
    db = sqlite3.connect(folder / "trajectories.db")
    db.row_factory = sqlite3.Row

    def visit(view: str, picture: str = "") -> str:
        page.goto(f"{address}#/run/{RUN}/{view}" if view else f"{address}#/")
        until(page, READY)
        if picture:
            save_picture(page, folder.parent, picture)
        assert run.poll() is None, "the run was to be live"
        return page.inner_text("#view")

    try:
        before = _steps(folder)
        visit("", "runs")
        until(page, "document.getElementById('overlay').data !== undefined")
        shown = page.evaluate("Array.from(document.getElementById('overlay').data[0].y)")
        assert shown == pytest.approx([row["reward/mean"] for row in _steps(folder)[: len(shown)]])
        assert len(before) <= len(shown)
        _check_overview(page, visit, folder, db)
        _check_trajectories(page, visit, db)
        _check_tables(page, visit, folder, db)
        _check_ledger(page, visit, folder, db)
    finally:
        db.close()


def _check_overview(page: Any, visit: Visit, folder: Path, db: sqlite3.Connection) -> None:
    counted = "SELECT COUNT(*), SUM(status = 'consumed') FROM trajectories"
    before, rows, step = db.execute(counted).fetchone(), _lines(folder / "metrics.jsonl"), _state(folder)["step"]
    text = visit("overview", "overview")
    links = page.locator("#view a[href*='status=']").all_inner_texts()
    boxes = "[...document.querySelectorAll('[data-metric]')].map(n => [n.dataset.metric, n.innerText.split('\\n')[0]])"
    shown = dict(page.evaluate(boxes))
    after = db.execute(counted).fetchone()
    found = re.search(r"running at step (\d+)", text)
    assert found and step <= int(found[1]) <= _state(folder)["step"]
    counts = {status: int(n) for n, status in (link.split() for link in links)}
    assert before[0] <= sum(counts.values()) <= after[0] and before[1] <= counts["consumed"] <= after[1]
    for key, value in shown.items():  # each is one of those that were the newest meanwhile
        have = [row[key] for row in rows if key in row]
        newest = [row[key] for row in _lines(folder / "metrics.jsonl") if key in row][max(len(have) - 1, 0) :]
        assert float(value) in [_digits(number, 3) for number in newest], key
    assert len(shown) >= 8
    _check_heat_maps(page, db)


def _check_heat_maps(page: Any, db: sqlite3.Connection) -> None:
    """Shares of staleness in each stretch of steps, and the step that a click on one of them brings."""
    until(page, "document.querySelector('[data-heatmap=staleness]')?.data !== undefined")
    x, y, z = page.evaluate(
        "(() => { const { x, y, z } = document.querySelector('[data-heatmap=staleness]').data[0]; "
        "return [[...x], [...y], z.map((row) => [...row])]; })()"
    )
    lags: dict[int, list[int]] = {}
    sql = "SELECT step, step - 1 - min_version FROM trajectories WHERE status = 'consumed' AND min_version >= 0"
    for step, lag in db.execute(sql):
        lags.setdefault(step, []).append(lag)
    for column, (start, end) in enumerate(pairwise(x)):
        mine = [lag for step, found in lags.items() if start < step < end for lag in found]
        for row, (low, high) in enumerate(pairwise(y)):
            share = sum(low < lag < high for lag in mine) / max(len(mine), 1)
            assert (z[row][column] or 0.0) == pytest.approx(share)


def _check_trajectories(page: Any, visit: Visit, db: sqlite3.Connection) -> None:
    consumed = "SELECT row FROM trajectories WHERE status = 'consumed' ORDER BY row DESC"
    visit("trajectories", "trajectories")
    before = [row["row"] for row in db.execute(consumed)]
    page.select_option("[aria-label=status]", "consumed")  # a filter, and the address that it makes
    until(page, f"location.hash.includes('status=consumed') && {READY}")
    shown = [int(cell) for cell in page.locator("#view tbody tr td:first-child").all_inner_texts()]
    after = [row["row"] for row in db.execute(consumed)]
    assert 0 < len(shown) <= 50 and shown == [row for row in after if row in shown]
    assert set(shown) >= {row for row in before[:50] if row >= shown[-1]}
    step = db.execute("SELECT MAX(step) FROM trajectories").fetchone()[0]
    visit(f"trajectories?step={step}&status=consumed")  # a deep link
    count = db.execute("SELECT COUNT(*) FROM trajectories WHERE step = ? AND status = 'consumed'", (step,)).fetchone()
    assert page.locator("#view tbody tr").count() == min(count[0], 50) > 0

    row = db.execute("SELECT * FROM trajectories WHERE learner_logprobs IS NOT NULL ORDER BY row DESC").fetchone()
    text = visit(f"trajectory/{row['row']}", "trajectory")
    assert row["id"] in text and f"{row['num_tokens']}, sampled {row['num_sampled_tokens']}" in text
    for turn in json.loads(row["turns"]):
        for part in turn["message"]["content"]:
            assert part["text"].split()[:1] == [] or part["text"].split()[0] in text
    visit(f"tokens/{row['row']}", "tokens")
    mask = np.frombuffer(row["loss_mask"], "u1")
    at = int(mask.argmax())
    rollout, learner = (np.frombuffer(row[f"{who}_logprobs"], "<f4") for who in ("rollout", "learner"))
    cells = page.locator("#view tbody tr").nth(at).locator("td").all_inner_texts()
    ratio = math.exp(float(learner[at]) - float(rollout[at]))
    assert page.locator("#view tbody tr").count() == len(mask)
    assert [float(cell) for cell in cells[5:8]] == [_digits(float(v), 4) for v in (rollout[at], learner[at], ratio)]


def _check_tables(page: Any, visit: Visit, folder: Path, db: sqlite3.Connection) -> None:
    before = len(_lines(folder / "spans.jsonl"))
    visit("timeline", "timeline")
    spans = _lines(folder / "spans.jsonl")
    drawn = dict(page.evaluate("document.querySelector('.chart').data.map((trace) => [trace.name, trace.x.length])"))
    ends = range(before, len(spans) + 1)
    assert drawn in [Counter(span["activity"] for span in spans[max(0, end - 1500) : end]) for end in ends]

    recent = "SELECT * FROM trajectories ORDER BY row DESC LIMIT 5000"
    sql = f"SELECT COUNT(*), SUM(num_sampled_tokens) FROM ({recent}) WHERE worker = 'worker-0'"
    fewest = db.execute(sql).fetchone()
    visit("workers", "workers")
    most = db.execute(sql).fetchone()
    cells = page.locator("#view tbody tr", has_text="worker-0").first.locator("td").all_inner_texts()
    assert fewest[0] <= int(cells[5]) <= most[0] and fewest[1] <= int(cells[6]) <= most[1] and cells[1] == "healthy"
    processes = page.locator("#view tbody tr td:first-child").all_inner_texts()
    assert processes == sorted({span["process"] for span in spans})

    text = visit("config")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    row = page.locator("#view tbody tr", has_text="rollout.max_staleness").first.locator("td").all_inner_texts()
    assert row[1] == str(config["rollout"]["max_staleness"]) and "manifest" in text.lower()

    text = visit("logs")
    paths = sorted((folder / "logs").glob("*.log"))
    assert {"learner.log", "pool-0.log", "worker-0.log"} <= {path.name for path in paths}
    assert all(path.name in text for path in paths)
    for path in paths:
        visit(f"logs?name={path.name}")
        told = page.text_content("pre.log").strip()
        assert told in path.read_text() or (told == "empty" and not path.stat().st_size)
        if path.name == "pool-0.log":
            assert told.count("problem ") >= 8

    before = len(_lines(folder / "events.jsonl"))
    visit("events")
    assert before <= page.locator("#view tbody tr").count() <= len(_lines(folder / "events.jsonl"))


def _check_ledger(page: Any, visit: Visit, folder: Path, db: sqlite3.Connection) -> None:
    def audit() -> tuple[int, int]:
        sql = "SELECT COUNT(*), SUM(state = 'consumed') FROM groups"
        with sqlite3.connect(folder / "ledger.sqlite") as ledger:
            return ledger.execute(sql).fetchone()

    before = audit()
    text = visit("ledger")
    shown = [int(page.inner_text(f"[data-audit={name}] b")) for name in ("issued", "consumed")]
    assert all(low <= n <= high for low, n, high in zip(before, shown, audit(), strict=True))
    assert "Every group that was issued is in exactly one state." in text
    _check_lineage(page, visit, folder, db)


def _check_lineage(page: Any, visit: Visit, folder: Path, db: sqlite3.Connection) -> None:
    """Of a trajectory that was trained, from its own page; every time is worked out from the ledger's rows."""
    sql = "SELECT row, group_id, group_attempt, step FROM trajectories WHERE status = 'consumed' ORDER BY row DESC"
    row, group, attempt, step = db.execute(sql).fetchone()

    def told(sql: str, *values: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(folder / "ledger.sqlite") as ledger:
            return ledger.execute(sql, values).fetchall()

    events = told(
        "SELECT e.number, e.event, e.unix_s, e.attempt FROM events e JOIN groups USING (ordinal) WHERE group_id = ? "
        "ORDER BY number",
        group,
    )
    visit(f"trajectory/{row}")
    page.click("#view a:text-is('lineage')")
    until(page, f"{READY} && location.hash.includes('lineage')")
    save_picture(page, folder.parent, "lineage")
    cells = [line.locator("td").all_inner_texts() for line in page.locator("[data-event]").all()]
    assert [(c[0], float(c[2])) for c in cells] == [(e[1], _digits(e[2] - events[0][2], 4)) for e in events]
    assert [c[0] for c in cells] == ["issued", "leased", "committed", "consumed"]
    assert f"consumed at step {step}" in page.inner_text("#story")
    marked = page.locator("tr.different[data-event]").count()
    assert marked == sum(e[3] == attempt for e in events) > 0
    newest = "SELECT MAX(number) FROM events"
    ((first,),) = told(newest)
    visit("lineage")
    ((last,),) = told(newest)
    numbers = page.evaluate("[...document.querySelectorAll('[data-event]')].map((n) => Number(n.dataset.event))")
    assert first <= numbers[0] <= last and numbers == list(range(numbers[0], max(numbers[0] - 100, 0), -1))


def _check_the_end(page: Any, address: str, steps: list[dict[str, Any]]) -> None:
    """Of a run that was interrupted: nobody works any more, and every step is there."""
    page.goto(f"{address}#/run/{RUN}/workers")
    until(page, READY)
    cells = page.locator("#view tbody tr", has_text="worker-0").first.locator("td").all_inner_texts()
    assert cells[1] == "was healthy"
    page.goto(f"{address}#/")
    until(page, f"{READY} && document.getElementById('overlay').data !== undefined")
    shown = page.evaluate("Array.from(document.getElementById('overlay').data[0].y)")
    assert shown == pytest.approx([row["reward/mean"] for row in steps])


def _digits(value: float, digits: int) -> float:
    return float(value) if float(value).is_integer() else float(f"{value:.{digits}g}")


def _state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in _lines(folder / "metrics.jsonl") if row["kind"] == "step"]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the file may be growing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _wait(condition: Callable[[], bool], run: subprocess.Popen[bytes], deadline_s: float = 60.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert run.poll() is None, f"the run was to be live, it ended with exit code {run.returncode}"
        assert time.monotonic() < end, "the run came to nothing"
        time.sleep(0.02)


def _end(run: subprocess.Popen[bytes]) -> None:
    """As a user would, so that its Ray ends with it."""
    if run.poll() is None:
        run.terminate()
    try:
        run.wait(60)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait(10)
