"""Limits of a pool: how much runs at once, how fast, and when its process starts anew."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from envs.base import AgentEnv, call
from envs.pool.call_batching import Mailbox, MailboxServer, Request
from envs.pool.client import MailboxHost, PoolService
from envs.pool.pool import EnvPool
from envs.pool.pool_limits import LagMeter, PoolLimits, TurnTaker, percentile
from envs.task import Problem, Task
from envs.tool import tool
from envs.worker_thread import WorkerThread


class Counting(AgentEnv):
    """Counts how many of its tools run at once."""

    running = 0
    most = 0

    def task(self, rng: Any, level: int) -> Problem:
        return Problem(prompt=f"wait {rng.random()}")

    @tool
    async def wait(self) -> str:
        """Wait a moment."""
        Counting.running += 1
        Counting.most = max(Counting.most, Counting.running)
        await asyncio.sleep(0.005)
        Counting.running -= 1
        return "done"

    @tool
    def block(self) -> str:
        """Block a thread."""
        time.sleep(0.5)
        return "done"

    def reward(self, answer: str) -> float:
        return float(answer == "done")


def task(seed: int, name: str = "counting") -> Task:
    return Task(task_id=str(seed), env_id=f"{__name__}:Counting", env_name=name, seed=seed)


def test_no_more_steps_run_at_once_than_allowed_and_all_are_answered() -> None:
    async def play() -> int:
        Counting.most = 0
        pool = EnvPool(limits=PoolLimits(max_running=3))
        await asyncio.gather(*(pool.open(str(i), task(i)) for i in range(12)))
        outcomes = await asyncio.gather(*(pool.step(str(i), call("wait")) for i in range(12)))
        assert [outcome.messages[0].text for outcome in outcomes] == ["done"] * 12
        await pool.close_all()
        return Counting.most

    assert asyncio.run(play()) == 3


def test_a_step_that_waited_for_its_turn_does_not_reach_an_episode_that_was_finished_meanwhile() -> None:
    async def play() -> tuple[str, dict[str, Any]]:
        pool = EnvPool(limits=PoolLimits(max_running=1))
        await pool.open("a", task(1))
        await pool.open("b", task(2))
        first = asyncio.create_task(pool.step("a", call("wait")))
        waiting = asyncio.create_task(pool.step("b", call("wait")))
        await asyncio.sleep(0)
        finished = await pool.finish("b")
        await first
        late = await waiting
        await pool.close_all()
        assert late.failure is not None
        return late.failure.message, finished.meta["tool_calls"]

    assert asyncio.run(play()) == ("no open episode 'b'", {})


def test_a_name_with_a_pace_takes_its_turns_apart_and_others_do_not_wait() -> None:
    async def waits(name: str) -> float:
        turns = TurnTaker(PoolLimits(steps_per_second={"slow": 50.0}))
        started = time.monotonic()
        for _ in range(6):
            async with turns.turn(name):
                pass
        return time.monotonic() - started

    assert asyncio.run(waits("slow")) >= 5 / 50
    assert asyncio.run(waits("free")) < 5 / 50


@pytest.mark.parametrize(
    ("limits", "text"),
    [(PoolLimits(max_running=0), "max_running = 0"), (PoolLimits(steps_per_second={"x": 0.0}), "of x = 0.0, not > 0")],
)
def test_limits_that_would_stop_everything_are_refused(limits: PoolLimits, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TurnTaker(limits)


def test_answers_that_nobody_fetches_hold_up_their_own_client_only() -> None:
    async def handle(client_id: str, operation: str, arguments: tuple[Any, ...]) -> str:
        return "x" * 100

    async def gone(client_id: str) -> None:
        return None

    async def play() -> tuple[int, int, int]:
        server = MailboxServer(handle, on_client_gone=gone, size_of=len, max_answer_bytes=250)
        requests = [Request(request_id=i, operation="step", arguments=()) for i in range(5)]
        for request in requests:
            await server.submit("lazy", [request])
            await asyncio.sleep(0)
        await server.submit("keen", requests[:1])
        await asyncio.sleep(0.01)
        keen = len((await server.collect("keen", 0.1)).replies)
        first = len((await server.collect("lazy", 0.1)).replies)
        await asyncio.sleep(0.01)
        return keen, first, len((await server.collect("lazy", 0.1)).replies)

    assert asyncio.run(play()) == (1, 3, 2)


def test_a_request_held_up_by_a_client_that_is_gone_is_not_run_any_more() -> None:
    handled: list[str] = []

    async def handle(client_id: str, operation: str, arguments: tuple[Any, ...]) -> str:
        handled.append(operation)
        return "x" * 100

    async def gone(client_id: str) -> None:
        return None

    async def play() -> None:
        server = MailboxServer(handle, on_client_gone=gone, size_of=len, max_answer_bytes=50, client_timeout_s=0.05)
        for i, operation in enumerate(("first", "second")):
            await server.submit("lazy", [Request(request_id=i, operation=operation, arguments=())])
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)
        assert len((await server.collect("lazy", 0.05)).replies) == 1
        await asyncio.sleep(0.01)

    asyncio.run(play())
    assert handled == ["first"]


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 99, 0.0),
        ([5.0], 99, 5.0),
        ([2.0, 1.0], 99, 2.0),
        ([3.0, 1.0, 2.0], 50, 2.0),
        (range(1, 101), 99, 99),
        (range(1, 102), 99, 100),
        (range(1, 1201), 99, 1188),
        (range(1, 1201), 100, 1200),
    ],
)
def test_a_percentile_is_a_value_that_so_many_do_not_exceed(values: Any, percent: int, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_a_blocked_tool_runs_on_its_thread_and_the_loop_stays_in_time() -> None:
    """A loop that a tool blocks is 450 ms late each time; one on a busy machine is now and then."""

    async def play() -> float:
        meter = LagMeter()
        meter.start()
        pool = EnvPool()
        await pool.open("a", task(1))
        outcome = await pool.step("a", call("block"))
        assert outcome.messages[0].text == "done"
        await pool.close_all()
        return meter.p99_s()

    assert any(0.0 < asyncio.run(play()) < 0.1 for _ in range(3))


class Restarting:
    """A pool that is started again where it ends itself, as an actor supervisor does."""

    def __init__(self, limits: PoolLimits) -> None:
        self.limits = limits
        self.num_starts = 0
        self.start()

    def start(self) -> None:
        self.num_starts += 1
        self.service = PoolService(limits=self.limits, exit_process=self.start)


def test_a_recycled_pool_ends_its_episodes_first_and_no_episode_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.pool.client._LAST_ANSWERS_S", 0.2)

    async def play() -> tuple[int, list[str]]:
        pools = Restarting(PoolLimits(recycle_episodes=3))
        host = MailboxHost([_line(lambda: pools.service)], retry_s=0.05)

        async def episode(i: int) -> str:
            await asyncio.sleep(0.02 * i)
            opened = await host.open(str(i), task(i))
            assert opened.failure is None, opened
            stepped = await host.step(str(i), call("wait"))
            assert stepped.failure is None, stepped
            await host.close(str(i))
            return stepped.messages[0].text

        texts = await asyncio.gather(*(episode(i) for i in range(10)))
        until = time.monotonic() + 5
        while pools.num_starts < 2 and time.monotonic() < until:  # all ten may have been open before three had ended
            await asyncio.sleep(0.02)
        await host.aclose()
        return pools.num_starts, texts

    num_starts, texts = asyncio.run(play())
    assert texts == ["done"] * 10
    assert num_starts >= 2


def test_a_pool_that_waits_for_the_episodes_of_a_lost_client_is_recycled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envs.pool.client._LAST_ANSWERS_S", 0.02)

    async def play() -> int:
        exits: list[int] = []
        limits = PoolLimits(recycle_episodes=1)
        service = PoolService(limits=limits, client_timeout_s=0.3, exit_process=lambda: exits.append(1))
        lost, keen = (MailboxHost([_line(lambda: service, name)], retry_s=0.05) for name in ("lost", "keen"))
        assert (await lost.open("a", task(1))).failure is None
        assert (await keen.open("b", task(2))).failure is None
        await keen.close("b")  # one episode is over: due, but the lost client's is still open
        await lost.aclose()
        until = time.monotonic() + 5
        while not exits and time.monotonic() < until:
            await keen.close("nobody")
            await asyncio.sleep(0.1)
        await keen.close("nobody")
        await asyncio.sleep(0.1)
        await keen.aclose()
        return len(exits)

    assert asyncio.run(play()) == 1


@pytest.mark.parametrize("reached", ["memory", "hung threads", ""])
def test_a_pool_past_its_limit_of_memory_or_of_hung_threads_is_recycled_and_says_which(
    reached: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envs.pool.client._LAST_ANSWERS_S", 0.02)
    hung = WorkerThread.num_abandoned  # of this whole process
    limits = {
        "memory": PoolLimits(recycle_mib=1, recycle_threads=0),
        "hung threads": PoolLimits(recycle_threads=hung + 1),
        "": PoolLimits(recycle_mib=1 << 20, recycle_threads=hung + 2),
    }[reached]

    async def play() -> int:
        exits: list[int] = []
        service = PoolService(limits=limits, exit_process=lambda: exits.append(1))
        host = MailboxHost([_line(lambda: service)], retry_s=0.05)
        hanging = Task(
            task_id="a",
            env_id="tests.envs.small_envs:HangsForGood",
            env_name="e",
            seed=1,
            kwargs={"in_task": False},
        )
        assert (await host.open("a", hanging)).failure is None
        assert "timed out" in (await host.step("a", call("hang"))).messages[0].text
        await host.close("a")
        await asyncio.sleep(0.1)
        await host.aclose()
        return len(exits)

    assert asyncio.run(play()) == bool(reached)
    told = [record.message for record in caplog.records if "recycling" in record.message]
    assert told == ([f"recycling this pool: {reached}"] if reached else [])


def test_without_somebody_to_start_it_again_a_pool_is_never_recycled() -> None:
    async def play() -> int:
        service = PoolService(limits=PoolLimits(recycle_episodes=1))
        host = MailboxHost([_line(lambda: service)], retry_s=0.05)
        for i in range(3):
            assert (await host.open(str(i), task(i))).failure is None
            await host.close(str(i))
        await host.aclose()
        return 3

    assert asyncio.run(play()) == 3


def _line(service: Callable[[], PoolService], client_id: str = "b") -> Mailbox:
    async def submit(client_id: str, requests: list[Request]) -> str:
        return await service().submit(client_id, requests)

    async def collect(client_id: str, max_wait_s: float) -> Any:
        return await service().collect(client_id, max_wait_s)

    return Mailbox(client_id=client_id, submit=submit, collect=collect, poll_s=0.1)
