"""What the dashboard answers: equal to what is stored, bounded, and refused to whom it must be."""

import json
import os
import shutil
import sqlite3
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from conf.schema import LossConfig
from rl.dashboard.folders import find_run
from rl.dashboard.server import Dashboard, Stop
from rl.dashboard.span_trace import trace_json
from rl.runs.run_folder import RunFolder
from tests.rl.dashboard_runs import PNG, RUN, XSS, client, make_run, metric_rows

LIMITS = ("clip_low", "clip_high", "tis_cap")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dash")
    make_run(root)
    return root


def _rows(root: Path, sql: str) -> list[sqlite3.Row]:
    with sqlite3.connect(root / RUN / "trajectories.db") as db:
        db.row_factory = sqlite3.Row
        return db.execute(sql).fetchall()


def test_series_are_the_lines_of_metrics_with_all_four_axes(root: Path) -> None:
    answer = client(root)(f"/api/runs/{RUN}/series", keys="reward/mean,policy/entropy").json()["series"]
    steps = [row for row in metric_rows(root / RUN) if row["kind"] == "step"]
    assert answer["reward/mean"]["y"] == [row["reward/mean"] for row in steps]
    assert answer["reward/mean"]["time_s"] == [row["time_s"] for row in steps]
    assert answer["reward/mean"]["tokens"] == [10.0, 20.0, 30.0]
    assert answer["reward/mean"]["trajectories"] == [4.0, 8.0, 12.0]
    assert answer["policy/entropy"]["y"] == [1.0, None, 1.0]


def test_filters_give_the_rows_that_sql_gives(root: Path) -> None:
    ask = client(root)
    cases = {
        "min_reward=0.5": "reward >= 0.5",
        "status=consumed": "status = 'consumed'",
        "level=3&env=calc": "1",
        "level=4": "0",
        "min_staleness=2": "step - 1 - min_version >= 2",
        "min_staleness=1": "step - 1 - min_version >= 1",
        "stop=terminated&max_reward=0": "reward <= 0",
        "text=onerror%3Dalert": "1",
        "text=no+such+text": "0",
        "group=train/calc/1": "group_id = 'train/calc/1'",
    }
    for query, where in cases.items():
        wanted = [r["row"] for r in _rows(root, f"SELECT row FROM trajectories WHERE {where} ORDER BY row DESC")]
        assert [r["row"] for r in ask(f"/api/runs/{RUN}/trajectories?{query}").json()["rows"]] == wanted, query


def test_pages_cover_every_row_once(root: Path) -> None:
    ask, seen, before = client(root), [], 0
    while before is not None:
        answer = ask(f"/api/runs/{RUN}/trajectories", limit=3, before=before).json()
        seen += [row["row"] for row in answer["rows"]]
        before = answer["next"]
    assert seen == [4, 3, 2, 1]


def test_hostile_text_comes_as_json_text_and_images_by_their_bytes(root: Path) -> None:
    ask = client(root)
    response = ask(f"/api/runs/{RUN}/trajectory", row=1)
    episode = response.json()
    assert response.headers["content-type"] == "application/json"
    assert "script-src 'self';" in response.headers["content-security-policy"]
    assert "unsafe-eval" not in response.headers["content-security-policy"]
    assert episode["turns"][0]["message"]["tool_calls"][0]["arguments"] == {XSS: XSS}
    assert episode["turns"][0]["reply"][0]["tool_result"]["content"] == XSS
    assert episode["turns"][0]["versions"] == [0] and episode["turns"][1]["versions"] == [1]
    assert [sibling["row"] for sibling in episode["siblings"]] == [1, 2]
    image = ask(f"/api/runs/{RUN}/images/{episode['prompt'][0]['content'][1]['image_sha256']}")
    assert image.content == PNG
    assert image.headers["content-type"] == "image/png"  # the environment said text/html


def test_tokens_are_the_stored_arrays(root: Path) -> None:
    answer = client(root)(f"/api/runs/{RUN}/tokens", row=1, offset=2, limit=2).json()
    assert answer["id"] == [60, 62] and answer["text"] == ["<", ">"]
    assert answer["mask"] == [1, 1] and answer["rollout"] == [-1.0, -1.0] and answer["learner"] == [-0.5, -0.5]
    assert answer["num_tokens"] == 6
    loss = LossConfig()
    assert [answer[name] for name in LIMITS] == [loss.clip_low, loss.clip_high, loss.tis_cap]


