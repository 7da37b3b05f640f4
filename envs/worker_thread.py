"""Where an author's blocking code runs: one thread for each environment, and a loop for callers without one.

One thread for each environment, because sqlite connections and many clients must stay on the thread that made them;
daemon threads, because a hung one must never keep the process from ending (executors join theirs at exit).
"""

import asyncio
import contextvars
import functools
import queue
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar

Result = TypeVar("Result")


class WorkerThread:
    """Runs functions one after the other on one daemon thread.

    A thread cannot be killed: where the caller stops waiting (deadline, cancellation) the thread is abandoned; it ends
    once its function returns, if ever.
    """

    num_abandoned: ClassVar[int] = 0
    """Threads of this process that were given up while running."""

    def __init__(self) -> None:
        self.abandoned = False
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=_run_jobs, args=(self._jobs,), name="shoal-env", daemon=True).start()

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        in_context = contextvars.copy_context().run  # so that what it prints is known as its episode's
        self._jobs.put(functools.partial(_run_job, loop, future, in_context, (function, *args)))
        try:
            return await future
        except asyncio.CancelledError:
            self.abandoned = True
            WorkerThread.num_abandoned += 1
            self.stop()
            raise

    def stop(self) -> None:
        """End the thread after its running function; idempotent."""
        self._jobs.put(None)


def _run_jobs(jobs: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or an idle thread would keep the environment of its last job alive


def _run_job(
    loop: asyncio.AbstractEventLoop, future: "asyncio.Future[Any]", function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    error: BaseException | None = None
    value = None
    try:
        value = function(*args)
    except StopIteration as stop:  # a future refuses it
        error = RuntimeError(f"raised {stop!r}")
    except BaseException as raised:  # SystemExit included: it belongs to the caller, not to this thread
        error = raised

    def deliver() -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    try:
        loop.call_soon_threadsafe(deliver)
    except RuntimeError:
        return  # the loop was closed: nobody waits any more


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="shoal-sync", daemon=True).start()
    return loop


async def boxed(work: Coroutine[Any, Any, Result]) -> tuple[Result | None, BaseException | None]:
    """What `work` returned, or the error it raised, as data: a SystemExit that escapes a task would stop the loop."""
    try:
        return await work, None
    except (Exception, SystemExit) as error:  # an author's code may raise anything
        return None, error


def run_sync(coroutine: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
    """Run a coroutine to its end from synchronous code, also inside a running loop (Jupyter, Ray).

    Raises TimeoutError after `timeout_s`, and RuntimeError where called from a coroutine that itself runs in here.
    """
    if threading.current_thread().name == "shoal-sync":
        coroutine.close()
        raise RuntimeError("step() or reset() called from inside an environment's own code: await astep() or areset()")

    future = asyncio.run_coroutine_threadsafe(boxed(coroutine), _background_loop())
    try:
        value, error = future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise TimeoutError(f"timed out after {timeout_s:g} s") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # value is set wherever error is None
