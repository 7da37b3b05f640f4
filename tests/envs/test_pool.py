"""The pool: failures are data, every call has a deadline, many episodes share one loop."""

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from envs.base import AgentEnv, call, say
from envs.message import Message
from envs.outcome import EnvHost, StepOutcome
from envs.pool.pool import EnvPool
from envs.registry import make_env
from envs.task import Task
from envs.worker_thread import WorkerThread

ROOT = Path(__file__).parents[2]


def task(env_id: str, seed: int = 1, level: int = 0, **kwargs: Any) -> Task:
    env_id = env_id if env_id.endswith("-v0") else f"tests.envs.small_envs:{env_id}"
    return Task(task_id=f"{env_id}/{seed}", env_id=env_id, env_name="e", seed=seed, level=level, kwargs=kwargs)


def pool(limit_s: float = 5.0) -> EnvPool:
    return EnvPool(reset_timeout_s=limit_s, step_timeout_s=limit_s, reward_timeout_s=limit_s)


async def play(host: EnvHost, key: str, of: Task) -> StepOutcome:
    """Play the oracle of a twin environment against the host."""
    twin: AgentEnv = make_env(of.env_id, **of.kwargs)
    opening, _ = await twin.areset(seed=of.seed, options={"level": of.level})
    reset = await host.open(key, of)
    assert reset.failure is None
    assert reset.messages == opening
    oracle = twin.oracle()
    action = next(oracle)
    while True:
        outcome = await host.step(key, action)
        if outcome.failure or outcome.reward is not None:
            await host.close(key)
            return outcome
        action = oracle.send(outcome.messages)


def test_an_episode_gives_outcomes_with_cumulative_facts() -> None:
    async def scenario() -> None:
        host = pool()
        reset = await host.open("a", task("Calculator-v0", seed=4))
        assert (reset.failure, len(reset.messages), reset.max_turns, len(reset.problem_digest)) == (None, 1, 6, 64)
        assert [spec.name for spec in reset.tools] == ["add", "sub", "mul"]
        first = await host.step("a", call("add", a="2", b="3"))
        assert [m.text for m in first.messages] == ["5"]
        assert (first.reward, first.terminated, first.reward_parts) == (None, False, {})
        await host.step("a", call("divide"))
        last = await host.step("a", say("5"))
        assert (last.reward, last.terminated, last.truncated, last.messages) == (0.0, True, False, ())
        assert last.meta == {
            "needs_tool": True,
            "level": 0,
            "num_tools": 3,
            "num_tool_calls": 2,
            "num_tool_errors": 1,
            "tool_cost": 2.0,
            "tool_calls": {"add": 1, "unknown": 1},
        }
        await host.close("a")
        assert host.stats["open"] == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("env_id", "kwargs", "where", "message"),
    [
        ("RaisesInInit", {}, "construct", "OSError: no such data set"),
        ("RaisesInTask", {}, "reset", "KeyError: 'missing shelf'"),
        ("GarbageTask", {}, "reset", "GarbageTask.task() returned NoneType, not a Problem"),
        ("UnsendableMeta", {}, "reset", "UnsendableMeta.task(): meta is not plain JSON data"),
        ("HangsInTask", {}, "reset", "timed out after 0.1 s"),
        ("ExitsInTask", {}, "reset", "SystemExit: 3"),
        ("NoTask", {}, "construct", "NoTask defines no task"),
        ("Nothing", {}, "construct", "no environment 'tests.envs.small_envs:Nothing'"),
        ("Doubling", {"color": "red"}, "construct", "unexpected keyword argument 'color'"),
    ],
)
def test_a_failing_start_is_an_outcome(env_id: str, kwargs: dict, where: str, message: str) -> None:
    async def scenario() -> None:
        host = pool()
        await host.open("warm", task("Doubling"))  # the module is imported before the short deadline
        host = pool(0.1 if "timed out" in message else 5.0)
        failure = (await host.open("a", task(env_id, **kwargs))).failure
        assert failure is not None
        assert (failure.kind, failure.where) == ("env", where)
        assert message in failure.message
        assert host.stats["open"] == 0
        after = await host.step("a", say("x"))
        assert after.failure is not None
        assert (after.failure.kind, after.reward) == ("infra", None)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("env_id", "kwargs", "action", "where", "message"),
    [
        ("ExitsInTool", {}, call("leave"), "step", "SystemExit: 3"),
        ("CancelsInTool", {}, call("give_up"), "step", "CancelledError"),
        ("SlowTool", {}, call("wait"), "step", "timed out after 0.1 s"),
        ("StubbornTool", {}, call("wait"), "step", "timed out after 0.1 s"),
        ("HangsInReward", {}, say("x"), "reward", "timed out after 0.1 s"),
        ("SlowAsyncReward", {}, say("x"), "reward", "timed out after 0.1 s"),
        ("RewardOf", {"kind": "none"}, say("x"), "reward", "reward() returned reward = None, not a finite number"),
        ("RewardOf", {"kind": "nan"}, say("x"), "reward", "reward() returned reward = nan, not a finite number"),
        ("RewardOf", {"kind": "raises"}, say("x"), "reward", "RuntimeError: judge is down"),
    ],
)
def test_a_failing_step_has_no_reward(env_id: str, kwargs: dict, action: Message, where: str, message: str) -> None:
    async def scenario() -> None:
        host = EnvPool(step_timeout_s=0.1, reward_timeout_s=0.1)
        assert (await host.open("a", task(env_id, **kwargs))).failure is None
        started = time.monotonic()
        outcome = await host.step("a", action)
        assert time.monotonic() - started < 1.0
        assert outcome.failure is not None
        assert (outcome.failure.kind, outcome.failure.where, outcome.reward) == ("env", where, None)
        assert message in outcome.failure.message
        await host.close("a")

    asyncio.run(scenario())


