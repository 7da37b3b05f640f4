"""shoal completion: the candidates for a line, and bash itself asking for them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rl.cli import COMMANDS, SHOAL, main
from rl.completion import SCRIPTS, candidates

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("shoal sh", ["show"]),
        ("shoal nothing ", []),
        ("shoal env pl", ["play"]),
        ("shoal env check Calc", ["Calculator-v0"]),
        ("shoal train env=calc", ["env=calculator"]),
        ("shoal train seed=2 rollout.max_stal", ["rollout.max_staleness="]),
        ("shoal train rollout.lock=t", ["rollout.lock=turn", "rollout.lock=trajectory"]),
        ("shoal train steps=", []),
        ("shoal audit --js", ["--json"]),
        ("shoal completion z", ["zsh"]),
    ],
)
def test_what_may_stand_at_the_end_of_a_line(line, words):
    assert candidates(line, SHOAL) == words


def test_every_command_is_offered():
    assert candidates("shoal ", SHOAL) == list(COMMANDS)


def test_runs_of_the_folder_that_the_line_names_are_offered(runs):
    assert candidates(f"shoal show --root {runs} ", SHOAL) == ["latest", "second-run", "first-run"]
    assert candidates(f"shoal show --root {runs} fi", SHOAL) == ["first-run"]
    assert candidates("shoal show --root ", SHOAL) == []  # a folder: the shell's business


@pytest.fixture
def shoal(tmp_path) -> Path:
    """A `shoal` of this checkout to put on PATH."""
    program = tmp_path / "shoal"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m rl.cli "$@"\n')
    program.chmod(0o755)
    return program


def bash(shoal: Path, line: str) -> list[str]:
    """What bash would offer at the end of a line, with "=" breaking words as it does in an interactive shell."""
    script = (
        'source <("$1" completion bash); COMP_WORDBREAKS=$\' \\t\\n"\\\'><=;|&(:\'; COMP_LINE="$2"; '
        'COMP_POINT=${#2}; _shoal "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(shoal), line], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes_a_command_and_the_value_behind_an_equals_sign(shoal):
    assert bash(shoal, "shoal sho") == ["show"]
    assert bash(shoal, "shoal train env=calc") == ["calculator"]  # bash itself keeps what stands before the "="


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_their_script(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    subprocess.run([shell, "-n"], input=SCRIPTS[shell], text=True, timeout=60, check=True)


def test_an_unknown_shell_is_told_in_words(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
