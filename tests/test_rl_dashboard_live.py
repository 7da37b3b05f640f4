"""The page beside a real training: what it shows is recomputed here from the stored rows, by code of its own."""

import json
import math
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.dashboard_runs import metric_rows, save_picture, start_server, until
from tests.training import SMALL

pytestmark = pytest.mark.browser

RUN = "live-run"
TRAIN = (
    *("env=calculator", "steps=100000", "evaluation.final_tasks=8", "rollout.max_turn_tokens=8"),
    *("learner.self_check_tolerance=1e9", f"run.name={RUN}"),
)
STOPPED = 130
"""Exit code of a run that Ctrl-C ended after a whole step."""
LATE_S = 2.0
"""A metric is on the page this long after it was written, at most."""
POINTS = "Number(document.querySelector(\"[data-keys^='reward/mean']\")?.dataset.points || 0)"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_page_follows_a_live_run_through_a_killed_server_and_every_view_shows_its_rows(
    page: Any,
    tmp_path: Path,
) -> None:
    folder = tmp_path / RUN
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    command = [sys.executable, "-m", "rl.cli", "train", *SMALL, *TRAIN, f"run.root={tmp_path}"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    server, address = start_server(tmp_path)
    outside: list[str] = []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else outside.append(r.url))
    try:
        _wait(lambda: len(_steps(folder)) >= 2, run)
        page.goto(f"{address}#/run/{RUN}/overview")
        until(page, "document.getElementById('live').textContent === 'live'")
        assert min(_update_seconds(page, folder, run) for _ in range(3)) <= LATE_S
        assert problems == []
        server.send_signal(signal.SIGKILL)
        server.wait(10)
        until(page, "document.getElementById('live').textContent === 'reconnecting'")
        assert run.poll() is None, "the run was to outlive the server"
        server, again = start_server(tmp_path, port=int(address.rsplit(":", 1)[1].strip("/")))
        assert again == address
        have = len(_steps(folder))
        _wait(lambda: len(_steps(folder)) > have, run)
        run.send_signal(signal.SIGINT)  # it would go on for hours: how fast its steps are is the machine's matter
        assert run.wait(60.0) == STOPPED
        steps = _steps(folder)
        until(page, f"{POINTS} === {len(steps)}")
        time.sleep(1.2)  # what came twice would have come by now
        assert page.evaluate(POINTS) == len(steps)
        problems.clear()  # the browser tells each attempt to reach the killed server
        _check_every_view(page, address, folder)
        assert problems == [] and outside == []
    finally:
        for process in (run, server):
            process.kill()
            process.wait(10)


def _update_seconds(page: Any, folder: Path, run: subprocess.Popen[bytes]) -> float:
    """From a step's line in the file to the chart that has it."""
    have = len(_steps(folder))
    _wait(lambda: len(_steps(folder)) > have, run)
    written = time.monotonic()
    until(page, f"{POINTS} > {have}")
    return time.monotonic() - written


def _check_every_view(page: Any, address: str, folder: Path) -> None:
    db = sqlite3.connect(folder / "trajectories.db")
    db.row_factory = sqlite3.Row

    def visit(view: str, picture: str = "") -> str:
        page.goto(f"{address}#/run/{RUN}/{view}" if view else f"{address}#/")
        until(page, "document.getElementById('view').dataset.ready === (location.hash || '#/')")
        if picture:
            save_picture(page, folder.parent, picture)
        return page.inner_text("#view")

    try:
        visit("", "runs")
        until(page, "document.getElementById('overlay').data !== undefined")
        shown = page.evaluate("Array.from(document.getElementById('overlay').data[0].y)")
        assert shown == pytest.approx([row["reward/mean"] for row in _steps(folder)])
        _check_overview(page, visit, folder, db)
        _check_trajectories(page, address, visit, db)
        _check_tables(page, visit, folder, db)
    finally:
        db.close()


def _check_overview(page: Any, visit: Callable[..., str], folder: Path, db: sqlite3.Connection) -> None:
    text = visit("overview", "overview")
    state = json.loads((folder / "run.json").read_text())
    assert f"{state['status']} at step {state['step']}" in text and state["step"] == len(_steps(folder))
    newest: dict[str, float] = {}
    for row in metric_rows(folder):
        newest |= row
    for box in page.locator("[data-metric]").all():
        key = box.get_attribute("data-metric")
        assert float(box.locator("b").inner_text()) == _digits(newest[key], 3), key
    assert page.locator("[data-metric]").count() >= 8
    _check_heat_maps(page, db)
    for status, count in db.execute("SELECT status, COUNT(*) FROM trajectories GROUP BY status"):
        assert f"{count} {status}" in text


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