def test_the_authors_traceback_is_kept_without_our_frames() -> None:
    async def scenario() -> None:
        failure = (await pool().open("a", task("RaisesInTask"))).failure
        assert failure is not None
        assert 'str({}["missing shelf"])' in failure.traceback
        assert "small_envs.py" in failure.traceback
        assert "worker_thread.py" not in failure.traceback
        assert "base.py" not in failure.traceback

    asyncio.run(scenario())


def test_a_hung_thread_is_abandoned_and_counted_and_others_go_on() -> None:
    async def scenario() -> None:
        host = EnvPool(reset_timeout_s=0.2)
        await host.open("warm", task("Doubling"))
        before = WorkerThread.num_abandoned
        hung, *others = await asyncio.gather(
            host.open("hung", task("HangsForGood")), *(host.open(f"k{i}", task("Calculator-v0", i)) for i in range(5))
        )
        assert hung.failure is not None
        assert [o.failure for o in others] == [None] * 5
        assert host.stats["abandoned_threads"] == before + 1

    asyncio.run(scenario())


def test_an_environments_own_shorter_deadline_wins() -> None:
    async def scenario() -> None:
        host = pool(5.0)
        await host.open("a", task("SlowTool"))
        slow = host._episodes["a"].env
        assert slow is not None
        slow.step_timeout_s = 0.05
        outcome = await host.step("a", call("wait"))
        assert outcome.failure is not None
        assert outcome.failure.message == "timed out after 0.05 s"

    asyncio.run(scenario())


def test_finish_ends_a_running_step_and_scores_the_episode_as_it_stands() -> None:
    async def scenario() -> None:
        host = pool(30.0)
        await host.open("a", task("SlowTool"))
        step = asyncio.create_task(host.step("a", call("wait")))
        await asyncio.sleep(0.01)
        finished = await host.finish("a")
        assert (finished.reward, finished.truncated, finished.terminated) == (1.0, True, False)
        cut = await step
        assert cut.failure is not None
        assert (cut.failure.kind, cut.failure.message) == ("infra", "ended from outside")

    asyncio.run(scenario())


