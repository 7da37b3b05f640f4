"""MCP, with the real SDK over its real transports: servers as tools of an environment, environments as servers."""

import asyncio
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

pytest.importorskip("mcp", reason="needs the extra mcp")
from mcp import Client, StdioServerParameters, stdio_client

from envs.adapters.mcp import McpEnv, from_mcp
from envs.adapters.mcp_server import McpEnvServer, serve_mcp
from envs.base import call
from envs.check.demonstration import Demonstration, ademonstrate, demonstrate
from envs.errors import InfraFault, MalformedEnvironment
from envs.message import ImagePart, Message
from envs.pool.pool import EnvPool
from envs.registry import find_class
from envs.task import Task
from tests.envs.mcp_envs import COMMAND, CopyNote, CopyNoteOverStdio
from tests.envs.mcp_notes import PNG, make_server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SERVE_CALCULATOR = "from envs.adapters.mcp_server import serve_mcp; serve_mcp('Calculator-v0', transport={!r})"


class Remote(McpEnv):
    """An exported environment, taken in again. Its subclass says where it is served."""

    hidden: ClassVar = frozenset({"reset", "submit"})

    async def task(self, rng: random.Random, level: int) -> str:
        return await self.call_server("reset", seed=self.seed, level=level)

    async def reward(self, answer: str) -> dict[str, float]:
        return json.loads(await self.call_server("submit", answer=answer))["reward_parts"]


def started(*words: str, stream: str) -> tuple[subprocess.Popen, str]:
    """A server process and the URL that it prints."""
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, **{stream: subprocess.PIPE})
    return process, getattr(process, stream).readline().strip()


