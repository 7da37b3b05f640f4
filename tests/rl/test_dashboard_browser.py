"""The page in a real browser: every view, values recomputed from the stored rows, no console error."""

import csv
import json
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conf.loading import load_config, resolved_yaml
from conf.schema import LossConfig
from rl.algorithm.loss import LossInputs, clipped
from rl.runs.notes import Notes, write_notes
from rl.runs.run_folder import RunFolder
from rollout.record.lineage import read_lineage, story
from tests.rl.dashboard_runs import RUN, XSS, make_run, metric_rows, start_server, until

pytestmark = pytest.mark.browser

READY = "document.getElementById('view').dataset.ready === (location.hash || '#/')"


@pytest.mark.slow
def test_every_view_shows_what_the_rows_say_and_survives_a_killed_server(page, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    problems: list[str] = []
    outside: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(f"dialog {dialog.message}"))
    server, address = start_server(tmp_path)
    page.on("request", lambda r: outside.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    db = sqlite3.connect(folder / "trajectories.db")

    def visit(view: str) -> str:
        page.goto(f"{address}#/run/{RUN}/{view}" if view else f"{address}#/")
        until(page, "document.getElementById('view').dataset.ready === (location.hash || '#/')")
        return page.inner_text("#view")

    try:
        assert RUN in visit("")
        points = page.evaluate("document.getElementById('overlay').data[0].y.length")
        assert points == sum("reward/mean" in row for row in metric_rows(folder))
        _find_runs_by_their_notes(page, tmp_path)

        visit("overview")
        _save_what_is_drawn(page, folder)
        last = [row for row in metric_rows(folder) if row["kind"] == "step"][-1]
        shown = page.inner_text("[data-metric='reward/mean'] b")
        assert float(shown) == pytest.approx(last["reward/mean"], rel=1e-2)

        page.goto(f"{address}#/run/{RUN}/trajectories")
        page.wait_for_selector("[aria-label=status]")
        page.select_option("[aria-label=status]", "consumed")
        page.wait_for_url(re.compile("status=consumed"))
        until(page, "document.getElementById('view').dataset.ready === location.hash")
        consumed = db.execute("SELECT COUNT(*) FROM trajectories WHERE status = 'consumed'").fetchone()[0]
        assert page.locator("#view tbody tr").count() == consumed > 0

        _read_one_episode(page, folder, db, visit)
        _read_a_group_side_by_side(page, db, visit)

        assert "worker-0" in visit("workers")
        visit("ledger")
        groups = sqlite3.connect(folder / "ledger.sqlite").execute("SELECT COUNT(*) FROM groups").fetchone()[0]
        assert int(page.inner_text("[data-audit=issued] b")) == groups
        assert "learner.loss.clip_low" in visit("config")
        _read_and_follow_logs(page, folder, visit)
        assert "checkpoint" in visit("events")
        visit("timeline")
        assert page.evaluate("document.querySelector('.chart').data.length") == 2
        assert problems == [] and outside == []

        visit("overview")
        server = _watch_a_kill(page, folder, server, address)
    finally:
        server.kill()
        server.wait(10)
        db.close()


@pytest.mark.slow
def test_a_chart_is_sketched_from_its_rows_until_the_library_draws_it(page, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    held: list = []
    server, address = start_server(tmp_path)
    page.route(f"{address}charts.js", lambda route: held.append(route))  # a library that takes its time
    sketched = "document.querySelector(\"[data-keys^='reward/mean'] svg.sketch path.trace\")"
    try:
        page.goto(f"{address}#/run/{RUN}/overview", wait_until="commit")  # it is not loaded before its library is
        until(page, f"{sketched} !== null")
        places = re.findall(r"([\d.]+),([\d.]+)", page.evaluate(f"{sketched}.getAttribute('d')"))
        rewards = [row["reward/mean"] for row in metric_rows(folder) if "reward/mean" in row]
        assert len(places) == len(rewards) == 3
        heights = [float(y) for _, y in places]
        shares = [(heights[0] - y) / (heights[0] - heights[-1]) for y in heights]  # the first is the lowest
        assert shares == pytest.approx([(r - rewards[0]) / (rewards[-1] - rewards[0]) for r in rewards], abs=0.01)
        held[0].continue_()
        until(page, "document.querySelector(\"[data-keys^='reward/mean'] .plot-container\") !== null")
        until(page, "document.querySelector('.sketch') === null")
        assert page.evaluate("[...document.querySelector(\"[data-keys^='reward/mean']\").data[0].y]") == rewards
    finally:
        server.kill()
        server.wait(10)


@pytest.mark.slow
def test_a_page_opened_before_the_first_step_gets_its_charts_and_a_long_curve_keeps_its_beginning(
    page, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path, "calc", "tiny", name=RUN).path
    server, address = start_server(tmp_path)
    chart = "document.querySelector(\"[data-keys^='reward/mean']\")"
    try:
        page.goto(f"{address}#/run/{RUN}/overview")
        until(page, f"{READY} && document.getElementById('live').textContent === 'live'")
        assert page.locator("[data-keys]").count() == 0
        page.evaluate("window.isTheSamePage = true")
        _append_rows(folder, [{"kind": "evaluation", "step": 0, "time_s": 0.5, "eval/success": 0.25}])
        until(page, "document.querySelector(\"[data-keys='eval/success']\")?.data?.[0].x.length === 1")
        for step in (1, 2):
            _append_rows(folder, [_step(step, step / 4)])
            until(page, f"{chart}?.data?.[0].x.length === {step} && {READY}")
        _append_rows(folder, [_step(3, 0.75) | {"stop/terminated": 1.0}])
        until(page, "document.querySelector(\"[data-keys='stop/terminated']\")?.data?.[0].x.length === 1")
        until(page, f"{chart}.data[0].x.length === 3")
        assert page.evaluate(f"[...{chart}.data[0].y]") == [0.25, 0.5, 0.75]
        assert [page.locator(f"[data-keys^='{key}']").count() for key in ("reward/mean", "eval/success")] == [1, 1]
        _append_rows(folder, [_step(step, step / 9_000) for step in range(4, 9_001)])
        until(page, f"{chart}.data[0].x.at(-1) === 9000 && {chart}.data[0].x.length < 4000")
        drawn = page.evaluate(f"[...{chart}.data[0].x]")
        assert drawn[0] == 1 and drawn == sorted(set(drawn))
        assert max(after - before for before, after in pairwise(drawn)) <= 100  # no part of it is cut out
        assert page.evaluate(f"Number({chart}.dataset.points)") == 9_000 and page.evaluate("window.isTheSamePage")
    finally:
        server.kill()
        server.wait(10)


@pytest.mark.slow
def test_a_token_is_called_clipped_where_the_loss_gives_it_no_gradient(page, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    learner = np.array([0, 0, -2.0, -1.0, 0, -0.1], np.float32)  # far under its rollout logprob of -1, equal, far over
    with sqlite3.connect(folder / "trajectories.db") as db:
        db.execute("UPDATE trajectories SET learner_logprobs = ? WHERE row = 2", (learner.tobytes(),))
    server, address = start_server(tmp_path)

    def causes(row: int) -> list[str]:
        page.goto(f"{address}#/run/{RUN}/tokens/{row}")
        until(page, READY)
        told = page.locator("#view tbody tr td:last-child").all_inner_texts()
        return [told[at] for at in (2, 3, 5)]  # the sampled ones

    try:
        first, second = causes(1), causes(2)
        assert first == ["ratio over 1.28: clipped"] * 3
        assert second == ["ratio under 0.8: clipped", "", "ratio over 2: cut off by tis_cap"]
        for told, logprobs, advantage in ((first, [-0.5, -0.5, -0.5], 1.0), (second, [-2.0, -1.0, -0.1], -1.0)):
            assert [cause != "" for cause in told] == [slope == 0.0 for slope in _gradient(logprobs, advantage)]
        assert "The loss clips it" in page.inner_text("#ratio")
        RunFolder(path=folder).write_config(resolved_yaml(load_config(["learner=gspo"])))
        assert causes(1) == ["", "", ""] and "cannot be told" in page.inner_text("#ratio")
    finally:
        server.kill()
        server.wait(10)


def _gradient(logprobs: list[float], advantage: float) -> list[float]:
    """What the default loss says of tokens that were sampled with a logprob of -1."""
    taken, rollout = torch.tensor(logprobs, requires_grad=True), torch.full((3,), -1.0)
    inputs = LossInputs(
        logprobs=taken,
        proximal_logprobs=taken.detach(),
        rollout_logprobs=rollout,
        entropy=torch.zeros(3),
        advantages=torch.full((3,), advantage),
        weights=torch.ones(3),
        row_of_token=torch.zeros(3, dtype=torch.long),
        num_rows=1,
    )
    clipped(inputs, LossConfig())[0].backward()
    assert taken.grad is not None
    return taken.grad.tolist()


@pytest.mark.slow
def test_the_filter_of_a_log_and_the_step_of_the_histograms_are_in_the_address(page, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "logs" / "worker-1.log").write_text("".join(f"line {n}\n" for n in range(30)))
    server, address = start_server(tmp_path)
    step = "[aria-label='step of the histograms']"
    try:
        page.goto(f"{address}#/run/{RUN}/logs?name=worker-1.log&filter=line+2")
        until(page, "document.querySelector('pre.log')?.textContent.includes('line 2')")
        assert page.input_value("[aria-label=filter]") == "line 2"
        assert page.text_content("pre.log") == "\n".join(f"line {n}" for n in (2, *range(20, 30)))
        page.fill("[aria-label=filter]", "hello")
        assert page.evaluate("location.hash").endswith("/logs?name=worker-1.log&filter=hello")
        page.select_option("#view select", "worker-0.log")
        until(page, "document.querySelector('pre.log')?.textContent === 'hello from the log'")
        assert page.evaluate("location.hash").endswith("/logs?name=worker-0.log&filter=hello")

        page.goto(f"{address}#/run/{RUN}/overview?step=2")
        until(page, "document.querySelector('[data-histogram=length]')?.data !== undefined")
        assert page.input_value(step) == "2" and "the 2 trajectories of" in page.inner_text("#view")
        page.fill(step, "3")
        page.press(step, "Enter")
        until(page, "document.getElementById('view').textContent.includes('no trained trajectory of')")
        assert page.evaluate("location.hash").endswith("/overview?step=3")
        page.reload()
        until(page, "document.getElementById('view').textContent.includes('no trained trajectory of')")
        assert page.input_value(step) == "3"
    finally:
        server.kill()
        server.wait(10)


def _save_what_is_drawn(page, folder: Path) -> None:
    """A chart's own button gives its points as CSV."""
    with page.expect_download() as download:
        page.evaluate(
            "document.querySelector(\"[data-keys^='reward/mean'] [data-title='CSV of what is drawn']\").click()"
        )
    lines = list(csv.reader(Path(download.value.path()).read_text().splitlines()))
    steps = [row for row in metric_rows(folder) if "reward/mean" in row]
    drawn = [(float(x), float(y)) for name, x, y, _ in lines[1:] if name == "reward/mean"]
    assert lines[0] == ["name", "x", "y", ""] and drawn == [(row["step"], row["reward/mean"]) for row in steps]


def _read_a_group_side_by_side(page, db: sqlite3.Connection, visit: Callable[[str], str]) -> None:
    row, group = db.execute("SELECT row, group_id FROM trajectories WHERE member = 1 LIMIT 1").fetchone()
    members = db.execute("SELECT turns FROM trajectories WHERE group_id = ?", (group,)).fetchall()
    visit(f"trajectory/{row}?side=1")
    shown = page.locator(".siblings.side .sibling").all_inner_texts()
    assert len(shown) == len(members) == 2
    for text, (turns,) in zip(shown, members, strict=True):
        assert all(turn["message"]["content"][0]["text"] in text for turn in json.loads(turns))
    page.click("#view a:text-is('facts alone')")
    until(page, "document.getElementById('view').dataset.ready === location.hash && !location.hash.includes('side')")
    assert page.locator(".siblings .message").count() == 0


def _find_runs_by_their_notes(page, root: Path) -> None:
    """What shoal note wrote is shown, as text, and finds a run by tag and by words; the address keeps both."""
    write_notes(RunFolder.create(root, "calc", "tiny", name="noted").path, Notes(note=XSS, tags=("baseline", "old")))
    page.goto(f"{page.url.split('#')[0]}#/?tag=baseline")
    until(page, "document.getElementById('view').dataset.ready === location.hash")
    rows = page.locator("#view tbody tr")
    assert rows.count() == 1 and "noted" in rows.first.inner_text() and "baseline old" in rows.first.inner_text()
    assert rows.locator("td").last.text_content() == XSS and page.locator("#view script, #view img").count() == 0
    page.select_option("[aria-label=tag]", "")
    until(page, "document.querySelectorAll('#view tbody tr').length === 2")
    page.fill("[aria-label=text]", "RUN-A")
    page.press("[aria-label=text]", "Enter")
    until(page, "location.hash.includes('text=RUN-A') && document.querySelectorAll('#view tbody tr').length === 1")
    assert RUN in rows.first.inner_text()


def _read_and_follow_logs(page, folder: Path, visit: Callable[[str], str]) -> None:
    """Each process's lines are those of its file, a word picks among them, a line that is appended comes by itself."""
    other = folder / "logs" / "worker-1.log"
    other.write_text("".join(f"line {n} of worker 1\n" for n in range(30)))

    def lines() -> list[str]:
        return page.text_content("pre.log").strip("\n").split("\n")

    def stored(path: Path) -> list[str]:
        return path.read_text().strip("\n").split("\n")

    visit("logs")
    until(page, "document.querySelector('pre.log').textContent.includes('hello from the log')")
    assert lines() == stored(folder / "logs" / "worker-0.log")
    page.select_option("#view select", "worker-1.log")
    until(page, "location.hash.includes('worker-1') && document.querySelector('pre.log')?.textContent.includes('line')")
    assert lines() == stored(other) and "hello" not in page.text_content("pre.log")
    page.fill("#view input", "line 2")
    assert lines() == [line for line in stored(other) if "line 2" in line] and len(lines()) == 11
    with other.open("a") as file:
        file.write("line 30 is left out\nline 200 comes\n")
    until(page, "document.querySelector('pre.log').textContent.includes('line 200 comes')", timeout=10_000)
    assert lines() == [line for line in stored(other) if "line 2" in line] and len(lines()) == 12
    page.fill("#view input", "")
    assert lines() == stored(other)


def _read_one_episode(page, folder: Path, db: sqlite3.Connection, visit: Callable[[str], str]) -> None:
    """Its hostile text is text, and every token has a line."""
    sql = "SELECT row, group_id, turns FROM trajectories WHERE status = 'consumed' LIMIT 1"
    row, group, turns = db.execute(sql).fetchone()
    text = json.loads(turns)[0]["message"]["content"][0]["text"]
    assert "<script>" in text
    shown = visit(f"trajectory/{row}")
    assert text in shown  # hostile text, as text
    told = story(read_lineage(folder / "ledger.sqlite", group))
    assert f"lineage of its group\t{told}\n" in shown and told.startswith("issued → leased to worker-0")
    assert page.locator("#view script, #view img[src=x]").count() == 0

    visit(f"tokens/{row}")
    num_tokens = db.execute("SELECT num_tokens FROM trajectories WHERE row = ?", (row,)).fetchone()[0]
    assert page.locator("#view tbody tr").count() == num_tokens


def _watch_a_kill(page, folder: Path, server: subprocess.Popen, address: str) -> subprocess.Popen:
    """A step is shown within 2 s; the server is killed and started anew; no line comes twice. Returns the new one."""
    until(page, "document.getElementById('live').textContent === 'live'")
    _append_rows(folder, [_step(4, 0.875)])
    until(page, "document.querySelector(\"[data-metric='reward/mean'] b\").textContent === '0.875'", timeout=2000)
    server.send_signal(signal.SIGKILL)
    server.wait(10)
    until(page, "document.getElementById('live').textContent === 'reconnecting'")
    _append_rows(folder, [_step(5, 0.75)])
    server, again = start_server(folder.parent, port=int(address.rsplit(":", 1)[1].strip("/")))
    assert again == address
    until(page, "document.querySelector(\"[data-metric='reward/mean'] b\").textContent === '0.75'", timeout=20_000)
    time.sleep(1.2)  # what came twice would have come by now
    chart = page.locator("[data-keys^='reward/mean']")
    assert int(chart.get_attribute("data-points")) == sum("reward/mean" in row for row in metric_rows(folder))
    return server


def _step(step: int, reward: float) -> dict[str, Any]:
    return {"kind": "step", "step": step, "policy_version": step, "time_s": step * 1.0, "reward/mean": reward}


def _append_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
