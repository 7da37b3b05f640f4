"""The page in a real browser: every view, values recomputed from the stored rows, no console error."""

import csv
import json
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rl.notes import Notes, write_notes
from rl.run_folder import RunFolder
from rollout.lineage import read_lineage, story
from tests.dashboard_runs import RUN, XSS, make_run, metric_rows, start_server, until

pytestmark = pytest.mark.browser


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
        assert "learner.clip_low" in visit("config")
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
    _append_step(folder, 4, 0.875)
    until(page, "document.querySelector(\"[data-metric='reward/mean'] b\").textContent === '0.875'", timeout=2000)
    server.send_signal(signal.SIGKILL)
    server.wait(10)
    until(page, "document.getElementById('live').textContent === 'reconnecting'")
    _append_step(folder, 5, 0.75)
    server, again = start_server(folder.parent, port=int(address.rsplit(":", 1)[1].strip("/")))
    assert again == address
    until(page, "document.querySelector(\"[data-metric='reward/mean'] b\").textContent === '0.75'", timeout=20_000)
    time.sleep(1.2)  # what came twice would have come by now
    chart = page.locator("[data-keys^='reward/mean']")
    assert int(chart.get_attribute("data-points")) == sum("reward/mean" in row for row in metric_rows(folder))
    return server


def _append_step(folder: Path, step: int, reward: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps(
                {"kind": "step", "step": step, "policy_version": step, "time_s": step * 1.0, "reward/mean": reward}
            )
            + "\n"
        )
