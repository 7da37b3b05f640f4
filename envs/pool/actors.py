"""Pools of environments as Ray actors: the transport alone.

The logic is in `envs.pool.client` and `envs.pool.call_batching`.
"""

import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from ray.exceptions import RayError

from envs.errors import HostLost
from envs.pool.call_batching import Delivery, Mailbox, Request
from envs.pool.client import MailboxHost, PoolService
from envs.pool.pool_limits import PoolLimits
from envs.pool.printed import PrintedStream
from envs.redaction import expose

Result = TypeVar("Result")


class EnvPoolActor(PoolService):
    """A pool in a process of its own. `ray.remote(EnvPoolActor).options(max_restarts=-1, ...)` starts one."""

    def __init__(
        self,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
        log_folder: str = "",
        name: str = "pool",
        limits: PoolLimits | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        """Failures and everything environments print go to `log_folder`/`name`.log, where a folder is given.

        `secrets` become variables of this process alone. An argument, for Ray writes a runtime_env into its logs.
        """
        expose(secrets or {})
        super().__init__(
            reset_timeout_s=reset_timeout_s,
            step_timeout_s=step_timeout_s,
            reward_timeout_s=reward_timeout_s,
            limits=limits,
            exit_process=_exit_process,
        )
        if log_folder:
            _log_to_file(Path(log_folder) / f"{name}.log")


class PoolClient(MailboxHost):
    """An `EnvHost` over one or more `EnvPoolActor` handles."""

    def __init__(
        self,
        *pools: Any,
        reset_timeout_s: float = 30.0,
        step_timeout_s: float = 30.0,
        reward_timeout_s: float = 60.0,
    ) -> None:
        """Deadlines as given to the pools. Calls are made from one event loop."""
        # Unique per connection: a restarted worker must not collect the answers of its former life.
        client_id = uuid4().hex
        super().__init__(
            [_mailbox(pool, client_id) for pool in pools],
            reset_timeout_s=reset_timeout_s,
            step_timeout_s=step_timeout_s,
            reward_timeout_s=reward_timeout_s,
        )


def _mailbox(pool: Any, client_id: str) -> Mailbox:
    async def submit(client: str, requests: list[Request]) -> str:
        return await _answer(lambda: pool.submit.remote(client, requests))

    async def collect(client: str, max_wait_s: float) -> Delivery:
        return await _answer(lambda: pool.collect.remote(client, max_wait_s))

    return Mailbox(client_id=client_id, submit=submit, collect=collect)


async def _answer(call: Callable[[], Awaitable[Result]]) -> Result:
    """Await one actor call; a dead, restarting or unreachable actor is HostLost."""
    try:
        return await call()
    except RayError as error:
        raise HostLost(f"the environment pool is lost: {str(error).splitlines()[0]}") from error


def _exit_process() -> None:
    """At once, past all finalizers: hung threads would hold a regular exit up. Ray starts the actor again."""
    logging.shutdown()
    os._exit(0)


def _log_to_file(path: Path) -> None:
    """Send log records and prints of this process, which is ours alone, to one file; an episode's to it as well."""
    stream = PrintedStream(path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace"))
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
    sys.stdout = sys.stderr = stream
