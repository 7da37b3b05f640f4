"""Whatever an author's code throws, hangs on or leaves behind is data of that episode."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from envs.base import AgentEnv, call, say
from envs.declared import reserved_names
from envs.errors import AuthorExit, HungThread, MalformedEnvironment
from envs.outcome import EnvFailure, EnvHost
from envs.pool.call_batching import Mailbox
from envs.pool.client import MailboxHost, PoolService
from envs.pool.pool import EnvPool
from envs.registry import check_class, make_env
from envs.task import Task
from envs.tool import tool
from envs.worker_thread import WorkerThread, boxed
from tests.envs.thrown_envs import PLACES, THROWS

ROOT = Path(__file__).parents[2]
HERE = "tests.envs.thrown_envs"


def task(name: str, **kwargs: Any) -> Task:
    return Task(task_id="t", env_id=f"{HERE}:{name}", env_name="e", seed=1, kwargs=kwargs)


async def failure_of(host: EnvHost, of: Task) -> EnvFailure | None:
    """The first failure of an episode of a tool call and an answer."""
    opened = await host.open("a", of)
    failure = opened.failure
    for message in (call("pull"), say("yes")):
        if failure is None:
            failure = (await host.step("a", message)).failure
    await host.close("a")
    assert await host.digests([of])
    return failure


def service_host() -> MailboxHost:
    """A pool behind a mailbox, as on Ray but for the wire."""
    service = PoolService()
    line = Mailbox(client_id="w", submit=service.submit, collect=service.collect, poll_s=0.2)
    return MailboxHost([line], reset_timeout_s=5.0, step_timeout_s=5.0, reward_timeout_s=5.0, grace_s=1.0)


@pytest.mark.parametrize("what", THROWS)
@pytest.mark.parametrize("name", ["Thrower", "InlineThrower", "AsyncThrower"])
def test_what_an_author_throws_that_is_no_exception_fails_that_episode_alone(name: str, what: str) -> None:
    """B1"""

    async def scenario() -> None:
        for host in (EnvPool(), service_host()):
            for where in PLACES:
                failure = await failure_of(host, task(name, where=where, what=what))
                if where == "close":
                    assert failure is None  # the episode is over by then; counted and logged
                    continue
                assert failure is not None and failure.kind == "env", (where, failure)
                assert type(_raised(what)).__name__ in failure.message
            assert await failure_of(host, task(name, where="", what=what)) is None  # the host lives on
            if isinstance(host, MailboxHost):
                await host.aclose()

    asyncio.run(scenario())


def _raised(what: str) -> BaseException:
    try:
        THROWS[what]()
    except BaseException as error:
        return error
    raise AssertionError(what)


def test_a_request_whose_handling_raises_is_answered_all_the_same() -> None:
    """B1"""

    async def scenario() -> None:
        service = PoolService()
        line = Mailbox(client_id="w", submit=service.submit, collect=service.collect, poll_s=0.2)
        host = MailboxHost([line], grace_s=1.0)
        started = time.monotonic()
        outcome = await host.open("a", None)  # type: ignore[arg-type]  # nothing that the pool can read
        assert outcome.failure is not None and "AttributeError" in outcome.failure.message
        assert time.monotonic() - started < 20.0  # long before its deadline of a minute
        await host.aclose()

    asyncio.run(scenario())


@pytest.mark.parametrize("name", ["Thrower", "InlineThrower", "AsyncThrower"])
def test_code_that_plays_an_environment_by_hand_is_not_interrupted_by_its_author(name: str) -> None:
    """B1"""
    env = make_env(f"{HERE}:{name}", where="tool", what="interrupt")
    env.reset(seed=0)
    with pytest.raises(AuthorExit, match="KeyboardInterrupt: thrown"):
        env.step(call("pull"))


_WAITS_INLINE = """
import asyncio, signal, sys, time
from envs.base import AgentEnv, say
from envs.pool.pool import EnvPool
from envs.task import Task
from envs.tool import tool

class Spins(AgentEnv):
    inline = True
    def task(self, rng, level):
        return "?"
    def on_message(self, text):
        print("spinning", flush=True)
        while True:
            time.sleep(0.01)
    def reward(self, answer):
        return 1.0

async def play():
    asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as our runs do after the first Ctrl-C
    pool = EnvPool()
    await pool.open("a", Task(task_id="t", env_id="__main__:Spins", env_name="e", seed=1))
    await pool.step("a", say("x"))

