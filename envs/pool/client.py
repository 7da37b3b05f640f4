"""A far pool as an `EnvHost`: both ends of the line, still without its transport."""

import asyncio
import logging
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from envs.errors import HostLost
from envs.message import ImagePart, Message
from envs.outcome import EnvFailure, ResetOutcome, StepOutcome
from envs.pool.call_batching import Delivery, Mailbox, MailboxServer, Request
from envs.pool.pool import DIGESTS_AT_ONCE, EnvPool
from envs.pool.pool_limits import LagMeter, PoolLimits, resident_mib
from envs.task import Task

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""Added to the pool's own deadline before a client gives up: the pool's verdict says more than silence."""
_RECYCLING = ResetOutcome(failure=EnvFailure(kind="infra", where="reset", message="the pool is being recycled"))
_LAST_ANSWERS_S = 1.0
"""How long a recycled process outlives its last episode, so that its last answers are fetched."""


class PoolService:
    """A pool behind a mailbox; what an actor hosts. Keys are kept apart by client."""

    def __init__(
        self,
        *,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
        client_timeout_s: float = 120.0,
        limits: PoolLimits | None = None,
        exit_process: Callable[[], None] | None = None,
    ) -> None:
        """`exit_process` ends the process, which somebody starts again; without it the pool is never recycled."""
        self._limits = limits or PoolLimits()
        self._pool = EnvPool(
            reset_timeout_s=reset_timeout_s,
            step_timeout_s=step_timeout_s,
            reward_timeout_s=reward_timeout_s,
            limits=self._limits,
        )
        self._server = MailboxServer(
            self._handle,
            on_client_gone=self._forget,
            client_timeout_s=client_timeout_s,
            size_of=answer_bytes,
            max_answer_bytes=self._limits.max_answer_bytes,
        )
        self._keys: defaultdict[str, set[str]] = defaultdict(set)
        self._exit_process = exit_process
        self._num_closed = 0
        self._recycling = False
        self._exiting = False
        self._lag = LagMeter()

    async def submit(self, client_id: str, requests: list[Request]) -> str:
        self._lag.start()
        return await self._server.submit(client_id, requests)

    async def collect(self, client_id: str, max_wait_s: float) -> Delivery:
        return await self._server.collect(client_id, max_wait_s)

    async def stats(self) -> dict[str, float]:
        """Open episodes, failures, abandoned threads; pid, resident MiB; how late the loop wakes (p99, seconds)."""
        process = {"pid": os.getpid(), "resident_mib": resident_mib(), "loop_lag_p99_s": self._lag.p99_s()}
        return {**self._pool.stats, **process}

    async def _handle(self, client_id: str, operation: str, arguments: tuple[Any, ...]) -> Any:
        if operation == "digests":
            return await self._pool.digests(*arguments)
        key, *rest = arguments
        far_key = f"{client_id}/{key}"
        if operation == "open":
            if self._recycling:
                return _RECYCLING
            self._keys[client_id].add(far_key)
            return await self._pool.open(far_key, *rest)
        if operation == "step":
            return await self._pool.step(far_key, *rest)
        if operation == "finish":
            return await self._pool.finish(far_key)
        self._keys[client_id].discard(far_key)
        await self._pool.close(far_key)
        self._num_closed += 1
        self._recycle_if_due()
        return None

    def _recycle_if_due(self) -> None:
        """Past a limit: take no new episodes, and once the running ones have ended, end the process."""
        limits, stats = self._limits, self._pool.stats
        if self._exit_process is None:
            return
        if not self._recycling:
            due = {
                "episodes": 0 < limits.recycle_episodes <= self._num_closed,
                "hung threads": 0 < limits.recycle_threads <= stats["abandoned_threads"],
                "memory": 0 < limits.recycle_mib <= resident_mib(),
            }
            if not any(due.values()):
                return
            logger.warning("recycling this pool: %s", ", ".join(name for name, is_due in due.items() if is_due))
            self._recycling = True
        if stats["open"] == 0 and not self._exiting:
            self._exiting = True
            asyncio.get_running_loop().call_later(_LAST_ANSWERS_S, self._exit_process)

    async def _forget(self, client_id: str) -> None:
        for far_key in self._keys.pop(client_id, set()):
            await self._pool.close(far_key)
            self._num_closed += 1
        self._recycle_if_due()  # these may be the last episodes that a recycled pool waited for


class MailboxHost:
    """The `EnvHost` of a rollout worker: one or more far pools. A lost pool is an outcome of kind "infra"."""

    def __init__(
        self,
        mailboxes: Sequence[Mailbox],
        *,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
        grace_s: float = GRACE_S,
        retry_s: float = 2.0,
        patience_s: float = 300.0,
    ) -> None:
        """Deadlines as given to the pools; a call waits for them and `grace_s` more.

        `patience_s`: how long a pool that is being recycled is waited for: its last episodes, then its next process.
        """
        self._patience_s = patience_s
        self._mailboxes = list(mailboxes)
        self._open_s = 2 * reset_timeout_s + grace_s  # construct, then reset
        self._step_s = step_timeout_s + reward_timeout_s + grace_s
        self._finish_s = reward_timeout_s + grace_s
        self._grace_s = grace_s
        self._retry_s = retry_s

    async def open(self, key: str, task: Task) -> ResetOutcome:
        outcome = await self._open(key, task)
        until = time.monotonic() + self._patience_s
        while outcome == _RECYCLING and time.monotonic() < until:
            await asyncio.sleep(self._retry_s)
            outcome = await self._open(key, task)
            if outcome.failure is not None and outcome.failure.kind == "infra":
                outcome = _RECYCLING  # the old process has gone, the new one is not there yet
        return outcome

    async def _open(self, key: str, task: Task) -> ResetOutcome:
        try:
            return await self._mailbox(key).call("open", (key, task), self._open_s)
        except HostLost as error:
            return ResetOutcome(failure=_lost("reset", error))

    async def step(self, key: str, message: Message) -> StepOutcome:
        try:
            return await self._mailbox(key).call("step", (key, message), self._step_s)
        except HostLost as error:
            return StepOutcome(failure=_lost("step", error))

    async def finish(self, key: str) -> StepOutcome:
        try:
            return await self._mailbox(key).call("finish", (key,), self._finish_s)
        except HostLost as error:
            return StepOutcome(failure=_lost("reward", error))

    async def close(self, key: str) -> None:
        try:
            await self._mailbox(key).call("close", (key,), self._grace_s)
        except HostLost as error:
            logger.debug("close of %s: %s", key, error)  # a lost pool has closed everything

    async def digests(self, tasks: list[Task]) -> list[str]:
        """As `EnvPool.digests`. Asks again while the pool restarts, then raises HostLost: a made-up digest could let a
        held-out problem into training."""
        deadline_s = self._open_s * (1 + len(tasks) // DIGESTS_AT_ONCE)
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return await self._mailboxes[0].call("digests", (tasks,), deadline_s)
            except HostLost as error:
                if time.monotonic() > until:
                    raise
                logger.warning("no digests yet: %s", error)
                await asyncio.sleep(self._retry_s)

    async def aclose(self) -> None:
        for mailbox in self._mailboxes:
            await mailbox.aclose()

    def _mailbox(self, key: str) -> Mailbox:
        return self._mailboxes[zlib.crc32(key.encode()) % len(self._mailboxes)]


def answer_bytes(answer: Any) -> int:
    """About what an answer's texts and images take."""
    if not isinstance(answer, ResetOutcome | StepOutcome):
        return 0
    parts = [part for message in answer.messages for part in message.content]
    return sum(len(part.data) if isinstance(part, ImagePart) else len(part.text) for part in parts)


def _lost(where: str, error: HostLost) -> EnvFailure:
    return EnvFailure(kind="infra", where=where, message=str(error))
