"""The page of the first ten minutes, typed into one shell: every command succeeds and shows what the page shows."""

import contextlib
import importlib.metadata
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.documentation import DOCS, ROOT, blocks, examples, looks_as_shown

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

PAGE = DOCS / "first-ten-minutes.md"
MARK = "@@ typed by the test: "
SAID = r" *(user|assistant|tool|ended|- turn)\b.*"
VERDICT = r"(no learning verdict yet|learning|solved|flat|[a-z]+-bound|synchronous|balanced): .*"
VARIES = re.compile(rf"^({SAID}|{VERDICT})\n", re.MULTILINE)
"""What a model said, and the two sentences of a verdict."""
REFUSED = ("shoal trian", "shoal train env=calculator rollout.max_stalenes=4")
"""Commands that the page mistypes."""


LIKE_SETUP = """
import site
import sys
from importlib.machinery import PathFinder

ABSENT, find = frozenset({absent!r}), PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    elsewhere = [folder for folder in sys.path if folder not in site.getsitepackages()]  # Ray brings some of its own
    return find(name, elsewhere if path is None and name in ABSENT else path, target)


PathFinder.find_spec = classmethod(find_spec)
"""
"""Python whose site-packages do not hold the modules `absent`."""


def brought_by(name: str, extras: list[str]) -> set[str]:
    """Distributions that `pip install name[extras]` installs, as far as they are installed here."""
    todo = [(name, extra) for extra in ("", *extras)]
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for wanted in map(Requirement, importlib.metadata.requires(name) or []):
                if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                    new = {(canonicalize_name(wanted.name), each) for each in ("", *wanted.extras)} - seen
                    seen |= new
                    todo += new
    return {name for name, _ in seen}


def absent_after_setup() -> set[str]:
    """Modules of this environment that `make setup` does not install."""
    setup = (ROOT / "Makefile").read_text().partition("setup-test:")[0]
    (extras,) = re.findall(r"-e '\.\[([a-z,]+)\]'$", setup, re.MULTILINE)
    brought = brought_by("shoal", extras.split(","))
    owners = importlib.metadata.packages_distributions()
    return {module for module, names in owners.items() if not {canonicalize_name(name) for name in names} & brought}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What `make demo` finds in a checkout where `make setup` was run: the Makefile and an environment with `shoal`."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("shoal", "-m rl.cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    (programs / "activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    (tmp_path / "sitecustomize.py").write_text(LIKE_SETUP.format(absent=sorted(absent_after_setup())))
    for stamp in (".torch", ".installed"):  # newest last: make has nothing left to do
        (tmp_path / ".venv" / stamp).touch()
    return tmp_path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def typed_into_one_shell(commands: list[str], folder: Path) -> list[tuple[int, str]]:
    """(exit code, output) of each. Whatever the shell started is gone afterwards."""
    script = "exec 2>&1\n" + "".join(f"{command}\nprintf '\\n%s%s\\n' '{MARK}' \"$?\"\n" for command in commands)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=kept | {"PYTHONPATH": f"{folder}:{ROOT}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = shell.communicate(timeout=560)
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
    pieces = f"\n{output}".split(f"\n{MARK}")
    codes = [int(piece.partition("\n")[0]) for piece in pieces[1:]]
    shown = [pieces[0], *(piece.partition("\n")[2] for piece in pieces[1:-1])]
    return list(zip(codes, shown, strict=True))


@pytest.mark.skipif(shutil.which("make") is None or shutil.which("curl") is None, reason="apt-get install make curl")
def test_the_first_ten_minutes_are_as_written(checkout: Path) -> None:
    page = [example for block in blocks(PAGE) for example in examples(block)]
    port = str(free_port())
    commands = [command.replace("8765", port).replace("shoal dash", f"shoal dash --port {port}") for command, _ in page]
    results = typed_into_one_shell(commands, checkout)
    assert len(results) == len(page)
    wrong = [
        f"$ {command} [{code}]\n{got[-3000:]}"
        for (command, want), (code, got) in zip(page, results, strict=True)
        if code != (2 if command in REFUSED else 0) or not looks_as_shown(VARIES.sub("", want), VARIES.sub("", got))
    ]
    assert wrong == [], "\n".join(wrong)
