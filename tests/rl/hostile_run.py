"""A run folder with an attack in every text that it stores, each marked with the field it lies in."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import yaml

from tests.rl.dashboard_runs import make_run

ATTACKS = (
    "<script>window.attacked=1;alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    '</title></pre></textarea></select><svg onload=alert(3)><iframe srcdoc="<script>alert(3)</script>">',
    '<a href="javascript:alert(4)">a</a>javascript:alert(4)',
    '<link rel=stylesheet href=//evil.example/a><b style="background:url(//evil.example/b)">',
    "${alert(6)}{{7*7}}&lt;img src=x onerror=alert(6)&gt;&#60;script&#62;\u2028\u202e\x1b[31m",
)
FREE = ("arguments", "meta", "reward_parts")
"""JSON objects whose keys come from models and environments, too."""
KEPT = ("trajectories.prompt.content.image_sha256", "images.sha256", "trajectories.id")
"""Names of things that must be found; attacks in them lead to what is not there (trajectory ids get theirs apart)."""


def marked(field: str, attack: str) -> str:
    """What is stored in `field`. Example: marked("groups.worker", "<b>") -> "groups.worker: <b>"."""
    return f"{field}: {attack}"


def all_marked(field: str) -> str:
    """For a field that a run has once: every attack."""
    return "\n".join(marked(field, attack) for attack in ATTACKS)


def file_name(field: str, attack: str) -> str:
    return marked(field, attack).replace("/", "|")


def make_hostile_run(root: Path) -> tuple[Path, set[str]]:
    """The folder, and the fields that hold attacks. Row 2k + 1 of trajectories.db has the k-th attack in all its texts.

    Written into the files: our own writers would refuse some of it, and a folder may come from another machine.
    """
    path = make_run(root)
    fields: set[str] = set()
    _fill_trajectories(path / "trajectories.db", fields)
    _fill_ledger(path / "ledger.sqlite", fields)
    _fill_lines(path, fields)
    once = {name: all_marked(f"run.{name}") for name in ("error", "host")}
    state = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(state | once | {"status": "failed"}))
    (path / "summary.json").write_text(json.dumps({"env": all_marked("summary.env")}))
    (path / "notes.json").write_text(json.dumps({"note": all_marked("notes.note"), "tags": list(ATTACKS)}))
    config = {marked("config.key", a): marked("config.value", a) for a in ATTACKS}
    (path / "config.yaml").write_text(yaml.safe_dump({"policy": {"dialect": "tiny"}, "env": config}))
    manifest: dict[str, Any] = {marked("manifest.key", a): [marked("manifest.value", a)] for a in ATTACKS}
    swept = {marked("sweep.key", a): marked("sweep.value", a) for a in ATTACKS}
    manifest["sweep"] = {"id": all_marked("sweep.id"), "number": 1, "of": 1, "settings": swept}
    (path / "manifest.json").write_text(json.dumps(manifest))
    for attack in ATTACKS:
        (path / "logs" / f"{file_name('log.name', attack)}.log").write_text(all_marked("log.text"))
        folder = root / file_name("folder", attack)
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(state | {"status": attack}))  # no status: the fault names it
    fields |= {*(f"run.{name}" for name in once), "summary.env", "config.key", "config.value", "manifest.key"}
    fields |= {"sweep.id", "sweep.key", "sweep.value"}
    return path, fields | {"notes.note", "manifest.value", "log.name", "log.text", "folder"}


def _fill_trajectories(path: Path, fields: set[str]) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA ignore_check_constraints = 1")
        columns = [column[1] for column in db.execute("PRAGMA table_info(trajectories)")]
        texts = _text_columns(db, "trajectories")
        first, second = (db.execute(f"SELECT * FROM trajectories WHERE row = {row}").fetchone() for row in (1, 2))
        error = json.dumps({"kind": "env", "where": "step", "message": "", "traceback": ""})
        db.execute("DELETE FROM trajectories")
        for k, attack in enumerate(ATTACKS):
            for member, stored in enumerate((first, second)):
                values = dict(zip(columns, stored, strict=True)) | {"row": 2 * k + member + 1, "error": error}
                for name in texts:
                    values[name] = _attacked(f"trajectories.{name}", values[name], attack, fields)
                values["id"] = marked("trajectories.id", f"{attack}{member}")
                values["group_id"] = marked("groups.group_id", attack)
                values["split"] = "train" if k else values["split"]  # of one split the filters find the rest
                db.execute(
                    f"INSERT INTO trajectories VALUES ({', '.join('?' for _ in columns)})",
                    [values[name] for name in columns],
                )
    fields |= {"trajectories.id"}
    fields -= {"trajectories.group_id"}


def _fill_ledger(path: Path, fields: set[str]) -> None:
    states = ("queued", "leased", "committed", "consumed", "dropped", "")
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA ignore_check_constraints = 1")
        texts = _text_columns(db, "groups")
        db.execute("DELETE FROM groups")
        for state, attack in zip(states, ATTACKS, strict=True):
            values = {name: _attacked(f"groups.{name}", "", attack, fields) for name in texts}
            values["state"] = state or all_marked("groups.state")
            if state == "dropped":
                values["reason"] = all_marked("groups.reason")
            columns = ", ".join(values)
            db.execute(f"INSERT INTO groups ({columns}) VALUES ({', '.join('?' for _ in values)})", [*values.values()])
        texts = _text_columns(db, "events")
        db.execute("DELETE FROM events")
        for k, attack in enumerate(ATTACKS, start=1):
            values = {name: _attacked(f"events.{name}", "", attack, fields) for name in texts}
            values |= {"ordinal": k, "unix_s": (0.0, 1e300, attack)[k % 3]}
            columns = ", ".join(values)
            db.execute(f"INSERT INTO events ({columns}) VALUES ({', '.join('?' for _ in values)})", [*values.values()])


def _fill_lines(path: Path, fields: set[str]) -> None:
    """Rows of metrics, events and spans; metrics in every panel that takes names from outside."""
    areas = ("reward", "eval/success", "curriculum", "off_policy/lag/count", "stop", "rows", "selection_bias")
    names = {f"{area}/{marked('metric', attack)}": 0.5 for area in areas for attack in ATTACKS}
    metrics = [{"kind": "step", "step": n, "time_s": float(n), "reward/mean": 0.5} | names for n in (1, 2, 3)]
    note = [{"kind": marked("metric.kind", attack), "step": 3, "note": attack} for attack in ATTACKS]
    events = []
    for attack in ATTACKS:
        alert = {"rule": "", "level": "", "text": "", "value": "", "threshold": ""}
        alert = _attacked("alert", alert, attack, fields) | {
            "kind": "alert",
            "state": "raised",
            "time_s": 1.0,
            "step": 1,
        }
        other = {"kind": "", "worker": "", "error": "", "more": [{"deep": ""}]}
        events += [alert, _attacked("event", other, attack, fields) | {marked("event.key", attack): 1}]
    spans = [
        _attacked("span", {"process": "", "activity": ""}, attack, fields) | {"start_s": 0.0, "end_s": 1.0}
        for attack in ATTACKS
    ]
    for name, rows in (("metrics", [*metrics, *note]), ("events", events), ("spans", spans)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields |= {"metric", "event.key"}


def _text_columns(db: sqlite3.Connection, table: str) -> list[str]:
    """As the file says: a column that is added one day is attacked from then on."""
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})") if row[2] == "TEXT"]


def _attacked(field: str, value: Any, attack: str, fields: set[str]) -> Any:
    """`value` with every text in it replaced; JSON is written anew around its texts."""
    if field in KEPT:
        return value
    if isinstance(value, str) and value[:1] in ("{", "["):
        return json.dumps(_attacked(field, json.loads(value), attack, fields))
    if isinstance(value, list):
        return [_attacked(field, item, attack, fields) for item in value]
    if isinstance(value, dict):
        if field.rpartition(".")[2] in FREE:
            fields |= {f"{field}.key", f"{field}.value"}
            return {"printed": marked(f"{field}.value", attack), marked(f"{field}.key", attack): 1}
        return {name: _attacked(f"{field}.{name}", item, attack, fields) for name, item in value.items()}
    if isinstance(value, int | float) or (value is None and field.endswith("tool_result")):
        return value
    fields.add(field)
    return marked(field, attack)
