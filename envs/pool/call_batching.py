"""Many small calls to a far host in few messages: the batching, matching and failure rules, without any transport.

The near side (`Mailbox`) turns each call into a `Request`; what gathers while one message is on its way leaves with the
next, so a busy client sends one message for many calls. Answers come back by long poll, all finished ones at once.
The far side (`MailboxServer`) runs every request as its own task.

Invariants: a call ends once, with its result or with HostLost, at its deadline at the latest. A host that restarted has
a new incarnation; whatever was sent to an older one is lost. A client that stopped polling is forgotten, and told to
`on_client_gone`, so that its episodes are closed.

Waits: sender - for a request, woken by `call`. Collector - for answers, at most `poll_s` a time, woken by the far side.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from envs.errors import HostLost, described
from envs.worker_thread import boxed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One call. Example: Request(request_id=7, operation="step", arguments=("episode-3", message))"""

    request_id: int
    operation: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer to one request."""

    request_id: int
    value: Any
    error: str = ""
    """Why there is no value; "" = there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """What one poll brings: every finished answer."""

    incarnation: str
    """Names the far side since its last start."""
    replies: tuple[Reply, ...] = ()


@dataclass(slots=True)
class _Pending:
    future: "asyncio.Future[Any]"
    incarnation: str | None = None
    """The far side that took the request; None = not acknowledged yet."""


LINGER_S = 0.005
"""How long a message waits for others to join it. A message costs about 1 ms of CPU on both sides, a tool far more
than this; without it, answers that come one by one cost a fifth of a small run."""


