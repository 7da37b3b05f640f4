"""shoal completion: the candidates for a line, and bash itself asking for them."""

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rl.cli.main import COMMANDS, SHOAL, main
from rl.cli.shell_completion import SCRIPTS, candidates

ROOT = Path(__file__).resolve().parents[2]


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


def fish(shoal: Path, line: str) -> list[str]:
    """What fish would offer at the end of a line."""
    script = "shoal completion fish | source; complete -C $argv"
    path = f"{shoal.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["fish", "-N", "-c", script, line],
        cwd=shoal.parent,
        env=os.environ | {"PATH": path, "HOME": str(shoal.parent)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return [offer.partition("\t")[0] for offer in done.stdout.split("\n") if offer]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("fish") is None, reason="apt-get install fish")
def test_fish_completes_commands_settings_and_where_nothing_is_known_files(shoal):
    assert fish(shoal, "shoal sho") == ["show"]
    assert fish(shoal, "shoal train env=calc") == ["env=calculator"]
    assert fish(shoal, "shoal train rollout.lock=t") == ["rollout.lock=trajectory", "rollout.lock=turn"]
    assert fish(shoal, "shoal show --root sho") == ["shoal"]  # a file


class Zsh:
    """A real zsh in a terminal of its own. Ctrl-T writes the line as it stands into a file."""

    def __init__(self, shoal: Path, setup: str) -> None:
        self.line = shoal.parent / "line"
        setup = (
            f"cd {shoal.parent}; path=({shoal.parent} $path); autoload -Uz compinit; {setup}; PS1='ready'\n"
            f'told() {{ print -r -- "$BUFFER|" > {self.line}.new; mv {self.line}.new {self.line} }}\n'
            "zle -N told; bindkey '^T' told\n"
        )
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execvpe("zsh", ["zsh", "-f", "-i"], os.environ | {"TERM": "dumb", "ZDOTDIR": str(shoal.parent)})
        os.write(self.terminal, setup.encode())

    def completed(self, line: str) -> str:
        """The line after Tab, with "|" where it ends."""
        os.write(self.terminal, line.encode() + b"\t\x14")
        until = time.monotonic() + 100
        while not self.line.exists():
            assert time.monotonic() < until, "zsh did not answer in 100 s"
            if select.select([self.terminal], [], [], 0.1)[0]:
                os.read(self.terminal, 65536)
        told = self.line.read_text().strip()
        self.line.unlink()
        os.write(self.terminal, b"\x15")  # an empty line for the next
        return told

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="apt-get install zsh")
@pytest.mark.parametrize("installed", ["sourced", "in fpath"])
def test_zsh_completes_commands_settings_and_where_nothing_is_known_files(shoal, installed):
    if installed == "sourced":
        setup = "compinit -u -D; source <(shoal completion zsh)"
    else:
        (shoal.parent / "functions").mkdir()
        (shoal.parent / "functions" / "_shoal").write_text(SCRIPTS["zsh"])
        setup = f"fpath=({shoal.parent}/functions $fpath); compinit -u -D"
    zsh = Zsh(shoal, setup)
    try:
        assert zsh.completed("shoal sho") == "shoal show |"
        assert zsh.completed("shoal train env=calc") == "shoal train env=calculator |"
        assert zsh.completed("shoal train rollout.max_stal") == "shoal train rollout.max_staleness=|"
        assert zsh.completed("shoal show --root func") in ("shoal show --root functions/|", "shoal show --root func|")
    finally:
        zsh.close()


def test_an_unknown_shell_is_told_in_words(capsys):
    assert main(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err