def test_close_is_idempotent_and_ends_an_open_that_is_running() -> None:
    async def scenario() -> None:
        host = pool(30.0)
        await host.close("nobody")
        opening = asyncio.create_task(host.open("a", task("HangsInTask")))
        await asyncio.sleep(0.05)
        await host.close("a")
        failure = (await opening).failure
        assert failure is not None
        assert failure.kind == "infra"
        assert host.stats["open"] == 0

    asyncio.run(scenario())


def test_a_key_opened_again_while_its_first_open_hangs_belongs_to_the_second() -> None:
    async def scenario() -> None:
        host = pool(30.0)
        first = asyncio.create_task(host.open("a", task("HangsInTask")))
        await asyncio.sleep(0.05)
        second = await host.open("a", task("Calculator-v0"))
        assert second.failure is None
        assert (await first).failure is not None
        assert (await host.step("a", call("add", a=1, b=1))).failure is None
        assert host.stats["open"] == 1

    asyncio.run(scenario())


def test_a_caller_that_is_cancelled_cancels_the_authors_code() -> None:
    async def scenario() -> None:
        host = pool(30.0)
        await host.open("a", task("SlowTool"))
        step = asyncio.create_task(host.step("a", call("wait")))
        await asyncio.sleep(0.01)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        await asyncio.sleep(0.01)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("env_id", ["Calculator-v0", "ToolGate-v0", "ShopDB-v0", "Doubling"])
def test_a_hundred_concurrent_episodes_do_not_disturb_each_other(env_id: str) -> None:
    async def scenario() -> None:
        random.seed(0)
        state = random.getstate()
        host = pool(30.0)
        outcomes = await asyncio.gather(
            *(
                play(host, str(i), task(env_id, seed=i, level=i % 10, latency_median_s=0.001))
                if env_id != "Doubling"
                else play(host, str(i), task(env_id, seed=i, level=i % 10))
                for i in range(100)
            )
        )
        assert {o.reward for o in outcomes} == {0.75 if env_id == "Doubling" else 1.0}
        assert random.getstate() == state
        assert host.stats["open"] == 0

    asyncio.run(scenario())


def test_digests_name_problems_in_task_order_without_opening_episodes() -> None:
    async def scenario() -> None:
        host = pool()
        tasks = [task("ShopDB-v0", seed) for seed in range(5)] + [task("RaisesInTask"), task("ShopDB-v0", 2)]
        digests = await host.digests(tasks)
        assert digests[:5] == [(await host.open(str(i), tasks[i])).problem_digest for i in range(5)]
        assert (len(set(digests)), digests[6]) == (6, digests[2])
        assert await host.digests([task("RaisesInTask", 1), task("RaisesInTask", 2)]) != [digests[5]] * 2
        await host.close_all()
        assert host.stats["open"] == 0

    asyncio.run(scenario())


def test_prompts_and_digests_are_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "import asyncio\nfrom envs.pool.pool import EnvPool\nfrom envs.task import Task\n"
        "ids = ['Calculator-v0', 'ToolGate-v0', 'ShopDB-v0']\n"
        "tasks = [Task(task_id='t', env_id=i, env_name='e', seed=s, level=l)"
        " for i in ids for s in range(20) for l in (0, 5, 9)]\n"
        "async def main():\n    pool = EnvPool()\n"
        "    for d in await pool.digests(tasks): print(d)\n"
        "    for t in tasks: print((await pool.open('k', t)).messages)\n"
        "asyncio.run(main())\n"
    )

    def output(hash_seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = output("1")
    assert len(set(first.splitlines()[:180])) > 170
    assert first == output("2")


def test_a_process_that_hosts_environments_never_imports_torch() -> None:
    code = (
        "import sys, ray, envs.pool.actors, envs.pool.pool, envs.pool.client, envs.check.demonstration\n"
        "import envs.library.calculator, envs.library.tool_gate, envs.library.shop_db\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["False", "False"], done.stderr
