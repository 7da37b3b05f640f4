"""Processes that end with the one that owns them. No vLLM is needed for that."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from policy.vllm.owner import VARIABLE, announced, owner, watch

WATCHES = """
import time
from policy.vllm.owner import watch_announced
watch_announced()
print("watching", flush=True)
time.sleep(60)
"""
OWNS_ONE = f"""
import subprocess, sys, time
from policy.vllm.owner import announced
with announced():
    child = subprocess.Popen([sys.executable, "-c", {WATCHES!r}])
print(child.pid, flush=True)
time.sleep(60)
"""
IMPORTS_THE_WORKER = "import time, policy.vllm.rank_extension; time.sleep(60)"


def start(program: str, **variables: str) -> "subprocess.Popen[str]":
    environment = os.environ | variables
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_owner_takes_its_process_along() -> None:
    with start(OWNS_ONE) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip(), parent.stdout.readline().strip()} - {"watching"}
        child = said.pop()
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        parent.communicate(timeout=20)  # their common output ends with the last of them
    until = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("program", [WATCHES, IMPORTS_THE_WORKER])
@pytest.mark.parametrize("left", [True, False], ids=["fifo", "nothing"])
def test_an_owner_that_died_before_anyone_watched_is_noticed(tmp_path: Path, left: bool, program: str) -> None:
    if left:
        os.mkfifo(tmp_path / "owner")
    with start(program, **{VARIABLE: f"1:{tmp_path / 'owner'}"}) as child:
        assert child.wait(timeout=50) == 1


def test_the_owner_watches_nobody_and_other_children_hear_nothing_of_it() -> None:
    with announced():
        assert os.environ[VARIABLE] == owner()
    assert VARIABLE not in os.environ
    watch(owner())
    watch("")
