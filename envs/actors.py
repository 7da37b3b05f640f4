"""Pools of environments as Ray actors. All logic is in `envs.client`; here is only the transport."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import uuid4

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from envs.client import PoolClient, PoolService
from envs.errors import HostLost
from envs.mailbox import Delivery, Mailbox, Request

Result = TypeVar("Result")

EnvPoolActor = ray.remote(PoolService)
"""Start with `.options(max_restarts=-1, num_cpus=...).remote(reset_timeout_s=..., ...)`."""


def connect_pools(
    pools: list[ActorHandle],
    *,
    client_name: str,
    reset_timeout_s: float = 30.0,
    step_timeout_s: float = 30.0,
    reward_timeout_s: float = 60.0,
) -> PoolClient:
    """An `EnvHost` over pool actors; make it inside the event loop that uses it."""
    # Unique per connection: a restarted worker must not collect the answers of its former life.
    client_id = f"{client_name}-{uuid4().hex[:8]}"
    return PoolClient(
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
