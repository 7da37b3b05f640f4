"""shoal diff: settings, versions and results of two runs."""

import json
import shutil

import pytest
import yaml

from rl.cli.main import main
from rl.cli.readers.diff import differences, success_difference
from rl.monitor.evaluation import wilson


def found(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_seed_is_the_only_setting_that_differs(runs, capsys):
    assert main(["diff", "first-run", "second", "--root", str(runs), "--json"]) == 0
    told = found(capsys)
    assert told["runs"] == ["first-run", "second-run"]
    assert told["settings"] == {"seed": [1, 2]} and told["versions"] == {}
    assert main(["diff", "first-run", "second-run", "--root", str(runs)]) == 0
    assert "versions: no difference" in capsys.readouterr().out


def test_a_run_does_not_differ_from_itself(runs, capsys):
    assert main(["diff", "latest", "latest", "--root", str(runs), "--json"]) == 0
    told = found(capsys)
    assert told["settings"] == told["versions"] == told["results"] == {}
    assert told["success_difference"][0] == 0.0


def test_settings_that_another_version_of_shoal_lacks_are_absent(runs, tmp_path, capsys):
    shutil.copytree(runs / "first-run", tmp_path / "old")
    config = yaml.safe_load((tmp_path / "old" / "config.yaml").read_text())
    config["rollout"]["forgotten"] = config["rollout"].pop("lock")
    (tmp_path / "old" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["diff", str(runs / "first-run"), str(tmp_path / "old"), "--json"]) == 0
    settings = found(capsys)["settings"]
    assert settings == {"rollout.lock": ["turn", "(absent)"], "rollout.forgotten": ["(absent)", "turn"]}


def test_hostile_text_cannot_paint_the_terminal(runs, tmp_path, capsys):
    shutil.copytree(runs / "first-run", tmp_path / "bad")
    config = yaml.safe_load((tmp_path / "bad" / "config.yaml").read_text())
    config["env"]["name"] = "\x1b[31m[red]x"
    (tmp_path / "bad" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["diff", str(runs / "first-run"), str(tmp_path / "bad")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[31m[red]x" in out


@pytest.mark.parametrize("text", [None, "a: [", "\x00"])
def test_a_config_that_is_missing_or_damaged_is_told_in_words(runs, tmp_path, capsys, text):
    shutil.copytree(runs / "first-run", tmp_path / "bad")
    (tmp_path / "bad" / "config.yaml").unlink()
    if text is not None:
        (tmp_path / "bad" / "config.yaml").write_text(text)
    assert main(["diff", str(tmp_path / "bad"), str(runs / "first-run")]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_differences_keep_the_order_and_name_what_is_absent():
    assert differences({"x": 1, "y": 2, "z": 0}, {"w": 4, "x": 1, "y": 3}) == {
        "y": [2, 3],
        "z": [0, "(absent)"],
        "w": ["(absent)", 4],
    }


def test_the_interval_of_a_difference_is_newcombes():
    """His example of table II: 56/70 against 48/80 is 0.2, 95 % from 0.0524 to 0.3339."""
    a = {"success_after": 48 / 80, "ci95": wilson(48, 80)}
    b = {"success_after": 56 / 70, "ci95": wilson(56, 70)}
    value, low, high = success_difference(a, b) or (0.0, 0.0, 0.0)
    assert (round(value, 4), round(low, 4), round(high, 4)) == (0.2, 0.0524, 0.3339)
    assert success_difference(a, {}) is None
