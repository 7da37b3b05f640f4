"""Asking a service that may be slow or away for a moment: a judge, a search engine."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from envs.errors import InfraFault

T = TypeVar("T")

MAX_PAUSE_S = 10.0
_chance = random.Random()  # of its own: the global one belongs to the environment


async def retrying(
    call: Callable[[], Awaitable[T]],
    *,
    attempts: int = 3,
    timeout_s: float = 10.0,
    pause_s: float = 0.5,
    retry_on: tuple[type[Exception], ...] = (OSError,),
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """What `call()` gives, asked for at most `attempts` times, `timeout_s` seconds each.

    An attempt that is late or raises one of `retry_on` is followed by a pause of 0.5 to 1 times `pause_s`, which
    doubles each time, up to MAX_PAUSE_S. After the last one InfraFault is raised: the episode then has no reward and
    may be tried again. Other errors are raised as they are. All of it takes at most
    attempts * (timeout_s + MAX_PAUSE_S); keep `reward_timeout_s` above what yours can take.

    Example: verdict = await retrying(lambda: ask(answer), attempts=3, timeout_s=5.0)
    """
    if attempts < 1 or timeout_s <= 0:
        raise ValueError(f"attempts must be at least 1 and timeout_s more than 0, not {attempts} and {timeout_s}")
    for attempt in range(1, attempts + 1):
        guard = asyncio.timeout(timeout_s)
        try:
            async with guard:
                return await call()
        except (TimeoutError, *retry_on) as error:
            if isinstance(error, TimeoutError) and not guard.expired() and not issubclass(TimeoutError, retry_on):
                raise
            said = f"no answer in {timeout_s:g} s" if guard.expired() else f"{type(error).__name__}: {error}"
            if attempt == attempts:
                raise InfraFault(f"gave up after {attempts} attempts: {said}") from error
        await sleep(min(MAX_PAUSE_S, pause_s * 2 ** (attempt - 1)) * _chance.uniform(0.5, 1.0))
    raise AssertionError("unreachable")
