"""A far pool as an `EnvHost`: both ends of the line, still without its transport."""

import asyncio
import logging
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from envs.call_batching import Delivery, Mailbox, MailboxServer, Request
from envs.errors import HostLost
from envs.message import Message
from envs.outcome import EnvFailure, ResetOutcome, StepOutcome
from envs.pool import DIGESTS_AT_ONCE, EnvPool
from envs.task import Task

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""Added to the pool's own deadline before a client gives up: the pool's verdict says more than silence."""
_DIGEST_ATTEMPTS = 5


class PoolService:
    """A pool behind a mailbox; what an actor hosts. Keys are kept apart by client."""

    def __init__(
        self,
        *,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
        client_timeout_s: float = 120.0,
    ) -> None:
        self._pool = EnvPool(
            reset_timeout_s=reset_timeout_s, step_timeout_s=step_timeout_s, reward_timeout_s=reward_timeout_s
        )
        self._server = MailboxServer(self._handle, on_client_gone=self._forget, client_timeout_s=client_timeout_s)
        self._keys: defaultdict[str, set[str]] = defaultdict(set)

    async def submit(self, client_id: str, requests: list[Request]) -> str:
        return await self._server.submit(client_id, requests)

    async def collect(self, client_id: str, max_wait_s: float) -> Delivery:
        return await self._server.collect(client_id, max_wait_s)

    async def stats(self) -> dict[str, int]:
        """Counts of open episodes, failures and abandoned threads."""
        return self._pool.stats

    async def _handle(self, client_id: str, operation: str, arguments: tuple[Any, ...]) -> Any:
        if operation == "digests":
            return await self._pool.digests(*arguments)
        key, *rest = arguments
        far_key = f"{client_id}/{key}"
        if operation == "open":
            self._keys[client_id].add(far_key)
            return await self._pool.open(far_key, *rest)
        if operation == "step":
            return await self._pool.step(far_key, *rest)
        if operation == "finish":
            return await self._pool.finish(far_key)
        self._keys[client_id].discard(far_key)
        return await self._pool.close(far_key)

    async def _forget(self, client_id: str) -> None:
        for far_key in self._keys.pop(client_id, set()):
            await self._pool.close(far_key)


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
    ) -> None:
        """Deadlines as given to the pools; a call waits for them and `grace_s` more."""
        self._mailboxes = list(mailboxes)
        self._open_s = 2 * reset_timeout_s + grace_s  # construct, then reset
        self._step_s = step_timeout_s + reward_timeout_s + grace_s
        self._finish_s = reward_timeout_s + grace_s
        self._grace_s = grace_s
        self._retry_s = retry_s

    async def open(self, key: str, task: Task) -> ResetOutcome:
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
        for attempt in range(1, _DIGEST_ATTEMPTS):
            try:
                return await self._mailboxes[0].call("digests", (tasks,), deadline_s)
            except HostLost as error:
                logger.warning("no digests, attempt %d: %s", attempt, error)
                await asyncio.sleep(self._retry_s)
        return await self._mailboxes[0].call("digests", (tasks,), deadline_s)

    async def aclose(self) -> None:
        for mailbox in self._mailboxes:
            await mailbox.aclose()

    def _mailbox(self, key: str) -> Mailbox:
        return self._mailboxes[zlib.crc32(key.encode()) % len(self._mailboxes)]


def _lost(where: str, error: HostLost) -> EnvFailure:
    return EnvFailure(kind="infra", where=where, message=str(error))
