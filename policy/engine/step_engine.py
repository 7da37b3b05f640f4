"""What engines that work in steps share: one thread that steps, callers on an asyncio loop.

Two threads share a `StepEngine`. Asyncio callers post commands and await futures; the step thread runs the commands
between two steps of its `Stepper`, and delivers what ended to the callers' loop, once per step.

- the step thread waits for commands while nothing runs; woken by every post and by `close`;
- `generate` waits for its answer, which comes at the request's deadline at the latest, plus `GRACE_S`;
- `load_weights` waits for the step that runs now, at most `SWAP_TIMEOUT_S`, and `start_timeout_s` more the first time;
  an engine that has not swapped by then has died;
- `close` waits for the step that runs now, at most `CLOSE_TIMEOUT_S`.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import numpy as np
import torch

from conf.schema import EngineConfig
from policy.engine.protocol import (
    CachePolicy,
    Completion,
    EngineCapabilities,
    EngineClosed,
    EngineError,
    EngineStats,
    GenerationRequest,
    Snapshot,
    UnsupportedRequest,
)
from policy.engine.request_limits import check_request
from policy.engine.running_batch import Ticket
from policy.engine.sampling import stream_key
from policy.sync.snapshot import WeightSyncError

GRACE_S = 30.0
"""How much later than its deadline an answer may come before its engine counts as stuck."""
SWAP_TIMEOUT_S = 120.0
IDLE_WAIT_S = 1.0
CLOSE_TIMEOUT_S = 30.0

_T = TypeVar("_T")


class _NoAnswer(EngineError):
    """The step thread is stuck."""


class Stepper(Protocol):
    """What the step thread drives; synchronous, and called from that thread alone but for the two readers."""

    finished: list[tuple[Ticket, Completion | EngineError]]
    """What ended since the engine last emptied it."""

    @property
    def policy_version(self) -> int:
        """-1 before the first swap. Read from other threads."""
        ...

    @property
    def has_work(self) -> bool: ...

    def stats(self) -> EngineStats:
        """Read from other threads."""
        ...

    def start(self) -> None:
        """Whatever takes long; before anything else."""
        ...

    def add(self, ticket: Ticket) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def close_session(self, session_id: str) -> None: ...

    def swap(self, snapshot: Snapshot, cache_policy: CachePolicy) -> None:
        """Serve other weights from the next step on. Raises `WeightSyncError`, all as before, if they do not fit."""
        ...

    def step(self) -> None: ...

    def close(self) -> None: ...


class StepEngine:
    """An `Engine` around a `Stepper`: deadlines, order of swaps, callers that go away, the end.

    `expected`: {name: (shape, numpy dtype)} of the weights. `seed` starts the streams of requests that bring no seed;
    None = other numbers in every process. `start_timeout_s`: what the stepper's start may take.
    """

    def __init__(
        self,
        stepper: Stepper,
        config: EngineConfig,
        *,
        capabilities: EngineCapabilities,
        expected: Mapping[str, tuple[tuple[int, ...], str]],
        vocab_size: int,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
        start_timeout_s: float = 0.0,
        swap_timeout_s: float = SWAP_TIMEOUT_S,
    ) -> None:
        self._config = config
        self._clock = clock
        self._vocab_size = vocab_size
        self._expected = expected
        self._stepper = stepper
        self._stream_rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        self._capabilities = capabilities
        self._start_timeout_s = start_timeout_s
        self._swap_timeout_s = swap_timeout_s
        self._wakeup = threading.Condition()
        """Guards the inbox and `_closing`."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        """What ended the step thread, if not `close`, or the swap that it did not finish."""
        self._loop: asyncio.AbstractEventLoop | None = None
        """The callers' loop. What follows is touched on it alone."""
        self._pending: set[asyncio.Future] = set()
        """What callers wait for."""
        self._request_ids: set[str] = set()
        """Of the requests among them."""
        self._swap_order = asyncio.Lock()
        """Weights are swapped in the order in which `load_weights` was called."""

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    @property
    def policy_version(self) -> int:
        return self._stepper.policy_version

    @property
    def died(self) -> bool:
        return self._failure is not None

    def stats(self) -> EngineStats:
        return self._stepper.stats()

    async def generate(self, request: GenerationRequest) -> Completion:
        self._start()
        if self.policy_version < 0:
            raise EngineError("the engine serves nothing before it holds weights: call load_weights first")
        check_request(request, vocab_size=self._vocab_size, max_model_tokens=self._config.max_model_tokens)
        if request.request_id in self._request_ids:
            raise UnsupportedRequest(f"request_id {request.request_id!r} is in use by a request that has not ended")
        self._check_capabilities(request)
        seed = request.sampling.seed
        ticket = Ticket(
            request=request,
            prompt_ids=np.array(request.prompt_ids, np.int32),
            reply=asyncio.get_running_loop().create_future(),
            arrived_s=self._clock(),
            stream=stream_key(int(self._stream_rng.integers(1 << 63)) if seed is None else seed),
        )
        self._request_ids.add(request.request_id)
        try:
            self._post(lambda: self._stepper.add(ticket))
            return await self._wait_for(ticket.reply, max(0.0, request.deadline_s) + GRACE_S)
        finally:
            self._request_ids.discard(request.request_id)
            if ticket.reply.cancelled():  # nobody waits for it any more
                await self.abort(request.request_id)

    def _check_capabilities(self, request: GenerationRequest) -> None:
        can, spec = self._capabilities, request.sampling
        lacking = {
            "seed": spec.seed is not None and not can.per_request_seed,
            "session_id": request.session_id is not None and not can.sessions,
            "top_p": spec.top_p != 1 and not can.nucleus,
            "top_k": spec.top_k != 0 and not can.nucleus,
        }
        if names := [name for name, asked in lacking.items() if asked]:
            raise UnsupportedRequest(f"engine {can.name!r} cannot take {names[0]} of a request; leave it unset")
        if 0 < spec.temperature < can.min_temperature:
            allowed = f"0 or at least {can.min_temperature:g}"
            raise UnsupportedRequest(f"engine {can.name!r} cannot take temperature {spec.temperature:g}: {allowed}")

    async def abort(self, request_id: str) -> None:
        self._post(lambda: self._stepper.abort(request_id))

    async def close_session(self, session_id: str) -> None:
        self._post(lambda: self._stepper.close_session(session_id))

    async def load_weights(self, snapshot: Snapshot, *, cache_policy: CachePolicy = "recompute") -> None:
        self._start()
        if snapshot.version < 0:
            raise WeightSyncError(f"version {snapshot.version} is not at least 0")
        async with self._swap_order:
            await asyncio.to_thread(snapshot.verify, self._expected)
            self._start()  # it may have been closed meanwhile
            await self._swap(snapshot, cache_policy)

    async def _swap(self, snapshot: Snapshot, cache_policy: CachePolicy) -> None:
        swapped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def swap() -> None:
            refusal = None
            try:
                self._stepper.swap(snapshot, cache_policy)
            except WeightSyncError as error:  # the tensors were changed after they were verified
                refusal = error
            self._call_loop(lambda: _answer(swapped, refusal))

        self._post(swap)
        started = self._stepper.policy_version >= 0
        try:
            await self._wait_for(swapped, self._swap_timeout_s + (0.0 if started else self._start_timeout_s))
        except _NoAnswer as error:  # nobody knows which weights it will serve
            self._failure = error
            with self._wakeup:
                self._closing = True
                self._wakeup.notify()
            self._fail_pending()
            raise self._closed_error() from error

    async def close(self) -> None:
        with self._wakeup:
            self._closing = True
            self._wakeup.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        self._fail_pending()

    # --- on the callers' loop ---

    def _start(self) -> None:
        """Start the step thread on first use; raise where the engine was closed or died."""
        if self._closing or self._failure is not None:
            raise self._closed_error()
        self._loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine-step", daemon=True)
            self._thread.start()

    def _post(self, command: Callable[[], None]) -> None:
        with self._wakeup:
            self._inbox.append(command)
            self._wakeup.notify()

    async def _wait_for(self, reply: asyncio.Future[_T], timeout_s: float) -> _T:
        self._pending.add(reply)
        try:
            async with asyncio.timeout(timeout_s):
                return await reply
        except TimeoutError:
            raise _NoAnswer(f"the step thread gave no answer in {timeout_s:g} s") from None
        finally:
            self._pending.discard(reply)

    def _deliver(self, finished: list[tuple[Ticket, Completion | EngineError]]) -> None:
        for ticket, outcome in finished:
            _answer(ticket.reply, outcome)

    def _fail_pending(self) -> None:
        for reply in self._pending:
            _answer(reply, self._closed_error())

    def _closed_error(self) -> EngineClosed:
        if self._failure is None:
            return EngineClosed("the engine is closed")
        error = EngineClosed(f"the engine's step thread died: {self._failure!r}")
        error.__cause__ = self._failure
        return error

    # --- on the step thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._config.threads)  # of this thread, and of threads that start later
        try:
            try:
                with torch.inference_mode():
                    self._stepper.start()
                    while self._run_commands():
                        if self._stepper.has_work:
                            self._stepper.step()
                        if finished := self._stepper.finished:
                            self._stepper.finished = []
                            self._call_loop(lambda finished=finished: self._deliver(finished))
            finally:
                self._stepper.close()
        except Exception as error:  # supervision: whatever it was, everyone who waits must hear of it
            self._failure = self._failure or error
        self._call_loop(self._fail_pending)

    def _run_commands(self) -> bool:
        """Wait for work, run what was posted; False once the engine is closing."""
        with self._wakeup:
            while not (self._inbox or self._closing or self._stepper.has_work):
                self._wakeup.wait(IDLE_WAIT_S)
            commands, self._inbox = self._inbox, deque()
        for command in commands:
            command()
        return not self._closing

    def _call_loop(self, callback: Callable[[], object]) -> None:
        assert self._loop is not None
        # A closed loop has no one left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)


def _answer(reply: asyncio.Future[_T], outcome: _T | Exception) -> None:
    """Give a caller its result or its error, unless it went away."""
    if reply.done():
        return
    if isinstance(outcome, Exception):
        reply.set_exception(outcome)
    else:
        reply.set_result(outcome)
