"""shoal top: a run in the terminal, driven by textual's own pilot."""

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rl.cli.main import main
from rl.cli.readers.run_watch import FollowedLines, RunWatch, headline, print_glance, spark
from rl.cli.readers.top import event_line, make_app
from rl.runs.run_folder import RunFolder


@pytest.fixture
def folder(runs, tmp_path) -> RunFolder:
    """A copy of a finished run, to be written to."""
    return RunFolder(path=Path(shutil.copytree(runs / "first-run", tmp_path / "first-run")))


def add(path: Path, **row: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


@pytest.mark.slow
def test_what_is_on_the_screen_is_what_was_stored_and_it_follows(folder):
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "step"][-1]

    async def watch() -> None:
        from textual.widgets import DataTable, Static

        app = make_app(RunWatch(folder), refresh_s=0.05)
        async with app.run_test(size=(140, 50)) as pilot:
            table, head = app.query_one(DataTable), app.query_one("#head", Static)
            shown = {str(table.get_row_at(i)[0]): str(table.get_row_at(i)[1]) for i in range(table.row_count)}
            assert shown["policy/entropy"] == f"{last['policy/entropy']:.4g}"
            assert "first-run  finished  step 3/3" in str(head.render())
            add(folder.metrics, **(last | {"step": 4, "policy/entropy": 9.75}))
            add(folder.events, kind="worker_lost", time_s=1.5, worker="[red]x\x1b[31m")
            async with asyncio.timeout(20):
                while not any(str(table.get_row_at(i)[1]) == "9.75" for i in range(table.row_count)):
                    await pilot.pause(0.05)
            events = str(app.query_one("#events", Static).render())
            assert "worker_lost  worker=[red]x\\x1b[31m" in events
            folder.run_json.unlink()
            async with asyncio.timeout(20):
                while "cannot read" not in str(app.query_one("#error", Static).render()):
                    await pilot.pause(0.05)
            await pilot.press("q")
        assert app.return_code == 0

    asyncio.run(watch())


def test_one_glance_for_scripts_has_the_last_step(runs, capsys):
    assert main(["top", "first-run", "--root", str(runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["run"], told["status"], told["step"], told["steps"]) == ("first-run", "finished", 3, 3)
    assert told["evaluation"]["step"] == 3 and "reward/mean" in told["metrics"] and told["eta_s"] is None


def test_without_a_terminal_the_glance_is_printed(runs, capsys):
    assert main(["top", "--root", str(runs)]) == 0
    assert "second-run  finished  step 3/3" in capsys.readouterr().out


def test_a_run_that_does_not_exist_is_told_in_words(runs, capsys):
    assert main(["top", "third-run", "--root", str(runs)]) == 2
    assert "no run 'third-run'" in capsys.readouterr().err


def test_time_to_the_end_follows_from_the_last_steps(folder):
    folder.metrics.write_text("")
    for step in (1, 2):
        add(folder.metrics, kind="step", step=step, time_s=10.0 * step)
    state = json.loads(folder.run_json.read_text())
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    state |= {"status": "running", "step": 2, "pid": os.getpid(), "pid_started": started}
    folder.run_json.write_text(json.dumps(state))
    glance = RunWatch(folder, clock=lambda: state["heartbeat_s"] + 5.0).look()
    assert glance.eta_s == 10.0 and glance.silent_s == 5.0
    assert headline(glance) == "first-run  running  step 2/3  seen 5s ago  eta 10s"


def test_a_run_without_a_step_yet_says_what_it_does(folder):  # faults F6
    folder.metrics.write_text("")
    folder.events.write_text("")
    state = json.loads(folder.run_json.read_text())
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    state |= {"status": "running", "step": 0, "pid": os.getpid(), "pid_started": started}
    folder.run_json.write_text(json.dumps(state))
    watch = RunWatch(folder, clock=lambda: state["started_s"] + 65.0)
    assert headline(watch.look()).endswith("for 1m 05s it starts its processes")
    add(folder.events, kind="cluster_started", time_s=40.0)
    assert watch.look().stage == "for 1m 05s, now it evaluates"
    add(folder.metrics, kind="evaluation", step=0, time_s=50.0, **{"eval/success": 0.4})
    assert watch.look().stage == "for 1m 05s, now the first groups are sampled"
    add(folder.metrics, kind="step", step=1, time_s=60.0)
    assert watch.look().stage == ""


def test_each_row_of_a_growing_file_is_given_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = FollowedLines(path)
    assert lines.new() == ([], False)
    path.write_text('{"a": 1}\n{"a": 2')
    assert lines.new() == ([{"a": 1}], True)
    assert lines.new() == ([], False)
    with path.open("a") as file:
        file.write("2}\n")
    assert lines.new() == ([{"a": 22}], False)


def test_a_file_that_a_resume_rewrote_begins_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    lines = FollowedLines(path)
    lines.new()
    (tmp_path / "new").write_text('{"a": 1}\n{"a": 3}\n{"a": 4}\n')
    (tmp_path / "new").replace(path)
    assert lines.new() == ([{"a": 1}, {"a": 3}, {"a": 4}], True)


def test_bars_span_the_least_to_the_largest_value():
    assert spark([1.0, 2.0, 3.0]) == "▁▅█" and spark([5.0, 5.0]) == "▁▁" and spark([]) == ""


def test_an_event_is_one_line_without_control_characters():
    assert (
        event_line({"kind": "dropped", "time_s": 2.0, "cause": "a\nb\x1b[0m"})
        == "     2.0 s  dropped  cause=a b\\x1b[0m"
    )


def test_a_failed_run_says_why(folder, capsys):
    folder.finish("failed", error="boom \x1b[31m")
    assert print_glance(RunWatch(folder)) == 0
    assert "boom \\x1b[31m" in capsys.readouterr().out