@pytest.mark.parametrize("setting", ["learner=gspo", "learner.loss.anchor=proximal", "learner.updates_per_step=2"])
def test_a_loss_that_does_not_limit_the_stored_ratio_gives_no_limits_of_it(tmp_path: Path, setting: str) -> None:
    make_run(tmp_path, setting)
    answer = client(tmp_path)(f"/api/runs/{RUN}/tokens", row=1).json()
    assert [answer[name] for name in LIMITS] == [None, None, None]


def test_every_other_view_answers_from_the_files(root: Path) -> None:
    ask = client(root)
    assert [run["run"] for run in ask("/api/runs").json()["runs"]] == [RUN]
    facts = ask(f"/api/runs/{RUN}").json()
    assert facts["last"]["step"] == 3 and facts["trajectories"] == {"committed": 2, "consumed": 2}
    ledger = ask(f"/api/runs/{RUN}/ledger").json()
    assert ledger["audit"]["issued"] == 2 and ledger["audit"]["balanced"]
    assert [row["state"] for row in ledger["rows"]] == ["committed", "consumed"]
    workers = {w["process"]: w for w in ask(f"/api/runs/{RUN}/workers").json()["workers"]}
    assert workers["worker-0"]["tokens"] == 12 and workers["worker-0"]["tok_s"] == 12 / 6.0
    assert workers["worker-0"]["error"] == XSS and workers["worker-0"]["state"] == "lost"
    assert workers["learner"]["state"] is None
    assert ask(f"/api/runs/{RUN}/config").json()["config"]["learner.loss.clip_low"] == 0.2
    assert XSS in ask(f"/api/runs/{RUN}/logs", name="worker-0.log").json()["text"]
    assert ask(f"/api/runs/{RUN}/events").json()["events"][0]["kind"] == "checkpoint"
    assert ask(f"/api/runs/{RUN}/csv", keys="reward/mean").text.splitlines()[1] == "1.0,2.0,10.0,4.0,0.25"


def test_a_worker_that_came_back_keeps_its_error_and_one_that_took_weights_again_is_not_stale(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    events = [
        {"kind": "worker_restarted", "time_s": 2.0, "worker": "worker-0", "restarts": 1},
        {"kind": "weights_refused", "time_s": 3.0, "worker": "worker-1", "error": "another shape"},
        {"kind": "weights_refused", "time_s": 3.0, "worker": "worker-2", "error": "another shape"},
    ]
    spans = [("worker-1", 2.0), ("worker-2", 2.0), ("worker-2", 4.0)]  # when they took weights
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    with (folder / "spans.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"process": name, "activity": "sync", "start_s": end_s - 0.1, "end_s": end_s}) + "\n"
            for name, end_s in spans
        )
    told = client(tmp_path)(f"/api/runs/{RUN}/workers").json()["workers"]
    rows = {w["process"]: (w["state"], w.get("error"), w.get("restarts")) for w in told}
    assert rows["worker-0"] == ("healthy", XSS, 1)
    assert rows["worker-1"] == ("stale", "another shape", 0) and rows["worker-2"] == ("healthy", "another shape", 0)


def test_the_workers_of_a_run_that_has_ended_are_not_called_healthy(tmp_path: Path) -> None:
    folder = RunFolder(path=make_run(tmp_path))
    with folder.events.open("a") as file:
        file.write(json.dumps({"kind": "worker_restarted", "time_s": 2.0, "worker": "worker-0"}) + "\n")
        file.write(json.dumps({"kind": "worker_retired", "time_s": 2.0, "worker": "worker-1"}) + "\n")

    def states() -> dict[str, str | None]:
        told = client(tmp_path)(f"/api/runs/{RUN}/workers").json()["workers"]
        return {worker["process"]: worker["state"] for worker in told}

    assert states() == {"learner": None, "worker-0": "healthy", "worker-1": "retired"}
    folder.finish("finished")
    assert states() == {"learner": None, "worker-0": "was healthy", "worker-1": "retired"}
    state = json.loads(folder.run_json.read_text())
    folder.run_json.write_text(json.dumps(state | {"status": "running", "pid": 2**22 + 1}))  # its process is gone
    assert states()["worker-0"] == "was healthy"
    folder.run_json.write_text("{")
    assert states()["worker-0"] == "was healthy"


def test_the_glance_judges_the_stored_steps_and_tells_which_alerts_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "config.yaml").write_text("rollout:\n  max_staleness: 2\n")
    times = {"time/step": 10.0, "time/wait_for_batch": 5.7, "rollout/busy_s": 9.0, "note": XSS}
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"kind": "step", "step": n} | times) + "\n" for n in range(4, 9))
    alert = {"kind": "alert", "time_s": 1.0, "step": 4, "text": XSS, "value": 2.0, "threshold": 1.0}
    told = [alert | {"rule": rule, "state": "raised"} for rule in ("mismatch_kl", XSS)]
    told += [alert | {"rule": "mismatch_kl", "state": "cleared"}, {"kind": "alert", "rule": 3}]
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in told)
    answer = client(tmp_path)(f"/api/runs/{RUN}/glance").json()
    assert answer["sentence"] == "rollout-bound: the learner waits 57% of the time; add workers or raise max_staleness"
    assert [event["rule"] for event in answer["active"]] == [XSS]
    assert [event["state"] for event in answer["alerts"]] == ["cleared", "raised", "raised"]


