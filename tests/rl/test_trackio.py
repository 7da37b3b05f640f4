"""trackio's database read back with trackio's own reader; what becomes of a run whose trackio dies or hangs."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from math import nan
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.loading import load_config
from rl.monitor.json_lines import read_json_lines
from rl.monitor.monitor import Monitor
from rl.monitor.trackio_sink import TrackioTracker
from rl.monitor.trackio_writer import scalars

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["monitor=quiet", "monitor.trackers=[trackio]"]
METRICS = {"reward/mean": 0.1, "loss/policy": nan, "optim/grad_norm": float("inf"), "off_policy/lag/max": 2}
DETAIL = {
    "histograms": {"hist/length": {"counts": [2, 1], "edges": [0.0, 1.5, 2.0]}},
    "samples": [{"id": "g/0", "reward": 1.0, "text": "a"}, {"id": "g/1", "reward": None, "text": "b"}],
}

READ = """
import json
import trackio
from trackio.sqlite_storage import SQLiteStorage
found = []
for run in trackio.Api().runs("shoal"):
    logs = SQLiteStorage.get_logs("shoal", run.name, run_id=run.id)
    found.append({"name": run.name, "config": run.config, "alerts": run.alerts(), "logs": logs})
print(json.dumps(found, default=str))
"""


def read_back(folder: Path) -> list[dict[str, Any]]:
    own = os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", READ], env=own, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def numbers(rows: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """(step, key, value as Python writes it) of every number, so that NaN equals NaN and 2 is not 2.0."""
    return sorted((row["step"], key, repr(value)) for row in rows for key, value in scalars(row).items())


def writers(*, of: int | None = None) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(of).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also of one that has ended, and that another test has left
            found += [child] if any("rl.monitor.trackio_writer" in word for word in child.cmdline()) else []
    return found


def started() -> psutil.Process:
    until_s = time.monotonic() + 60.0
    while not (found := writers()):
        assert time.monotonic() < until_s, "trackio's process did not start"
        time.sleep(0.05)
    return found[0]


def rows_of(folder: Path) -> list[int]:
    """Steps that lie in the database, whoever has it open."""
    path = folder / "trackio" / "shoal.db"
    if not path.exists():
        return []
    with sqlite3.connect(path) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        return [step for (step,) in db.execute("SELECT step FROM metrics")] if "metrics" in tables else []


def wait_for_rows(folder: Path, count: int) -> None:
    until_s = time.monotonic() + 60.0
    while len(rows_of(folder)) < count:
        assert time.monotonic() < until_s, f"{count} rows did not arrive"
        time.sleep(0.1)


@pytest.mark.slow
def test_trackio_s_own_reader_finds_every_number_of_a_run_and_its_resumption_as_one_run(tmp_path):
    folder = tmp_path / "a-run"
    folder.mkdir()
    config = load_config([*SETTINGS, "steps=7"])
    monitor = Monitor(folder, config)
    for step in (1, 2):
        monitor.step(step, step, METRICS | {"reward/mean": step / 3, "time/step": 1e-17, "tokens": 2**53 - step})
        monitor.detail(step, lambda _: DETAIL)
    monitor.checkpoint(2, "nowhere", 0.1)
    monitor.event("run_failed", error="OSError: disk full")
    monitor.close(60.0)
    assert writers() == []
    resumed = Monitor(folder, config)
    resumed.step(3, 3, METRICS)
    resumed.close(60.0)
    assert [row for row in read_json_lines(folder / "events.jsonl") if row["kind"] == "tracker"] == []

    (run,) = read_back(folder)
    assert run["name"] == "a-run" and run["config"]["steps"] == 7
    stored = [row for row in run["logs"] if "policy_version" in row]
    ours = list(read_json_lines(folder / "metrics.jsonl"))
    assert numbers(stored) == numbers(ours)
    assert {(1, "loss/policy", "nan"), (3, "optim/grad_norm", "nan"), (2, "reward/mean", repr(2 / 3))} < set(
        numbers(stored)
    )
    assert [set(row) - {"timestamp"} for row in stored] == [set(row) - {"kind"} for row in ours]
    details = [row for row in run["logs"] if "hist/length" in row]
    assert [row["step"] for row in details] == [1, 2]
    histogram, table = details[0]["hist/length"], details[0]["samples/trajectories"]
    assert (histogram["values"], histogram["bins"]) == ([2, 1], [0.0, 1.5, 2.0])
    assert table["_value"] == DETAIL["samples"]
    assert [(alert["title"], alert["text"], alert["level"]) for alert in run["alerts"]] == [
        ("run_failed", "OSError: disk full", "error")
    ]


WATCHED = """
import runpy, sys
def note(event, args):
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(sys.argv[1], "a") as file:
            print(event, args[1:], file=file)
