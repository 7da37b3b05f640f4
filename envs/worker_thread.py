"""Where an author's blocking code runs: one thread for each environment, and a loop for callers without one.

One thread for each environment, because sqlite connections and many clients must stay on the thread that made them;
daemon threads, because a hung one must never keep the process from ending (executors join theirs at exit).

Whatever an author's code raises leaves here as an Exception: what is none would end our tasks, loops and threads.
"""

import asyncio
import contextlib
import contextvars
import functools
import queue
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, TypeVar

from envs.errors import AuthorExit, described

Result = TypeVar("Result")

CANCEL_GRACE_S = 0.2
"""How long a cancelled coroutine may take to clean up before it is left behind."""
_left_behind: "set[asyncio.Task[Any]]" = set()
"""Coroutines that go on although they were cancelled. An event loop alone may drop a task that nobody else holds."""


class WorkerThread:
    """Runs functions one after the other on one daemon thread.

    A thread cannot be killed. Where a caller stops waiting (deadline, cancellation), the running function goes on and
    what comes next waits behind it: an author's code never runs on two threads at once, nor moves to another one.
    """

    num_abandoned: ClassVar[int] = 0
    """Threads of this process that were given up while running."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._late: _Job | None = None
        self._stopped = False
        threading.Thread(target=_run_jobs, args=(self._jobs,), name="shoal-env", daemon=True).start()

    @property
    def late_call(self) -> str:
        """Name of the function that still runs although its caller stopped waiting; "" = none does."""
        return self._late.name if self._late is not None and not self._late.ended else ""

    async def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns or raises; AuthorExit for what is no Exception."""
        job = _Job(function, args)
        self._jobs.put(job)
        try:
            return await job.future
        except asyncio.CancelledError:
            if job.started:
                self._late = job
            raise

    async def wait_until_free(self) -> None:
        """Return once everything that runs or waits on the thread has ended."""
        await self.run(_nothing)

    def stop(self) -> None:
        """End the thread after its running function; idempotent."""
        if not self._stopped:
            self._stopped = True
            WorkerThread.num_abandoned += bool(self.late_call)
            self._jobs.put(None)


class _Job:
    """One call on its way to the thread and back to the loop that waits for it."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self.name = getattr(getattr(function, "func", function), "__name__", "a call")
        self.started = self.ended = False
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Any] = self._loop.create_future()
        # In the caller's context, so that what the function prints is known as its episode's.
        self._work: Callable[[], Any] | None = functools.partial(contextvars.copy_context().run, function, *args)

    def run(self) -> None:
        """On the thread. A job whose caller left before its turn came is skipped."""
        self.started = True
        if not self.future.cancelled():
            value, error = self._outcome()
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver, value, error)
        self.ended = True
        self._work = None

    def _outcome(self) -> tuple[Any, Exception | None]:
        assert self._work is not None
        try:
            return self._work(), None
        except StopIteration as stop:  # a future refuses it
            return None, RuntimeError(f"raised {stop!r}")
        except Exception as error:
            return None, error
        except BaseException as error:  # nothing but an author raises these here: signals reach the main thread alone
            return None, _author_exit(error)

    def _deliver(self, value: Any, error: Exception | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(value)


def _run_jobs(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # or an idle thread would keep the environment of its last job alive


def _nothing() -> None:
    return None


# --- what an author's code raises, as data --------------------------------------------------------------------------


def as_exception(error: BaseException) -> Exception:
    """What an author's code raised, as an Exception: AuthorExit around what is none.

    Raises `error` itself where it is not the author's: the cancellation of the running task, the end of a coroutine
    that is thrown away, the user's Ctrl-C.
    """
    if isinstance(error, Exception):
        return error
    if isinstance(error, GeneratorExit) or _is_cancelling(error) or _is_from_the_user(error):
        raise error
    return _author_exit(error)


def _author_exit(error: BaseException) -> AuthorExit:
    exited = AuthorExit(described(error))
    exited.__cause__ = error
    return exited


def _is_cancelling(error: BaseException) -> bool:
    if not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # on an environment's thread there is no loop
        return False
    return task is not None and task.cancelling() > 0


def _is_from_the_user(error: BaseException) -> bool:
    """Python turns SIGINT into KeyboardInterrupt on the main thread, while its own handler is installed. asyncio and
    our runs install others, which end tasks without raising; then, and on other threads, it is an author's."""
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


async def boxed(work: Coroutine[Any, Any, Result]) -> tuple[Result | None, Exception | None]:
    """What `work` returned, or the error it raised, as data; raises what `as_exception` raises."""
    try:
        return await work, None
    except BaseException as error:  # episode capture: an author's code may raise anything
        return None, as_exception(error)


def outcome_of(task: "asyncio.Task[tuple[Result | None, Exception | None]]") -> tuple[Result | None, Exception | None]:
    """Of a task of `boxed` work that has ended."""
    raised = task.exception()  # a GeneratorExit that an author raised: `boxed` cannot tell it from a real one
    return task.result() if raised is None else (None, _author_exit(raised))


async def within(limit_s: float, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns or raises; TimeoutError after `limit_s`, and at most CANCEL_GRACE_S more.

    Unlike `asyncio.timeout` it does not depend on `work`, which may swallow its cancellation: it is then left behind.
    """
    task = asyncio.ensure_future(boxed(work))
    try:
        await asyncio.wait({task}, timeout=limit_s)
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
            raise TimeoutError(f"timed out after {limit_s:g} s")
    finally:
        if not task.done():
            task.cancel()
            _left_behind.add(task)
            task.add_done_callback(_left_behind.discard)
    value, error = outcome_of(task)
    if error is not None:
        raise error
    return value  # type: ignore[return-value]  # value is set wherever error is None


# --- from synchronous code ------------------------------------------------------------------------------------------


@functools.cache
def _background_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="shoal-sync", daemon=True).start()
    return loop


def run_sync(coroutine: Coroutine[Any, Any, Result], timeout_s: float) -> Result:
    """Run a coroutine to its end from synchronous code, also inside a running loop (Jupyter, Ray).

    Raises TimeoutError after `timeout_s`, AuthorExit for what is no Exception, and RuntimeError where called from a
    coroutine that itself runs in here.
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
