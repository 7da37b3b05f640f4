"""The mailbox: batches, matching, deadlines, and what happens when the far side dies. No transport, no sleeping."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from envs.base import call, say
from envs.errors import HostLost
from envs.pool.call_batching import Delivery, Mailbox, MailboxServer, Request
from envs.pool.client import MailboxHost, PoolService
from envs.task import Task

TASK = Task(task_id="t", env_id="Calculator-v0", env_name="e", seed=1)


class Line:
    """A transport that can be cut, and a far side that can be replaced by a fresh one."""

    def __init__(self, far: Any) -> None:
        self.far = far
        self.cut = False
        self.batches: list[list[str]] = []
        self.polling: set[asyncio.Task[Any]] = set()

    async def submit(self, client_id: str, requests: list[Request]) -> str:
        await asyncio.sleep(0)
        if self.cut:
            raise HostLost("the line is cut")
        self.batches.append([r.operation for r in requests])
        return await self.far.submit(client_id, requests)

    async def collect(self, client_id: str, max_wait_s: float) -> Delivery:
        if self.cut:
            raise HostLost("the line is cut")
        poll = asyncio.ensure_future(self.far.collect(client_id, max_wait_s))
        self.polling.add(poll)
        try:
            return await poll
        except asyncio.CancelledError:
            if self.cut:
                raise HostLost("the line is cut") from None
            raise
        finally:
            self.polling.discard(poll)

    def kill(self, successor: Any) -> None:
        """The far side dies with all it holds; `successor` takes its place once the line is mended."""
        self.cut = True
        self.far = successor
        for poll in self.polling:
            poll.cancel()


class Gate:
    """A far handler that echoes its argument when told to."""

    def __init__(self) -> None:
        self.waiting: dict[str, asyncio.Event] = {}
        self.gone: list[str] = []

    async def handle(self, client_id: str, operation: str, arguments: tuple[Any, ...]) -> Any:
        if operation == "wait":
            await self.waiting.setdefault(arguments[0], asyncio.Event()).wait()
        return f"{client_id}:{operation}:{arguments[0]}"

    async def forget(self, client_id: str) -> None:
        self.gone.append(client_id)

    def server(self, **options: Any) -> MailboxServer:
        return MailboxServer(self.handle, on_client_gone=self.forget, **options)


def mailbox(line: Line, name: str = "w") -> Mailbox:
    return Mailbox(
        client_id=name, submit=line.submit, collect=line.collect, poll_s=0.5, message_timeout_s=1.0, retry_s=0.01
    )


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_calls_made_together_leave_together_and_each_gets_its_own_answer() -> None:
    async def scenario() -> None:
        line = Line(Gate().server())
        box = mailbox(line)
        answers = await asyncio.gather(*(box.call("echo", (i,), 5.0) for i in range(500)))
        assert answers == [f"w:echo:{i}" for i in range(500)]
        assert [len(batch) for batch in line.batches] == [500]
        assert box.num_messages <= 4
        await box.aclose()

    run(scenario())


def test_a_slow_call_does_not_hold_up_the_others() -> None:
    async def scenario() -> None:
        gate = Gate()
        box = mailbox(Line(gate.server()))
        slow = asyncio.create_task(box.call("wait", ("slow",), 5.0))
        assert await box.call("echo", (1,), 5.0) == "w:echo:1"
        assert not slow.done()
        gate.waiting["slow"].set()
        assert await slow == "w:wait:slow"
        await box.aclose()

    run(scenario())


def test_a_call_without_an_answer_is_lost_at_its_deadline_and_a_late_answer_is_ignored() -> None:
    async def scenario() -> None:
        gate = Gate()
        box = mailbox(Line(gate.server()))
        with pytest.raises(HostLost, match=r"no answer to wait in 0\.05 s"):
            await box.call("wait", ("slow",), 0.05)
        gate.waiting["slow"].set()
        assert await box.call("echo", (2,), 5.0) == "w:echo:2"
        await box.aclose()

    run(scenario())


def test_when_the_far_side_dies_calls_under_way_are_lost_and_later_ones_work() -> None:
    async def scenario() -> None:
        line = Line(Gate().server())
        box = mailbox(line)
        waiting = [asyncio.create_task(box.call("wait", (str(i),), 10.0)) for i in range(5)]
        await box.call("echo", (0,), 5.0)
        line.kill(Gate().server())
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(outcome, HostLost)
        with pytest.raises(HostLost, match="the line is cut"):
            await box.call("echo", (1,), 5.0)
        line.cut = False
        assert await box.call("echo", (2,), 5.0) == "w:echo:2"
        await box.aclose()

    run(scenario())


def test_a_restart_that_no_message_noticed_still_loses_what_the_old_side_held() -> None:
    async def scenario() -> None:
        line = Line(Gate().server())
        box = mailbox(line)
        held = asyncio.create_task(box.call("wait", ("x",), 10.0))
        await box.call("echo", (0,), 5.0)
        line.far = Gate().server()  # no error is raised anywhere; only the incarnation differs
        with pytest.raises(HostLost, match="restarted"):
            await held
        await box.aclose()

    run(scenario())


def test_an_error_of_the_transport_itself_does_not_end_the_loops() -> None:
    async def scenario() -> None:
        line = Line(Gate().server())
        box = mailbox(line)
        line.far, good = None, line.far
        with pytest.raises(HostLost, match="message failed: AttributeError"):
            await box.call("echo", (1,), 5.0)
        line.far = good
        assert await box.call("echo", (2,), 5.0) == "w:echo:2"
        await box.aclose()

    run(scenario())


def test_closing_ends_calls_under_way() -> None:
    async def scenario() -> None:
        box = mailbox(Line(Gate().server()))
        held = asyncio.create_task(box.call("wait", ("x",), 10.0))
        await box.call("echo", (0,), 5.0)
        await box.aclose()
        with pytest.raises(HostLost, match="closed"):
            await held
        await box.aclose()

    run(scenario())


def test_a_client_that_stopped_polling_is_forgotten_and_another_is_not() -> None:
    async def scenario() -> None:
        now = [0.0]
        gate = Gate()
        server = gate.server(client_timeout_s=120.0, clock=lambda: now[0])
        await server.collect("silent", 0.0)
        now[0] = 100.0
        await server.collect("alive", 0.0)
        now[0] = 121.0
        await server.collect("alive", 0.0)
        await asyncio.sleep(0)
        assert gate.gone == ["silent"]

    run(scenario())


def test_a_pool_behind_a_mailbox_plays_episodes_and_reports_its_death_as_infra() -> None:
    async def scenario() -> None:
        line = Line(PoolService())
        host = MailboxHost([mailbox(line)], grace_s=2.0, retry_s=0.01, patience_s=0.2)
        opened = await host.open("a", TASK)
        assert opened.failure is None
        step = await host.step("a", call("add", a=2, b=3))
        assert [m.text for m in step.messages] == ["5"]
        assert (await host.finish("a")).truncated
        assert await host.digests([TASK]) == [opened.problem_digest]
        await host.close("a")
        await host.open("b", TASK)
        line.kill(PoolService())
        died = await host.step("b", say("5"))
        assert died.failure is not None
        assert (died.failure.kind, died.failure.where, died.reward) == ("infra", "step", None)
        with pytest.raises(HostLost):
            await host.digests([TASK])
        line.cut = False
        unknown = await host.step("b", say("5"))  # the new pool has never heard of the episode
        assert unknown.failure is not None
        assert unknown.failure.kind == "infra"
        assert (await host.open("b", TASK)).failure is None
        await host.aclose()

    run(scenario())


def test_episodes_of_two_clients_with_equal_keys_are_kept_apart_and_die_with_their_client() -> None:
    async def scenario() -> None:
        service = PoolService(client_timeout_s=0.2)
        hosts = [MailboxHost([mailbox(Line(service), name)]) for name in ("w0", "w1")]
        for host in hosts:
            await host.open("a", TASK)
        await hosts[0].close("a")
        assert (await hosts[1].step("a", call("add", a=1, b=1))).failure is None
        await hosts[1].aclose()
        for _ in range(100):
            await hosts[0].close("nobody")
            await asyncio.sleep(0.01)
            if (await service.stats())["open"] == 0:
                break
        assert (await service.stats())["open"] == 0
        await hosts[0].aclose()

    run(scenario())