sys.addaudithook(note)
runpy.run_module("rl.monitor.trackio_writer", run_name="__main__")
"""


@pytest.mark.slow
def test_nothing_is_connected_listened_on_or_written_elsewhere_whatever_the_user_s_environment_asks_for(
    tmp_path, monkeypatch
):
    home, folder, noted = tmp_path / "home", tmp_path / "a-run", tmp_path / "noted"
    home.mkdir()
    folder.mkdir()
    noted.touch()
    for name, value in {
        "HOME": str(home),
        "SYSTEM": "spaces",
        "HF_TOKEN": "hf_not_a_token",
        "TRACKIO_SPACE_ID": "somebody/space",
        "TRACKIO_SERVER_URL": "http://127.0.0.1:1/?write_token=x",
        "TRACKIO_WEBHOOK_URL": "http://127.0.0.1:1/hook",
        "TRACKIO_DIR": str(home / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    tracker = TrackioTracker(folder, load_config(SETTINGS), command=(sys.executable, "-c", WATCHED, str(noted)))
    (writer,) = writers()
    tracker.log({"kind": "step", "step": 1, "reward/mean": 0.5})
    tracker.log({"kind": "alert", "rule": "no_step", "state": "raised", "level": "warn", "text": "slow", "step": 1})
    wait_for_rows(folder, 1)
    assert writer.net_connections("inet") == [] and writer.children(recursive=True) == []
    tracker.finish()
    assert not writer.is_running()
    assert noted.read_text() == "" and list(home.rglob("*")) == []


@pytest.mark.slow
def test_killing_trackio_s_process_in_mid_run_loses_nothing_of_ours_and_the_run_ends_well(tmp_path):
    monitor = Monitor(tmp_path, load_config(SETTINGS))
    for step in range(1, 21):
        monitor.step(step, step, {"reward/mean": 0.5})
        if step == 5:
            wait_for_rows(tmp_path, 5)
            started().kill()
    monitor.close(10.0)
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == list(range(1, 21))
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["kind"], event["name"], event["dropped"]) == ("tracker", "trackio", 15)
    assert event["problem"].startswith("ConnectionError: trackio's process does not answer: ")
    assert rows_of(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_trackio_that_hangs_keeps_neither_steps_nor_the_end_of_a_run_waiting(tmp_path):
    monitor = Monitor(tmp_path, load_config(SETTINGS))
    hung = started()
    hung.suspend()
    start_s = time.monotonic()
    for step in range(1, 601):  # more than the queue holds
        monitor.step(step, step, {"reward/mean": 0.5})
    monitor.close(1.0)
    assert time.monotonic() - start_s < 10.0
    hung.kill()
    rows = list(read_json_lines(tmp_path / "metrics.jsonl"))
    assert len(rows) == 600 and rows[-1]["monitor/dropped"] == 600 - 512 - 1


ALONE = """
import sys, time, pathlib
from conf.loading import load_config
from rl.monitor.monitor import Monitor
monitor = Monitor(pathlib.Path(sys.argv[1]), load_config(sys.argv[2:]))
monitor.step(1, 1, {"reward/mean": 0.5})
time.sleep(100)
"""


@pytest.mark.slow
def test_trackio_s_process_ends_with_a_run_that_is_killed_and_keeps_what_it_was_told(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", ALONE, tmp_path, *SETTINGS], cwd=ROOT)
    try:
        wait_for_rows(tmp_path, 1)
        (writer,) = writers(of=run.pid)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait(10.0)
    writer.wait(30.0)
    assert rows_of(tmp_path) == [1]


def test_without_the_package_the_run_goes_on_and_its_event_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monitor = Monitor(tmp_path, load_config(SETTINGS))
    monitor.step(1, 1, METRICS)
    monitor.close()
    (event,) = read_json_lines(tmp_path / "events.jsonl")
    assert (event["name"], event["dropped"]) == ("trackio", 1)
    assert event["problem"] == "ImportError: trackio is not installed: pip install 'shoal[trackio]'"
    assert len(list(read_json_lines(tmp_path / "metrics.jsonl"))) == 1


BROKEN = {
    "refuses": """import socket; s = socket.socket(fileno=0); s.recv(65536); s.sendall(b'{"problem": "no"}\\n')""",
    "ends": "import socket; socket.socket(fileno=0).makefile().readline()",
}


@pytest.mark.parametrize(("behaviour", "problem"), [("refuses", "no"), ("ends", "has ended")])
def test_a_writer_that_cannot_start_says_why_and_leaves_no_process(tmp_path, behaviour, problem):
    command, before = (sys.executable, "-c", BROKEN[behaviour]), psutil.Process().children()
    with pytest.raises((RuntimeError, ConnectionError), match=problem):
        TrackioTracker(tmp_path, load_config([]), command=command)
    assert psutil.Process().children() == before