def _check_trajectories(page: Any, address: str, visit: Callable[..., str], db: sqlite3.Connection) -> None:
    visit("trajectories", "trajectories")
    page.select_option("[aria-label=status]", "consumed")  # a filter, and the address that it makes
    until(
        page,
        "location.hash.includes('status=consumed') && document.getElementById('view').dataset.ready === location.hash",
    )
    wanted = db.execute("SELECT row FROM trajectories WHERE status = 'consumed' ORDER BY row DESC LIMIT 50").fetchall()
    cells = page.locator("#view tbody tr td:first-child").all_inner_texts()
    assert [int(cell) for cell in cells] == [row["row"] for row in wanted]
    step = db.execute("SELECT MAX(step) FROM trajectories").fetchone()[0]
    visit(f"trajectories?step={step}&status=consumed")  # a deep link
    count = db.execute("SELECT COUNT(*) FROM trajectories WHERE step = ? AND status = 'consumed'", (step,)).fetchone()[
        0
    ]
    assert page.locator("#view tbody tr").count() == min(count, 50) > 0

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


def _check_tables(page: Any, visit: Callable[..., str], folder: Path, db: sqlite3.Connection) -> None:
    visit("timeline", "timeline")
    spans = _lines(folder / "spans.jsonl")[-1500:]
    drawn = page.evaluate("document.querySelector('.chart').data.map((trace) => [trace.name, trace.x.length])")
    assert dict(drawn) == {name: sum(s["activity"] == name for s in spans) for name in {s["activity"] for s in spans}}

    visit("workers", "workers")
    sql = "SELECT COUNT(*), SUM(num_sampled_tokens) FROM (SELECT * FROM trajectories ORDER BY row DESC LIMIT 5000)"
    episodes, tokens = db.execute(f"{sql} WHERE worker = 'worker-0'").fetchone()
    cells = page.locator("#view tbody tr", has_text="worker-0").first.locator("td").all_inner_texts()
    assert (int(cells[5]), int(cells[6])) == (episodes, tokens) and cells[1] == "healthy"

    visit("ledger", "ledger")
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        states = dict(ledger.execute("SELECT state, COUNT(*) FROM groups GROUP BY state").fetchall())
    assert int(page.inner_text("[data-audit=issued] b")) == sum(states.values())
    assert int(page.inner_text("[data-audit=consumed] b")) == states["consumed"]

    _check_lineage(page, visit, folder, db)
    text = visit("config")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    row = page.locator("#view tbody tr", has_text="rollout.max_staleness").first.locator("td").all_inner_texts()
    assert row[1] == str(config["rollout"]["max_staleness"]) and "manifest" in text.lower()

    text = visit("logs")
    names = [path.name for path in (folder / "logs").glob("*.log")]
    assert all(name in text for name in names) and (names or "no processes of its own" in text)

    visit("events")
    assert page.locator("#view tbody tr").count() == len(_lines(folder / "events.jsonl"))


def _check_lineage(page: Any, visit: Callable[..., str], folder: Path, db: sqlite3.Connection) -> None:
    """Of a trajectory that was trained, from its own page; every time is worked out from the ledger's rows."""
    sql = "SELECT row, group_id, group_attempt, step FROM trajectories WHERE status = 'consumed' ORDER BY row DESC"
    row, group, attempt, step = db.execute(sql).fetchone()
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        sql = (
            "SELECT e.number, e.event, e.unix_s, e.attempt FROM events e JOIN groups USING (ordinal) WHERE group_id = ?"
        )
        events = ledger.execute(f"{sql} ORDER BY number", (group,)).fetchall()
        newest = ledger.execute("SELECT number FROM events ORDER BY number DESC LIMIT 100").fetchall()
    visit(f"trajectory/{row}")
    page.click("#view a:text-is('lineage')")
    until(page, "document.getElementById('view').dataset.ready === location.hash && location.hash.includes('lineage')")
    save_picture(page, folder.parent, "lineage")
    cells = [line.locator("td").all_inner_texts() for line in page.locator("[data-event]").all()]
    assert [(c[0], float(c[2])) for c in cells] == [(e[1], _digits(e[2] - events[0][2], 4)) for e in events]
    assert [c[0] for c in cells] == ["issued", "leased", "committed", "consumed"]
    assert f"consumed at step {step}" in page.inner_text("#story")
    marked = page.locator("tr.different[data-event]").count()
    assert marked == sum(e[3] == attempt for e in events) > 0
    visit("lineage")
    shown = [int(line.get_attribute("data-event")) for line in page.locator("[data-event]").all()]
    assert shown == [number for (number,) in newest]


def _digits(value: float, digits: int) -> float:
    return float(value) if float(value).is_integer() else float(f"{value:.{digits}g}")


def _steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in _lines(folder / "metrics.jsonl") if row["kind"] == "step"]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the file may be growing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _wait(condition: Callable[[], bool], run: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60.0
    while not condition():
        assert run.poll() is None, f"the run was to be live, it ended with exit code {run.returncode}"
        assert time.monotonic() < end, "the run came to nothing"
        time.sleep(0.02)
