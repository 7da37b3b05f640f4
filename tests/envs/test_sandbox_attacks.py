"""No attack of sandbox_attacks.py gets out of a sandbox, and no cheat is paid, as root and as nobody; each attack
succeeds without a sandbox."""

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.envs.sandbox_attacks import ATTACKS, CHEATS

pytestmark = [pytest.mark.slow, pytest.mark.sandbox, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]
WANTED = {"attacks": ATTACKS, "cheats": CHEATS}
ALL = [(kind, what) for kind in ("jail", "bwrap") for what in WANTED]


def started(python: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run an interpreter on this checkout; another than ours finds our packages too."""
    environment = {**os.environ, "TOKEN": "secret", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
    return subprocess.run([*python, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)


@functools.cache
def python_of_nobody(what: str) -> list[str]:
    """A command of an interpreter with which the user nobody can play `what` here; skips where there is none."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become nobody, with setpriv")
    module = {"attacks": "envs.sandbox.sandbox", "cheats": "envs.library.py_code"}[what]
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*NOBODY, python]
        # setpriv itself may start what nobody may not; so this Python must be able to start itself again
        try_it = (
            f"import sys; assert sys.version_info >= (3, 11); import {module}; "
            "import envs.sandbox.sandbox as s; s.run_code('', sandbox='none')"
        )
        if started(command, "-c", try_it).returncode == 0:
            return command
    pytest.skip(f"nobody can start no Python here that has what {module} needs")


def gets_through(python: list[str], kind: str, what: str = "attacks") -> dict[str, object]:
    """Of each that failed how it ended, of the others True. Skips where this kind cannot work for that user."""
    opened = started(python, "-c", f"from envs.sandbox.sandbox import open_sandbox as o; o({kind!r}).close()")
    if "SandboxUnavailable" in opened.stderr:
        pytest.skip(opened.stderr.strip().splitlines()[-1])
    done = started(python, "-m", "tests.envs.sandbox_attacks", kind, what)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.keys() == WANTED[what].keys()
    return results


def test_every_attack_succeeds_without_isolation() -> None:
    """Or the tests below would pass for nothing. As nobody where we are root: some are at home only there."""
    python = python_of_nobody("attacks") if os.getuid() == 0 else [sys.executable]
    failed: dict[str, object] = dict.fromkeys(ATTACKS, "not tried")
    for _ in range(3):  # an attack that got through once gets through: a busy machine cuts some short
        results = gets_through(python, "none")
        failed = {name: results[name] for name in failed if results[name] is not True}
        if not failed:
            break
    if "Function not implemented" in str(failed.get("io_uring")):  # some kernels have none
        del failed["io_uring"]
    assert failed == {}


@pytest.mark.parametrize(("kind", "what"), ALL)
def test_nothing_gets_through_as_this_user(kind: str, what: str) -> None:
    results = gets_through([sys.executable], kind, what)
    assert [name for name, how in results.items() if how is True] == []


@pytest.mark.parametrize(("kind", "what"), ALL)
def test_nothing_gets_through_as_nobody(kind: str, what: str) -> None:
    results = gets_through(python_of_nobody(what), kind, what)
    assert [name for name, how in results.items() if how is True] == []
