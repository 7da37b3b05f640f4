"""The same words about a run in six places: terminal, show, top, report, page, summary.json."""

import json
import shutil
from pathlib import Path

import pytest

from rl.cli.main import main
from rl.dashboard.server import Dashboard, Stop
from rl.monitor.monitor import Monitor
from rl.monitor.progress import ProgressLine
from rl.runs.run_folder import RunFolder
from tests.rl.learning_rows import stored_rows
from tests.rl.training import small_config


def _told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def _readers_tell(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What each reader of a run's folder says of it."""
    where = (folder.name, "--root", str(folder.path.parent))
    told = {name: _told(capsys, name, *where) for name in ("show", "top")}
    _told(capsys, "report", *where, "--output", str(folder.path / "report.html"))
    page = Dashboard(folder.path.parent, Stop()).glance(folder, {})
    return told | {"report": (folder.path / "report.html").read_text(), "page": page["learning"]["sentence"]}


def test_show_top_report_and_page_say_in_the_same_words_that_a_run_collapsed(  # faults F1
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(path=Path(shutil.copytree(runs / "first-run", tmp_path / "runs" / "first-run")))
    lines = [
        json.dumps(row | {"policy_version": row["step"], "time_s": 1.0, "eval/n": 1000})
        for row in stored_rows("collapsed")
    ]
    folder.metrics.write_text("\n".join(lines) + "\n")
    monitor = Monitor(folder.path, small_config(tmp_path))
    sentence = monitor.verdict().learning.sentence
    monitor.close()
    assert sentence.startswith("collapsed at step 2: ") and "the learning rate" in sentence
    for place, told in _readers_tell(folder, capsys).items():
        assert sentence in told, place


def test_the_terminal_says_a_verdict_when_it_becomes_another_and_a_resumed_run_does_not_repeat_it(  # faults F1
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(tmp_path)
    monitor = Monitor(tmp_path, config, progress=ProgressLine(total_steps=12, max_staleness=2))
    rows = [row for row in stored_rows("collapsed") if row["kind"] == "step"]
    for row in rows[:8]:
        monitor.step(row["step"], row["step"], {key: value for key, value in row.items() if "/" in key})
    monitor.close()
    assert capsys.readouterr().out.count("\ncollapsed at step 2: training reward 0.439, now 0.148") == 1
    resumed = Monitor(tmp_path, config, progress=ProgressLine(total_steps=12, max_staleness=2))
    resumed.step(9, 9, {key: value for key, value in rows[8].items() if "/" in key})
    resumed.close()
    assert resumed.verdict().learning.state == "collapsed" and "collapsed" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_run_with_a_learning_rate_of_0_3_says_so_in_all_six_places(  # faults F1
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["env=calculator", "cluster=inprocess", "steps=6", "evaluation.every=0", "evaluation.final_tasks=60"]
    words += ["learner.optimizer.lr=0.3", "learner.optimizer.warmup_steps=0", "rollout.groups_per_step=4"]
    words += [f"run.root={tmp_path / 'runs'}", "run.name=hot", "monitor.wandb=disabled"]
    terminal = _told(capsys, "train", *words)
    folder = RunFolder(path=tmp_path / "runs" / "hot")
    told = json.loads(folder.summary.read_text())
    assert told["learning"]["state"] == "collapsed" and told["learning"]["first_bad_step"] == 2
    assert told["verdict"].startswith("collapsed at step 2: ") and "learning rate" in told["verdict"]
    places = _readers_tell(folder, capsys) | {"terminal": terminal}
    assert [place for place, text in places.items() if told["verdict"] not in text] == []
    assert told["throughput"] != told["verdict"]