try:
    asyncio.run(play())
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_the_users_own_ctrl_c_ends_the_program_also_in_the_middle_of_an_authors_code() -> None:
    """B1"""
    process = subprocess.Popen([sys.executable, "-c", _WAITS_INLINE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "spinning\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


def test_after_a_late_call_the_code_stays_on_its_thread_and_never_runs_twice_at_once() -> None:
    """B2"""

    async def scenario() -> None:
        pool = EnvPool()
        assert (await pool.open("a", task("ThreadBound"))).failure is None
        env: Any = pool._episodes["a"].env
        late = await pool.step("a", call("nap", seconds=0.5))
        assert (late.failure, late.messages[0].text) == (None, "error: timed out")
        assert env.late_call == "nap"
        noted = await pool.step("a", call("note", text="x"))
        assert (noted.failure, noted.messages[0].text) == (None, "1")
        ended = await pool.step("a", say("done"))
        assert (ended.failure, ended.reward) == (None, 1.0)
        assert (len(env.threads), env.most_running) == (1, 1)
        await pool.close("a")

    asyncio.run(scenario())


def test_a_thread_that_does_not_come_back_ends_the_environment_with_the_name_of_the_call() -> None:
    """B2"""

    async def scenario() -> None:
        before = WorkerThread.num_abandoned
        pool = EnvPool(reward_timeout_s=0.3)
        for key in "ab":
            assert (await pool.open(key, task("ThreadGone"))).failure is None
            assert (await pool.step(key, call("nap", seconds=30.0))).messages[0].text == "error: timed out"
        gone, scored = await asyncio.gather(pool.step("a", call("note", text="x")), pool.finish("b"))
        assert gone.failure is not None and (gone.failure.kind, gone.reward) == ("env", None)
        assert "nap() outlived its deadline and still runs" in gone.failure.message
        assert scored.failure is not None and scored.failure.message == "timed out after 0.3 s: nap() still runs"
        await pool.close_all()
        assert WorkerThread.num_abandoned == before + 2

    asyncio.run(scenario())


def test_played_by_hand_a_thread_that_does_not_come_back_raises() -> None:
    """B2"""
    env = make_env(f"{HERE}:ThreadGone")
    env.reset(seed=0)
    env.step(call("nap", seconds=30.0))
    with pytest.raises(HungThread, match="nap"):
        env.step(call("note", text="x"))


@pytest.mark.parametrize("name", ["Forks", "InlineForks"])
@pytest.mark.parametrize(
    ("where", "action"),
    [
        ("construct", "fork"),
        ("task", "fork"),
        ("tool", "fork"),
        ("async tool", "fork_async"),
        ("daemon", "daemon"),
    ],
)
def test_what_an_environment_forked_ends_when_it_is_closed(name: str, where: str, action: str) -> None:
    """B4"""

    async def scenario() -> None:
        pool = EnvPool()
        assert (await pool.open("a", task(name, where=where))).failure is None
        told = await pool.step("a", call(action))
        assert told.failure is None
        pids = [int(word) for word in told.messages[0].text.split()]
        assert len(pids) == 1 and _lives(pids[0])
        await pool.close("a")
        until = time.monotonic() + 20.0
        while _lives(pids[0]) and time.monotonic() < until:  # an orphan is collected by the system, a little later
            await asyncio.sleep(0.01)
        assert not _lives(pids[0])

    asyncio.run(scenario())


def _lives(pid: int) -> bool:
    """A zombie that nobody collects does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_an_environment_started_is_left_to_its_author() -> None:
    """B4: a server may be shared by several environments; only copies of this process end with one."""
    env = make_env("tests.envs.small_envs:Doubling")
    env.reset(seed=0)
    started = asyncio.run(env.run_author(lambda: subprocess.Popen(["sleep", "60"], preexec_fn=os.setsid)))
    env.close()
    assert started.poll() is None
    started.kill()
    started.wait()


def test_an_error_without_a_text_is_a_tool_error_by_its_type_and_a_failed_reward_by_its_type() -> None:
    """B5"""

    async def scenario() -> None:
        pool = EnvPool()
        await pool.open("a", task("SaysNothing"))
        failed = await pool.step("a", call("fail"))
        assert failed.failure is None
        result = failed.messages[0].tool_result
        assert result is not None and (result.content, result.error) == ("error: Unspeakable", "tool_error")
        ended = await pool.step("a", say("fail"))
        assert ended.failure is not None and ended.failure.message.startswith("Unspeakable")

    asyncio.run(scenario())


def test_a_coroutine_that_swallows_its_cancellation_times_out_and_the_episode_goes_on() -> None:
    """B5"""

    async def scenario() -> None:
        pool = EnvPool()
        await pool.open("a", task("SaysNothing"))
        late = await pool.step("a", call("cling"))
        assert late.failure is None
        assert late.messages[0].text == "error: timed out"
        assert (await pool.step("a", say("done"))).reward == 1.0
        await pool.close("a")

    # Not asyncio.run, which would wait for the clinging coroutine to its end.
    loop = asyncio.new_event_loop()
    loop.run_until_complete(scenario())
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_boxing_lets_a_cancellation_from_outside_through() -> None:
    """B1"""

    async def scenario() -> None:
        waiting = asyncio.create_task(boxed(asyncio.sleep(60)))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


OWN = sorted(name for name in reserved_names() - {"task", "reward"} if not name.startswith("__"))


@pytest.mark.parametrize("name", OWN)
def test_a_tool_may_not_take_the_name_of_an_attribute_of_every_environment(name: str) -> None:
    """B3: `score` would escape the pool, `close` would replace the cleanup. With `task` or `reward` as a tool a class
    lacks the method, and is refused for that."""

    def plain(self: AgentEnv, x: int) -> str:
        """A tool."""
        return str(x)

    plain.__name__ = name
    members = {"task": lambda self, rng, level: "?", "reward": lambda self, answer: 1.0}
    owner = type("Clashing", (AgentEnv,), members | {name: tool(plain)})
    with pytest.raises(MalformedEnvironment, match=f"cannot be called '{name}'.*rename the method, for example do_"):
        check_class("Clashing-v0", owner)
