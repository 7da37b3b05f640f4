"""OpenEnv, over the wire: its package needs other versions than ours, so it lives in a virtual environment of its own.

`SHOAL_WIRE_PYTHON` may name an interpreter with openenv==0.10.0; else the first test makes one (about 30 s).
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from envs.adapters.openenv_client import OpenEnvEnv, from_openenv
from envs.base import call
from envs.errors import InfraFault
from envs.pool.pool import EnvPool
from envs.task import Task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
TESTS = Path(__file__).parent
NUM_EPISODES = 32


@pytest.fixture(scope="session")
def wire_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    given = os.environ.get("SHOAL_WIRE_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("wire")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    words = [python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", "openenv==0.10.0"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    if done.returncode:
        pytest.skip(f"openenv cannot be installed here: {done.stderr[-300:]}")
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"{url} did not come up")


@pytest.fixture(scope="module")
def counter(wire_python: str) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    process = subprocess.Popen([wire_python, str(TESTS / "openenv_counter_server.py"), str(port)])
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def served_calculator() -> Iterator[str]:
    port = free_port()
    code = f"from envs.adapters.openenv_server import serve_openenv; serve_openenv('Calculator-v0', port={port})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=TESTS.parents[1])
    try:
        wait_for(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def test_32_episodes_at_once_are_played_to_their_end_and_repeat_from_their_seeds(counter) -> None:
    url, _ = counter

    async def play(pool: EnvPool, seed: int, key: str) -> tuple[list[str], float | None]:
        name = "envs.adapters.openenv_client:OpenEnvEnv"
        task = Task(task_id=key, env_id=name, env_name="counter", seed=seed, kwargs={"url": url})
        started = await pool.open(key, task)
        assert started.failure is None, started.failure
        seen = [started.messages[0].text]
        target = json.loads(seen[0])["target"]
        for by in (*[1] * (target - 2), 2):
            outcome = await pool.step(key, call("act", by=by))
            assert outcome.failure is None, outcome.failure
            seen.append(outcome.messages[0].text)
        assert outcome.terminated
        await pool.close(key)
        return seen, outcome.reward

    async def play_all() -> list[tuple[list[str], float | None]]:
        pool = EnvPool()
        return await asyncio.gather(*(play(pool, seed, f"k{seed}") for seed in range(NUM_EPISODES)))

    first = asyncio.run(asyncio.wait_for(play_all(), 90))
    assert [reward for _, reward in first] == [1.0] * NUM_EPISODES
    assert len({seen[0] for seen, _ in first}) > 5  # other seeds, other targets
    assert asyncio.run(asyncio.wait_for(play_all(), 90)) == first


def test_what_the_server_refuses_is_read_by_the_policy(counter) -> None:
    env = from_openenv(counter[0])()
    env.reset(seed=1)
    wrong, *_ = env.step(call("act", by="many"))
    assert wrong[0].text.startswith("error: ") and "by" in wrong[0].text
    raised, *_ = env.step(call("act", by=0))
    assert raised[0].text == "error: count by something"
    env.close()


def test_a_server_that_is_silent_or_dead_is_a_failure_of_the_machine_and_no_reward(counter) -> None:
    """Last of those that use the server."""
    url, process = counter
    env = OpenEnvEnv(url=url, wait_s=1.0)
    env.reset(seed=1)
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(InfraFault, match="TimeoutError"):
        env.step(call("act", by=1))
    assert time.monotonic() - started < 10
    process.send_signal(signal.SIGCONT)
    env = OpenEnvEnv(url=url, wait_s=5.0)
    env.reset(seed=1)
    process.kill()
    process.wait(10)
    with pytest.raises(InfraFault, match="was lost"):
        env.step(call("act", by=1))
    with pytest.raises(InfraFault, match="cannot reach"):
        env.reset(seed=1)
    env.close()


def test_the_real_openenv_client_plays_a_served_environment(served_calculator: str, wire_python: str) -> None:
    words = [wire_python, str(TESTS / "openenv_client_script.py"), served_calculator, str(NUM_EPISODES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout.splitlines()[-1])
    assert len(played) == NUM_EPISODES
    for episode in played:
        assert (episode["reward"], episode["done"], episode["steps"]) == (1.0, True, 3)
        assert {"add", "sub", "mul", "submit"} <= set(episode["tools"])
        assert episode["bad"]["error_type"] == "tool_not_found"
    assert len({episode["text"] for episode in played}) > NUM_EPISODES // 2


def test_an_exported_environment_comes_back_in_through_the_import(served_calculator: str) -> None:
    env = from_openenv(served_calculator)()
    opening, info = env.reset(seed=5)
    assert {"add", "submit"} <= {spec.name for spec in info["tools"]}
    again, _ = env.reset(seed=5)
    assert opening[0].text == again[0].text
    found = re.search(r"(\d+)\s*([-+*])\s*(\d+)", opening[0].text)
    assert found is not None
    tool = {"+": "add", "-": "sub", "*": "mul"}[found[2]]
    replies, *_ = env.step(call(tool, a=int(found[1]), b=int(found[3])))
    _, reward, terminated, _, _ = env.step(call("submit", answer=replies[0].text))
    assert (reward, terminated) == (1.0, True)
    env.close()