def stopped(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(10)
    finally:
        process.kill()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.fixture(scope="module")
def notes_url() -> Iterator[str]:
    process, url = started(*COMMAND[1:], "http", stream="stdout")
    yield url
    stopped(process)


@pytest.fixture(scope="module")
def calculator_url() -> Iterator[str]:
    process, url = started("-c", SERVE_CALCULATOR.format("http"), stream="stderr")
    yield url
    stopped(process)


STDIO = pytest.param("stdio", marks=pytest.mark.slow)  # every server is a process that imports the SDK: a second


@pytest.fixture(params=["in process", "http", STDIO])
def notes(request: pytest.FixtureRequest) -> type[CopyNote]:
    """The environment, over each way to reach a server."""
    if request.param == "http":
        return type("CopyNoteOverHttp", (CopyNote,), {"servers": (request.getfixturevalue("notes_url"),)})
    return CopyNote if request.param == "in process" else CopyNoteOverStdio


def texts(demonstration: Demonstration) -> list[str]:
    return [message.text for message in demonstration.messages]


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_an_oracle_plays_to_the_end_and_the_seed_replays_it_beside_other_instances(notes: type[CopyNote]) -> None:
    async def scenario() -> list[Demonstration]:
        environments = [notes() for _ in range(3)]
        try:
            return list(
                await asyncio.gather(*(ademonstrate(e, s, 1) for e, s in zip(environments, (1, 1, 2), strict=True)))
            )
        finally:
            for env in environments:
                await asyncio.to_thread(env.close)

    first, again, other = asyncio.run(scenario())
    assert [first.reward, again.reward, other.reward] == [1.0] * 3  # none saw a note that another had written
    assert texts(first) == texts(again) != texts(other)
    assert first.meta["tool_calls"] == {"read": 1, "write": 1}


def test_tools_come_with_the_servers_own_schemas_and_hidden_ones_do_not_come() -> None:
    env = CopyNote()
    _, info = env.reset(seed=0)
    specs = {spec.name: spec for spec in info["tools"]}
    assert list(specs) == ["read", "write", "refuse", "picture", "doze"]
    assert specs["read"].description == "Read one note."
    write = specs["write"].parameters
    assert write["required"] == ["text"]
    assert write["properties"]["urgent"] == {"default": False, "title": "Urgent", "type": "boolean"}
    env.close()


def test_what_the_policy_does_wrong_and_what_a_tool_refuses_are_observations() -> None:
    env = CopyNote()
    env.reset(seed=0)

    def answer(name: str, **arguments: Any) -> tuple[str, str | None]:
        (reply, *_), *_ = env.step(call(name, **arguments))
        assert reply.tool_result is not None
        return reply.text, reply.tool_result.error

    env.max_turns = 99
    assert answer("read", index="x") == ("error: index must be integer", "bad_arguments")
    assert answer("read") == ("error: missing index", "bad_arguments")
    assert answer("write", text="\ud800") == ("error: arguments are no plain JSON", "bad_arguments")
    assert answer("start", seed=1, count=1) == ("error: unknown tool", "unknown_tool")
    assert answer("refuse", reason="tired") == ("error: Error executing tool refuse: no: tired", "tool_error")
    text, kind = answer("read", index=77)
    assert "read" in text and kind == "tool_error"
    assert answer("write", text=7) == ("3", None)
    env.tool_timeout_s = 0.2
    assert answer("doze", seconds=30) == ("error: timed out", "timeout")
    assert answer("doze", seconds=0) == ("slept", None)  # the session lives on
    env.close()


def test_images_of_a_server_are_images_of_the_reply() -> None:
    env = CopyNote()
    env.reset(seed=0)
    (reply,), *_ = env.step(call("picture"))
    assert (reply.text, reply.content[1:]) == ("look", (ImagePart(data=PNG, media_type="image/png"),))
    env.close()


@pytest.mark.parametrize("transport", [STDIO, "http"])
def test_a_server_that_dies_is_an_infra_failure_and_no_observation(transport: str) -> None:
    process, server = started(*COMMAND[1:], "http", stream="stdout") if transport == "http" else (None, COMMAND)

    async def scenario() -> None:
        pool = EnvPool()
        task = Task(task_id="a", env_id="tests.envs.mcp_envs:Mortal", env_name="m", seed=1, kwargs={"server": server})
        for where in ("die", "read"):
            assert (await pool.open(where, task)).failure is None
        outcome = await pool.step("die", call("die"))
        assert outcome.failure is not None and (outcome.failure.kind, outcome.failure.where) == ("infra", "step")
        if transport == "http":  # the other session has lost its server too, and no new one can be opened
            outcome = await pool.step("read", call("read", index=0))
            assert outcome.failure is not None and outcome.failure.kind == "infra"
            assert (failed := (await pool.open("new", task)).failure) and (failed.kind, failed.where) == (
                "infra",
                "reset",
            )
        else:  # each had a process of its own
            assert (await pool.step("read", call("read", index=0))).failure is None
        await pool.close_all()

    try:
        asyncio.run(scenario())
    finally:
        if process:
            stopped(process)


def test_a_server_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(InfraFault, match=r"cannot open MCP server .*/no/such/program"):
        from_mcp(["/no/such/program"])().reset(seed=0)
    with pytest.raises(ValueError, match="is no http"):
        from_mcp("server.py")().reset(seed=0)

    class Silent(CopyNote):
        servers: ClassVar = (["sleep", "30"],)
        reset_timeout_s = 1.0

    before = children()
    env = Silent()
    with pytest.raises(InfraFault, match=r"did not open in 0\.9 s"):
        env.reset(seed=0)
    assert len(children() - before) == 1
    env.close()
    assert children() == before


@pytest.mark.slow
def test_close_leaves_no_process_and_no_file() -> None:
    demonstrate(CopyNote(), 1, 0)  # whatever is opened once for the whole process
    before, files = children(), open_files()
    env = CopyNoteOverStdio()
    env.reset(seed=1)
    first = children() - before
    env.reset(seed=2)  # a new episode, a new server
    assert len(children() - before) == 1 and not first & children()
    env.close()
    env.close()
    assert children() == before
    assert open_files() == files

    forgotten = CopyNoteOverStdio()
    forgotten.reset(seed=1)
    assert len(children() - before) == 1
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 6.0
    while children() != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children() == before


def test_two_functions_and_a_server_are_an_environment() -> None:
    async def ask(env: McpEnv, rng: random.Random, level: int) -> str:
        await env.call_server("start", seed=1, count=1)
        return "?"

    def judge(env: McpEnv, answer: str) -> float:
        return float(answer == "tea")

    Notes = from_mcp(make_server, hidden=["start", "die"], task=ask, reward=judge)
    assert Notes.__module__ == __name__
    assert from_mcp(make_server, task=ask, oracle=CopyNote.oracle).__module__ == "tests.envs.mcp_envs"  # the last one's
    env = Notes()
    env.reset(seed=0)
    assert env.step("tea")[1] == 1.0
    env.close()
    with pytest.raises(MalformedEnvironment, match="two tools are called"):
        from_mcp(make_server, make_server, task=ask, reward=judge)().reset(seed=0)


# --- environments as servers ---


async def play_calculator(client: Client, seed: int) -> float:
    """The oracle of a twin, through a client session."""
    twin = find_class("Calculator-v0")()
    opening, _ = await twin.areset(seed=seed, options={"level": 4})
    shown = await client.call_tool("reset", {"seed": seed, "level": 4})
    assert shown.content[0].text == opening[0].text
    oracle = twin.oracle()
    action = next(oracle)
    while action.tool_calls:
        result = await client.call_tool(action.tool_calls[0].name, action.tool_calls[0].arguments)
        assert not result.is_error
        action = oracle.send((Message.user(result.content[0].text),))
    result = await client.call_tool("submit", {"answer": action.text})
    assert json.loads(result.content[0].text) == result.structured_content
    return result.structured_content["reward"]


def over(transport: str, request: pytest.FixtureRequest) -> Any:
    if transport == "http":
        return request.getfixturevalue("calculator_url")
    words = ["-c", SERVE_CALCULATOR.format("stdio")]
    return stdio_client(StdioServerParameters(command=sys.executable, args=words, cwd=ROOT), errlog=sys.__stderr__)


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_the_real_client_plays_an_exported_environment(transport: str, request: pytest.FixtureRequest) -> None:
    async def scenario() -> None:
        async with Client(over(transport, request)) as client:
            names = [listed.name for listed in (await client.list_tools()).tools]
            assert names == ["reset", "add", "sub", "mul", "submit"]
            early = await client.call_tool("add", {"a": 1, "b": 2})
            assert (early.is_error, early.content[0].text) == (True, "error: no episode is running, call reset")
            assert (await play_calculator(client, 1), await play_calculator(client, 2)) == (1.0, 1.0)
            assert (await client.call_tool("reset", {"seed": 1, "level": 99})).is_error

    asyncio.run(scenario())


def test_each_client_session_has_an_instance_of_its_own(calculator_url: str) -> None:
    async def one(seed: int) -> float:
        async with Client(calculator_url) as client:
            return await play_calculator(client, seed)

    async def scenario() -> list[float]:
        return list(await asyncio.gather(*map(one, range(8))))

    assert asyncio.run(scenario()) == [1.0] * 8


def test_an_exported_environment_taken_in_again_is_the_same(calculator_url: str) -> None:
    class RemoteCalculator(Remote):
        servers: ClassVar = (calculator_url,)

    async def scenario() -> None:
        there, here = RemoteCalculator(), find_class("Calculator-v0")()
        for seed in range(3):
            opening, _ = await here.areset(seed=seed, options={"level": 1})
            assert (await there.areset(seed=seed, options={"level": 1}))[0] == opening
            action, oracle = None, here.oracle()
            replies: tuple = ()
            while action is None or action.tool_calls:
                action = next(oracle) if action is None else oracle.send(replies)
                replies, reward, *_ = await there.astep(action)
            assert reward == 1.0
        await asyncio.to_thread(there.close)

    asyncio.run(scenario())


def test_a_session_that_ends_closes_its_environment_and_failures_are_told() -> None:
    async def scenario() -> None:
        served = McpEnvServer("tests.envs.small_envs:RewardOf", {"kind": "nan"})
        async with Client(served.server, mode="legacy") as client:
            await client.call_tool("reset", {"seed": 1})
            assert served._pool.stats["open"] == 1
            failed = await client.call_tool("submit", {"answer": "x"})
            assert failed.is_error and "the environment failed (reward): reward() returned" in failed.content[0].text
            await client.call_tool("reset", {"seed": 1})
            assert served._pool.stats["open"] == 1
        assert served._pool.stats["open"] == 0

    asyncio.run(scenario())


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ValueError, match="'carrier pigeon' is not one of stdio, http"):
        serve_mcp("Calculator-v0", transport="carrier pigeon")
    with pytest.raises(MalformedEnvironment, match="its tool 'submit' is called like one of the server's own"):
        McpEnvServer("tests.envs.small_envs:Submits")
    with pytest.raises(MalformedEnvironment, match="'turns'; its arguments are: max_turns"):
        McpEnvServer("Calculator-v0", {"turns": 2})
