"""No attack of tests/sandbox_attacks.py gets out of a sandbox, as root and as nobody; each succeeds without one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from envs.sandbox import SandboxUnavailable, open_sandbox
from tests.sandbox_attacks import ATTACKS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]


def needs(kind: str) -> None:
    try:
        open_sandbox(kind).close()
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def python_of_nobody() -> list[str]:
    """A command of an interpreter that the user nobody can start on this checkout; skips where there is none."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become nobody, with setpriv")
    for python in (sys.executable, "/usr/bin/python3"):
        command = [*NOBODY, python]
        # setpriv itself may start what nobody may not; so this Python must be able to start itself again
        try_it = (
            "import sys; assert sys.version_info >= (3, 11); import envs.sandbox as s; s.run_code('', sandbox='none')"
        )
        if subprocess.run([*command, "-c", try_it], cwd=ROOT, capture_output=True, timeout=30).returncode == 0:
            return command
    pytest.skip("nobody can start no Python here")


def attack(python: list[str], kind: str) -> dict[str, object]:
    environment = {**os.environ, "TOKEN": "secret", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*python, "-m", "tests.sandbox_attacks", kind]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results.keys() == ATTACKS.keys()
    return results


def test_every_attack_succeeds_without_isolation() -> None:
    """Or the tests below would pass for nothing. As nobody where we are root: some are at home only there."""
    python = python_of_nobody() if os.getuid() == 0 else [sys.executable]
    failed: dict[str, object] = dict.fromkeys(ATTACKS, "not tried")
    for _ in range(3):  # an attack that got through once gets through: a busy machine cuts some short
        results = attack(python, "none")
        failed = {name: results[name] for name in failed if results[name] is not True}
        if not failed:
            break
    if "Function not implemented" in str(failed.pop("io_uring", "")):  # some kernels have none
        failed.pop("io_uring", None)
    assert failed == {}


@pytest.mark.parametrize("kind", ["jail", pytest.param("bwrap", marks=pytest.mark.slow)])
def test_no_attack_gets_out_as_this_user(kind: str) -> None:
    needs(kind)
    assert [name for name, how in attack([sys.executable], kind).items() if how is True] == []


@pytest.mark.parametrize("kind", ["jail", pytest.param("bwrap", marks=pytest.mark.slow)])
def test_no_attack_gets_out_as_nobody(kind: str) -> None:
    python = python_of_nobody()
    needs(kind)
    assert [name for name, how in attack(python, kind).items() if how is True] == []