def test_runs_of_equal_settings_but_seed_and_name_are_one_group(tmp_path: Path) -> None:
    text = "seed: {seed}\nsteps: {steps}\nenv:\n  seed: 3\n  name: calc\nrun:\n  name: {name}\n"
    for name, seed, steps in (("a", 1, 9), ("b", 2, 9), ("c", 2, 8)):
        folder = make_run(tmp_path / name).rename(tmp_path / f"run-{name}")
        (folder / "config.yaml").write_text(text.format(name=name, seed=seed, steps=steps))
    group = {run["run"]: run["group"] for run in client(tmp_path)("/api/runs").json()["runs"]}
    assert group["run-a"] == group["run-b"] != group["run-c"] != ""


def test_the_ledger_of_one_group_is_found_whatever_its_age(root: Path) -> None:
    rows = client(root)(f"/api/runs/{RUN}/ledger", group="train/calc/0", limit=1).json()["rows"]
    assert [(row["group_id"], row["state"], row["step"]) for row in rows] == [("train/calc/0", "consumed", 2)]


def test_the_lineage_of_a_group_is_its_events_and_that_of_an_old_ledger_says_less(root: Path, tmp_path: Path) -> None:
    told = client(root)(f"/api/runs/{RUN}/lineage", group="train/calc/0").json()
    assert [(e["event"], e["attempt"], e["worker"], e["step"]) for e in told["events"]] == [
        ("issued", None, None, None),
        ("leased", 1, "worker-0", None),
        ("committed", 1, "worker-0", None),
        ("consumed", 1, "worker-0", 2),
    ]
    assert told["story"].startswith("issued → leased to worker-0 (") and told["group"]["step"] == 2
    newest = client(root)(f"/api/runs/{RUN}/lineage", limit=3).json()
    assert [(e["group_id"], e["event"]) for e in newest["events"]] == [
        ("train/calc/0", "consumed"),
        ("train/calc/1", "committed"),
        ("train/calc/1", "leased"),
    ]
    assert newest["next"] == newest["events"][-1]["number"]
    assert client(root)(f"/api/runs/{RUN}/lineage", group="no such").status_code == 404
    folder = make_run(tmp_path)
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("DELETE FROM events WHERE event = 'issued'")
    ask = client(tmp_path)
    assert ask(f"/api/runs/{RUN}/lineage", group="train/calc/0").json()["story"] == ""
    with sqlite3.connect(folder / "ledger.sqlite") as db:
        db.execute("DROP TABLE events")
    assert ask(f"/api/runs/{RUN}/lineage", group="train/calc/0").json()["events"] == []
    assert ask(f"/api/runs/{RUN}/lineage").json() == {"events": [], "next": None}


def test_histograms_are_of_the_rows_that_the_step_trained(root: Path) -> None:
    answer = client(root)(f"/api/runs/{RUN}/histograms").json()
    assert (answer["step"], answer["n"]) == (2, 2)
    assert answer["staleness"] == {"counts": [2], "edges": [0.5, 1.5]}  # learner version 1, sampled from version 0 on
    assert answer["length"] == {"counts": [2], "edges": [5.5, 6.5]}
    (low, high), counts = answer["ratio"]["edges"], answer["ratio"]["counts"]
    assert counts == [6] and low < np.exp(0.5) < high  # three sampled tokens each, -0.5 against -1
    assert client(root)(f"/api/runs/{RUN}/histograms", step=9).json() == {
        "step": 9, "n": 0, "staleness": {}, "length": {}, "ratio": {}
    }  # fmt: skip