class Mailbox:
    """The near side: `await mailbox.call(operation, arguments, timeout_s)`.

    Example: Mailbox(client_id="worker-0", submit=server.submit, collect=server.collect)
    """

    def __init__(
        self,
        *,
        client_id: str,
        submit: Callable[[str, list[Request]], Awaitable[str]],
        collect: Callable[[str, float], Awaitable[Delivery]],
        poll_s: float = 5.0,
        message_timeout_s: float = 30.0,
        retry_s: float = 0.5,
    ) -> None:
        """`submit` hands requests over and returns the far side's incarnation; both callables raise HostLost.

        `message_timeout_s` is the deadline of one message beyond its poll; after a loss the next message waits
        `retry_s`, so that a host which is restarting is not flooded.
        """
        self._client_id = client_id
        self._submit = submit
        self._collect = collect
        self._poll_s = poll_s
        self._message_timeout_s = message_timeout_s
        self._retry_s = retry_s
        self._ids = itertools.count()
        self._outbox: list[Request] = []
        self._pending: dict[int, _Pending] = {}
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []
        self.num_messages = 0

    async def call(self, operation: str, arguments: tuple[Any, ...], timeout_s: float) -> Any:
        """Raises HostLost where the host is lost or does not answer within `timeout_s`."""
        if not self._loops:
            self._loops = [asyncio.create_task(self._send_loop()), asyncio.create_task(self._collect_loop())]
        request = Request(request_id=next(self._ids), operation=operation, arguments=arguments)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[request.request_id] = _Pending(future=future)
        self._outbox.append(request)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise HostLost(f"no answer to {operation} in {timeout_s:g} s") from None
        finally:
            self._pending.pop(request.request_id, None)

    async def aclose(self) -> None:
        """Stop the loops; calls under way end with HostLost. Idempotent."""
        for loop in self._loops:
            loop.cancel()
        if self._loops:
            await asyncio.wait(self._loops, timeout=1.0)
        self._loops = []
        self._lose(list(self._pending), "the mailbox was closed")

    async def _send_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(LINGER_S)
            batch, self._outbox = [r for r in self._outbox if r.request_id in self._pending], []
            if not batch:
                continue
            try:
                incarnation = await self._limited(self._message_timeout_s, self._submit, self._client_id, batch)
            except HostLost as error:  # it may have arrived: its answers, if any, are ignored
                self._lose([request.request_id for request in batch], str(error))
                await asyncio.sleep(self._retry_s)
                continue
            for request in batch:
                if pending := self._pending.get(request.request_id):
                    pending.incarnation = incarnation

    async def _collect_loop(self) -> None:
        """Polls also while nothing is pending: it is how the far side knows that this client is alive."""
        while True:
            try:
                limit_s = self._poll_s + self._message_timeout_s
                delivery = await self._limited(limit_s, self._collect, self._client_id, self._poll_s)
            except HostLost as error:
                self._lose([i for i, pending in self._pending.items() if pending.incarnation is not None], str(error))
                await asyncio.sleep(self._retry_s)
                continue
            for reply in delivery.replies:
                pending = self._pending.get(reply.request_id)
                if reply.error:
                    self._lose([reply.request_id], reply.error)
                elif pending is not None and not pending.future.done():
                    pending.future.set_result(reply.value)
            older = [i for i, p in self._pending.items() if p.incarnation not in (None, delivery.incarnation)]
            self._lose(older, "the host of environments restarted")

    async def _limited(self, timeout_s: float, send: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        self.num_messages += 1
        try:
            async with asyncio.timeout(timeout_s):
                return await send(*arguments)
        except HostLost:
            raise
        except TimeoutError:
            raise HostLost(f"no answer to a message in {timeout_s:g} s") from None
        except Exception as error:  # supervision: a loop that died of one bad message would leave every call hanging
            logger.exception("a message to the host of environments failed")
            raise HostLost(f"message failed: {type(error).__name__}: {error}") from error

    def _lose(self, request_ids: list[int], reason: str) -> None:
        for request_id in request_ids:
            pending = self._pending.pop(request_id, None)
            if pending is not None and not pending.future.done():
                pending.future.set_exception(HostLost(reason))


@dataclass(slots=True)
class _Client:
    last_seen: float
    finished: list[Reply] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    num_bytes: int = 0
    """Of finished answers."""
    fetched: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever answers were fetched, or nobody will fetch them any more."""


class MailboxServer:
    """The far side: runs requests and keeps answers until they are collected."""

    def __init__(
        self,
        handle: Callable[[str, str, tuple[Any, ...]], Awaitable[Any]],
        *,
        on_client_gone: Callable[[str], Awaitable[None]],
        client_timeout_s: float = 120.0,
        size_of: Callable[[Any], int] = lambda answer: 0,
        max_answer_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A client silent for `client_timeout_s` is gone. What `handle(client_id, operation, arguments)` raises is the
        answer: HostLost on the near side.

        While answers of more than `max_answer_bytes`, by `size_of`, wait for a client, its next requests wait.
        """
        self._size_of = size_of
        self._max_answer_bytes = max_answer_bytes
        self.incarnation = uuid4().hex
        self._handle = handle
        self._on_client_gone = on_client_gone
        self._client_timeout_s = client_timeout_s
        self._clock = clock
        self._clients: dict[str, _Client] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def submit(self, client_id: str, requests: list[Request]) -> str:
        """Start the requests in order and return this side's incarnation at once."""
        client = self._seen(client_id)
        for request in requests:
            self._start(self._run(client_id, client, request))
        return self.incarnation

    async def collect(self, client_id: str, max_wait_s: float) -> Delivery:
        """Every finished answer of a client; waits up to `max_wait_s` for the first."""
        client = self._seen(client_id)
        if not client.finished:
            client.ready.clear()
            try:
                async with asyncio.timeout(max_wait_s):
                    await client.ready.wait()
                await asyncio.sleep(LINGER_S)
            except TimeoutError:
                pass  # an empty delivery tells the client that this side lives
        client.last_seen = self._clock()
        replies, client.finished, client.num_bytes = tuple(client.finished), [], 0
        client.fetched.set()
        return Delivery(incarnation=self.incarnation, replies=replies)

    async def _run(self, client_id: str, client: _Client, request: Request) -> None:
        while client.num_bytes > self._max_answer_bytes:  # ends with the client's next poll, or with the client
            client.fetched.clear()
            try:
                async with asyncio.timeout(self._client_timeout_s):
                    await client.fetched.wait()
            except TimeoutError:
                return  # a client that fetched nothing for so long is gone
        if self._clients.get(client_id) is not client:
            return  # gone meanwhile: nobody would close what this opens
        value, error = await boxed(self._answer(client_id, request))
        if error is None:
            client.num_bytes += self._size_of(value)
        else:  # supervision: a request without an answer would keep its caller waiting
            logger.error("%s failed on the host of environments", request.operation, exc_info=error)
        client.finished.append(
            Reply(request_id=request.request_id, value=value, error=described(error) if error else "")
        )
        client.ready.set()

    async def _answer(self, client_id: str, request: Request) -> Any:
        return await self._handle(client_id, request.operation, request.arguments)

    def _seen(self, client_id: str) -> _Client:
        now = self._clock()
        client = self._clients.setdefault(client_id, _Client(last_seen=now))
        client.last_seen = now
        for gone in [i for i, c in self._clients.items() if now - c.last_seen > self._client_timeout_s]:
            logger.warning("client %s is gone, closing its episodes", gone)
            lost = self._clients.pop(gone)
            lost.num_bytes = 0
            lost.fetched.set()
            self._start(self._on_client_gone(gone))
        return client

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the event loop alone holds no reference
        task.add_done_callback(self._tasks.discard)
