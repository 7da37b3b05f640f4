"""`shoal env`: list, check, play by standard input, new, and the pytest plugin."""

import importlib
import io
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rl.cli.environments.env_play import tool_lines
from rl.cli.environments.scaffold import write_scaffold
from rl.cli.main import main
from rl.cli.pytest_plugin import shoal_env_check

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["env", *words])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def child(folder: Path, *command: str, timeout_s: float = 100) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


# --- check


def test_a_check_prints_a_table_and_an_episode_and_ends_with_0(capsys):
    code, out, _ = run(capsys, "check", "Calculator-v0", "--levels", "0", "--seeds", "2")
    assert code == 0 and "the oracle scores 1.0 at every level" in out
    assert "[call add(" in out and "Calculator-v0: passed" in out


def test_a_failed_check_ends_with_1_and_its_last_line_is_json(capsys):
    words = ("check", "tests.envs.checker_envs:PaysNan", "--levels", "0", "--seeds", "2", "--json")
    code, out, _ = run(capsys, *words)
    found = json.loads(out.splitlines()[-1])
    assert code == 1 and found["id"] == "tests.envs.checker_envs:PaysNan" and found["passed"] is False
    assert [name for name, passed in found["probes"].items() if not passed] == ["garbage"]
    assert found["failures"]["garbage"]["level"] == 0


def test_a_check_with_arguments_names_them_in_the_command_that_shows_a_failure_again(capsys):
    words = ("check", "tests.envs.small_envs:RewardOf", "--levels", "0", "--seeds", "2", "--kwargs", '{"kind": "list"}')
    code, out, _ = run(capsys, *words)
    assert (
        code == 1
        and """shoal env play tests.envs.small_envs:RewardOf --seed 0 --level 0 --kwargs '{"kind": "list"}'""" in out
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "Calculater-v0"], "did you mean 'Calculator-v0'?"),
        (["check", "Calculator-v0", "--levels", "10"], "0 to 9"),
        (["check", "Calculator-v0", "--levels", "low"], "--levels"),
        (["check", "Calculator-v0", "--seeds", "1"], "2 or more"),
        (["check"], "ID"),
        (
            ["check", "ApiDesk-v0", "--kwargs", "{http: true}"],
            "a JSON object, such as '{\"max_turns\": 4}'; got '{http",
        ),
        (["play", "ApiDesk-v0", "--kwargs", "[1]"], "a JSON object"),
        (["serve", "ApiDesk-v0", "--as", "mcp", "--kwargs", "7"], "a JSON object"),
        (["check", "Calculator-v0", "--kwargs", '{"turns": 2}'], "its arguments are: max_turns"),
        (["play", "Calculator-v0", "--kwargs", '{"turns": 2}'], "its arguments are: max_turns"),
        (["serve", "Calculator-v0", "--as", "mcp", "--kwargs", '{"turns": 2}'], "its arguments are: max_turns"),
        (["serve", "Calculator-v0", "--as", "openenv", "--kwargs", '{"turns": 2}'], "its arguments are: max_turns"),
        (["play", "Calculator-v0", "--level", "12"], "0..9"),
        (["new", "My-Shop"], "cannot be the name of a module"),
        (["new", "json"], "cannot be the name of a module"),
        (["chekc", "Calculator-v0"], "Did you mean 'check'?"),
    ],
)
def test_bad_usage_is_told_in_words_and_ends_with_2(capsys, words, told):
    code, _, err = run(capsys, *words)
    assert code == 2 and told in err


# --- play


def test_a_person_plays_with_calls_hints_and_an_answer(capsys, monkeypatch):
    typed(monkeypatch, ":help", ":oracle", "add 53 b=98", ":oracle", ":nonsense", "add 1 2 3", "151")
    code, out, _ = run(capsys, "play", "Calculator-v0", "--seed", "0")
    assert code == 0 and "user: 53+98=?" in out and "add a:integer b:integer" in out
    assert "[call add(a=53, b=98)]" in out and "tool: 151" in out and "assistant: 151" in out
    assert "unknown command ':nonsense'" in out and "'3' is left over" in out
    assert "ended: reward 1 (reward 1)" in out