def test_staleness_is_in_versions_in_list_filter_histogram_and_heat_map_alike(tmp_path: Path) -> None:  # faults J9
    folder = make_run(tmp_path, "learner.updates_per_step=2")
    with sqlite3.connect(folder / "trajectories.db") as db:
        db.execute("UPDATE trajectories SET step = 10, min_version = 18, max_version = 18 WHERE status = 'consumed'")
    ask = client(tmp_path)  # at step 10 the learner began at version 18: what version 18 sampled is fresh
    rows = ask(f"/api/runs/{RUN}/trajectories", status="consumed").json()["rows"]
    assert len(rows) == 2 and [row["staleness"] for row in rows] == [0, 0]
    for least, found in ((0, 2), (1, 0)):
        assert len(ask(f"/api/runs/{RUN}/trajectories", min_staleness=least).json()["rows"]) == found
    assert ask(f"/api/runs/{RUN}/histograms").json()["staleness"] == {"counts": [2], "edges": [-0.5, 0.5]}
    heat = ask(f"/api/runs/{RUN}/heatmaps").json()["staleness"]
    (place,) = [k for k, (low, high) in enumerate(pairwise(heat["edges"])) if low <= 0 < high]
    assert heat["counts"][0][place] == 2


def test_each_newest_value_says_of_which_step_it_is(tmp_path: Path) -> None:  # faults F2
    folder = make_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 14, "time_s": 28.0, "policy/entropy": 0.5}\n')
    keys = {key["key"]: key for key in client(tmp_path)(f"/api/runs/{RUN}").json()["keys"]}
    assert (keys["policy/entropy"]["step"], keys["reward/mean"]["step"], keys["reward/mean"]["last"]) == (14, 3, 0.75)


