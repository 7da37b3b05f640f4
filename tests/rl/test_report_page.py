"""shoal report: one file, nothing loaded, every number as stored, no text of a model taken for markup."""

import base64
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rl.cli.main import main
from rl.cli.readers.report_page import page
from rl.monitor.progress import visible
from rl.runs.run_folder import RunFolder

pytestmark = pytest.mark.slow

HOSTILE = (
    "<script>alert(1)</script>",
    "</pre><img src=x onerror=alert(1)>",
    "\"'><svg/onload=alert(1)>",
    "&lt;script&gt;",
    "\x1b[31m\u202egnp.exe",
)


class Tags(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_holds_result_curves_transcripts_settings_and_versions(runs):
    text = page(RunFolder(path=runs / "first-run"))
    shown = " ".join(Tags(text).words)
    summary = json.loads((runs / "first-run" / "summary.json").read_text())
    manifest = json.loads((runs / "first-run" / "manifest.json").read_text())
    low, high = summary["ci95"]
    assert f"success {summary['success_before']:.3f} to {summary['success_after']:.3f}" in shown
    assert f"95% interval {low:.3f} to {high:.3f}, {summary['n']} held-out tasks" in shown
    assert all(visible(transcript) in shown for transcript in summary["transcripts"])
    assert "rollout.groups_per_step" in shown and manifest["packages"]["torch"] in shown


def test_the_page_is_one_file_that_loads_nothing_and_runs_nothing(runs, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["report", "first-run", "--root", str(runs), "-o", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"path": str(path), "bytes": path.stat().st_size}
    tags = Tags(path.read_text()).tags
    assert {"script", "link", "iframe", "a", "form"}.isdisjoint(tag for tag, _ in tags)
    pictures = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(pictures) == 6
    for picture in pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert "default-src 'none'" in path.read_text()


def test_the_page_says_what_limited_the_run_and_which_alerts_there_were(runs, tmp_path):
    folder = RunFolder(path=Path(shutil.copytree(runs / "first-run", tmp_path / "alerted")))
    alert = {"kind": "alert", "time_s": 3.0, "step": 2, "rule": "env_errors", "state": "raised", "value": 0.5}
    folder.events.write_text(json.dumps(alert | {"threshold": 0.05, "text": "environments fail <b>"}) + "\n")
    steps = [{"kind": "step", "step": n, "time/step": 10.0, "time/wait_for_batch": 5.7} for n in range(1, 4)]
    folder.metrics.write_text("".join(json.dumps(row | {"rollout/busy_s": 9.0}) + "\n" for row in steps))
    shown = " ".join(Tags(page(folder)).words)
    assert "the learner waits 57% of the time" in shown
    assert all(word in shown for word in ("env_errors", "raised", "0.05", "environments fail <b>"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_every_field_stays_text(runs, tmp_path, text):
    folder = RunFolder(path=Path(shutil.copytree(runs / "first-run", tmp_path / "bad")))
    plain = Tags(page(folder)).tags
    for path in (folder.summary, folder.manifest, folder.run_json):
        path.write_text(json.dumps(poisoned(json.loads(path.read_text()), text)))
    config = folder.config.read_text().replace("name: tool_gate", f"name: {json.dumps(text)}")
    folder.config.write_text(config)
    rows = [json.loads(line) | {"kind": text} for line in folder.events.read_text().splitlines()]
    folder.events.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = page(folder)
    dangerous = {"script", "svg", "style", "iframe"}
    tags = Tags(seen).tags
    assert [t for t, _ in tags if t in dangerous] == ["style"]
    assert sum(tag == "img" for tag, _ in tags) == sum(tag == "img" for tag, _ in plain)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "\x1b" not in seen and "\u202e" not in seen


def poisoned(value: object, text: str) -> object:
    """Every string replaced, but for what `run.json` must hold to be read."""
    if isinstance(value, dict):
        kept = ("status", "host", "pid_started")
        return {key: item if key in kept else poisoned(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, text) for item in value]
    return text if isinstance(value, str) else value


def test_a_run_that_is_still_at_its_beginning_has_a_page_too(runs, tmp_path):
    folder = RunFolder(path=Path(shutil.copytree(runs / "first-run", tmp_path / "young")))
    for path in (folder.summary, folder.metrics, folder.events, folder.manifest):
        path.unlink()
    assert "no step yet" in page(folder)