def test_what_begins_like_a_call_can_be_said_and_the_end_of_input_leaves_the_game(capsys, monkeypatch):
    typed(monkeypatch, "say add", ":say add 1 2")
    assert "ended: reward 0" in run(capsys, "play", "Calculator-v0")[1]
    typed(monkeypatch, "add 1 2")
    assert "left before the end" in run(capsys, "play", "Calculator-v0")[1]


def test_an_environment_is_played_with_the_arguments_that_it_is_given_and_so_is_its_oracle(capsys, monkeypatch):
    typed(monkeypatch, ":oracle", "login 1", "finish a 10")
    _, out, _ = run(capsys, "play", "ApiDesk-v0", "--kwargs", '{"max_turns": 2, "http": true}')
    assert "at most 2 messages" in out and "[call login(" in out and "the turn limit ended it" in out


def test_a_picture_is_saved_and_its_path_is_shown(capsys, monkeypatch):
    typed(monkeypatch, ":quit")
    _, out, _ = run(capsys, "play", "ChartQA-v0")
    path = Path(out.split("image: ")[1].split()[0])
    assert path.suffix == ".png" and path.read_bytes().startswith(b"\x89PNG")


def test_a_tool_is_listed_with_types_and_defaults():
    from tests.rollout.fakes_episode import ADD

    assert tool_lines([ADD]) == ["  add a:integer b:integer=1   Add two integers."]


# --- new and the plugin


@pytest.mark.slow
def test_a_new_environment_checks_green_by_its_own_test(capsys, tmp_path):
    code, out, _ = run(capsys, "new", "my_shop", "--path", str(tmp_path))
    assert code == 0 and "shoal env check my_shop:MyShop" in out and "shoal train env=my_shop:MyShop" in out
    folder = tmp_path / "my_shop"
    assert (folder / "my_shop.py").read_text().count("\n") <= 40
    package = tomllib.loads((folder / "pyproject.toml").read_text())
    assert package["project"]["entry-points"]["shoal.envs"] == {"MyShop-v0": "my_shop:MyShop"}
    done = child(folder, "pytest", "-q", "-p", "rl.cli.pytest_plugin")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert run(capsys, "new", "my_shop", "--path", str(tmp_path))[0] == 2


@pytest.mark.slow
def test_the_plugin_fails_a_test_with_the_report(tmp_path):
    code = (
        'def test_it(shoal_env_check):\n    shoal_env_check("tests.envs.checker_envs:PaysNan", levels=(0,), seeds=2)\n'
    )
    (tmp_path / "test_it.py").write_text(code)
    done = child(tmp_path, "pytest", "-q", "-p", "rl.cli.pytest_plugin")
    assert done.returncode == 1 and "garbage: answering 'nan' scores 1.00" in done.stdout


def test_the_plugin_is_offered_to_pytest_and_imports_nothing_of_shoal():
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    module = importlib.import_module(offered["shoal"])
    assert module.shoal_env_check is shoal_env_check
    code = "import sys, rl.cli.pytest_plugin\n"
    code += "sys.exit(any(m in sys.modules for m in ('envs', 'numpy', 'pydantic', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.slow
def test_a_new_environment_trains(tmp_path):
    folder = write_scaffold("my_shop", parent=tmp_path)
    sft = child(folder, "rl.cli.main", "sft", "env=my_shop:MyShop", "sft.steps=20", "sft.output=warm.safetensors")
    assert sft.returncode == 0, sft.stdout + sft.stderr
    words = ["policy.init=warm.safetensors", "cluster=inprocess", "experiment=smoke"]
    train = child(folder, "rl.cli.main", "train", "env=my_shop:MyShop", *words)
    assert train.returncode == 0, train.stdout + train.stderr
    assert json.loads((folder / "runs" / "latest" / "summary.json").read_text())["n"] == 8