def test_heat_maps_count_the_trained_rows_of_each_stretch_of_steps(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with sqlite3.connect(folder / "trajectories.db") as db:
        columns = [
            row[1] for row in db.execute("PRAGMA table_info(trajectories)") if row[1] not in ("row", "step", "id")
        ]
        for step in range(3, 203):  # 200 more steps of one trajectory each, one token longer every step
            picked = ", ".join("num_tokens + 1" if name == "num_tokens" else name for name in columns)
            db.execute(
                f"INSERT INTO trajectories (id, step, {', '.join(columns)}) SELECT 'more/{step}', {step}, {picked} "
                "FROM trajectories WHERE row = (SELECT MAX(row) FROM trajectories WHERE status = 'consumed')"
            )
        rows = db.execute("SELECT step, min_version, num_tokens FROM trajectories WHERE status = 'consumed'").fetchall()
    found = client(tmp_path)(f"/api/runs/{RUN}/heatmaps").json()
    steps = found["steps"]
    assert len(steps) == 60 and steps[0][0] == 2 and steps[-1][1] == 202
    assert all(before[1] + 1 == after[0] for before, after in pairwise(steps))
    for name, value in (("staleness", lambda row: row[0] - 1 - row[1]), ("length", lambda row: row[2])):
        edges = found[name]["edges"]
        for (first, last), counts in zip(steps, found[name]["counts"], strict=True):
            mine = [value(row) for row in rows if first <= row[0] <= last]
            assert counts == np.histogram(mine, bins=edges)[0].tolist(), (name, first)
    edges, counts = found["ratio"]["edges"], found["ratio"]["counts"]
    assert edges[0] == pytest.approx(np.exp(-1)) and edges[-1] == pytest.approx(np.exp(1))
    (place,) = [k for k in range(len(edges) - 1) if edges[k] <= np.exp(0.5) < edges[k + 1]]
    assert all(column[place] == sum(column) > 0 for column in counts)  # three sampled tokens each, -0.5 against -1
    (folder / "trajectories.db").unlink()
    assert client(tmp_path)(f"/api/runs/{RUN}/heatmaps").json() == {"steps": []}


def test_the_trace_has_every_span_of_a_long_run_in_pieces_of_bounded_size(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    num = 30_000
    rows = [
        {"process": f"worker-{n % 4}", "activity": "generate", "start_s": n * 1.0, "end_s": n + 0.5} for n in range(num)
    ]
    bad = ['{"process": "w", "activity": "a", "start_s": 1e999, "end_s": 2}', '{"process": 1}', "no JSON", "[]"]
    bad.append(json.dumps({"process": "w", "activity": "a", "start_s": 0, "end_s": 10**400}))
    lines = [json.dumps(row) for row in rows]
    (folder / "spans.jsonl").write_text("\n".join([*lines[:9], *bad, *lines[9:]]) + "\n")
    events = client(tmp_path)(f"/api/runs/{RUN}/perfetto.json").json()["traceEvents"]
    lanes = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [(lanes[e["pid"]], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6) for e in events if e["ph"] == "X"]
    assert spans == [(row["process"], row["activity"], row["start_s"], row["end_s"]) for row in rows]
    pieces = list(trace_json(RunFolder(path=folder), chunk_bytes=4096))
    assert json.loads("".join(pieces))["traceEvents"] == events and max(map(len, pieces)) < 3 * 4096
    (folder / "spans.jsonl").unlink()
    assert client(tmp_path)(f"/api/runs/{RUN}/perfetto.json").json() == {"traceEvents": []}


def test_the_newest_run_is_read_before_a_page_asks_and_nothing_is_read_where_there_is_none(tmp_path: Path) -> None:
    root = tmp_path / "link"
    root.symlink_to(tmp_path)
    board = Dashboard(root, Stop())
    board.read_newest()
    make_run(tmp_path)
    board.read_newest()
    assert list(board.tables._tables) == [find_run(root, RUN).metrics]  # the path that a page's questions name


def test_wrong_questions_are_answered_with_what_is_right(root: Path) -> None:
    ask = client(root)
    assert "filters: text, env" in ask(f"/api/runs/{RUN}/trajectories", rewrad=1).json()["error"]
    assert "from 1 to 200" in ask(f"/api/runs/{RUN}/trajectories", limit=10**6).json()["error"]
    assert ask(f"/api/runs/{RUN}/trajectory", row=99).status_code == 404
    assert ask(f"/api/runs/{RUN}/series").status_code == 400


def test_a_copied_folder_reads_without_the_right_to_write(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / RUN, tmp_path / RUN, symlinks=True)
    state = json.loads((tmp_path / RUN / "run.json").read_text())
    (tmp_path / RUN / "run.json").write_text(json.dumps(state | {"host": "elsewhere", "heartbeat_s": 1.0}))
    os.chmod(tmp_path / RUN, 0o500)
    try:
        ask = client(tmp_path)
        assert ask(f"/api/runs/{RUN}").json()["state"]["status"] == "crashed"
        assert len(ask(f"/api/runs/{RUN}/trajectories").json()["rows"]) == 4
    finally:
        os.chmod(tmp_path / RUN, 0o700)


def test_broken_files_are_told_and_break_nothing_else(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / "trajectories.db").write_bytes(b"no database" * 100)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe\n[1]\n{"kind": "step", "step": 1e999, "x": NaN, "reward/mean": 1e400}\n' + b"[" * 5000 + b"\n"
        )
        file.write(b'{"kind": "step", "step": 4, "reward/mean": 0.9')  # still being written
    ask = client(tmp_path)
    assert ask(f"/api/runs/{RUN}/trajectories").status_code == 400
    assert ask(f"/api/runs/{RUN}/series", keys="reward/mean").json()["series"]["reward/mean"]["n"] == 3
    (folder / "run.json").write_text("{")
    assert ask("/api/runs").json()["runs"][0]["fault"]
    assert ask(f"/api/runs/{RUN}").status_code == 422


def test_an_episode_too_large_is_named_and_not_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with sqlite3.connect(folder / "trajectories.db") as db:
        db.execute("UPDATE trajectories SET turns = '[' || hex(zeroblob(20000000)) || ']' WHERE row = 1")
    started = time.monotonic()
    answer = client(tmp_path)(f"/api/runs/{RUN}/trajectory", row=1)
    assert answer.json()["too_large"] > 40_000_000 and len(answer.content) < 100_000
    assert time.monotonic() - started < 5.0


def test_a_page_may_ask_for_one_axis_alone(root: Path) -> None:
    ask = client(root)
    series = ask(f"/api/runs/{RUN}/series", keys="reward/mean", axis="step").json()["series"]["reward/mean"]
    assert series == {"n": 3, "y": [0.25, 0.5, 0.75], "step": [1.0, 2.0, 3.0]}
    refused = ask(f"/api/runs/{RUN}/series", keys="reward/mean", axis="y")
    assert refused.status_code == 400 and "axis is one of step, time_s" in refused.json()["error"]
