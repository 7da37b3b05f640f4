"""The local engine: continuous batching in plain PyTorch, in this process, on a thread of its own.

Two threads share it. Asyncio callers post commands and await futures; the step thread runs the commands between two
steps of a `BatchStepper`, and delivers what ended to the callers' loop, once per step.

- the step thread waits for commands while nothing runs; woken by every post and by `close`;
- `generate` waits for its answer, which comes at the request's deadline at the latest, plus `GRACE_S`;
- `load_weights` waits for the step that runs now, at most `SWAP_TIMEOUT_S`;
- `close` waits for the step that runs now, at most `CLOSE_TIMEOUT_S`.
"""

import asyncio
import contextlib
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from conf.schema import EngineConfig
from policy.batch_stepper import BatchStepper
from policy.checkpoint_io import expected_tensors
from policy.engine import (
    CachePolicy,
    Completion,
    EngineCapabilities,
    EngineClosed,
    EngineError,
    EngineStats,
    GenerationRequest,
    UnsupportedRequest,
)
from policy.model import PolicyModel
from policy.request_limits import check_request
from policy.running_batch import Ticket
from policy.sampling import stream_key
from policy.weight_store import PolicySnapshot, WeightSyncError

LOGPROB_TOLERANCE = 1e-3
"""Largest expected difference to the learner for the same weights, fp32 on a CPU."""
GRACE_S = 30.0
"""How much later than its deadline an answer may come before its engine counts as stuck."""
SWAP_TIMEOUT_S = 120.0
IDLE_WAIT_S = 1.0
CLOSE_TIMEOUT_S = 30.0

_T = TypeVar("_T")


class LocalEngine:
    """An `Engine` over a model of its own, which nobody else may change.

    Example: engine = LocalEngine(model, EngineConfig()); await engine.load_weights(snapshot)
    completion = await engine.generate(GenerationRequest(request_id="0", prompt_ids=ids, sampling=SamplingSpec()))

    `seed` starts the streams of requests that bring no seed; None = other numbers in every process.
    """

    def __init__(
        self,
        model: PolicyModel,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._vocab_size = model.config.vocab_size
        self._expected = expected_tensors(model)
        self._stepper = BatchStepper(model, config, clock=clock)
        self._stream_rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        self._capabilities = EngineCapabilities(
            name="local",
            max_model_tokens=config.max_model_tokens,
            logprob_tolerance=LOGPROB_TOLERANCE,
            routed_experts=model.config.num_experts > 0,
        )
        self._wakeup = threading.Condition()
        """Guards the inbox and `_closing`."""
        self._inbox: deque[Callable[[], None]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        """What ended the step thread, if not `close`."""
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

    def stats(self) -> EngineStats:
        return self._stepper.stats()

    async def generate(self, request: GenerationRequest) -> Completion:
        self._start()
        if self.policy_version < 0:
            raise EngineError("the engine serves nothing before it holds weights: call load_weights first")
        check_request(request, vocab_size=self._vocab_size, max_model_tokens=self._config.max_model_tokens)
        if request.request_id in self._request_ids:
            raise UnsupportedRequest(f"request_id {request.request_id!r} is in use by a request that has not ended")
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

    async def abort(self, request_id: str) -> None:
        self._post(lambda: self._stepper.abort(request_id))

    async def close_session(self, session_id: str) -> None:
        self._post(lambda: self._stepper.close_session(session_id))

    async def load_weights(self, snapshot: PolicySnapshot, *, cache_policy: CachePolicy = "recompute") -> None:
        self._start()
        if snapshot.version < 0:
            raise WeightSyncError(f"version {snapshot.version} is not at least 0")
        async with self._swap_order:
            await asyncio.to_thread(snapshot.verify, self._expected)
            self._start()  # it may have been closed meanwhile
            await self._swap(snapshot, cache_policy)

    async def _swap(self, snapshot: PolicySnapshot, cache_policy: CachePolicy) -> None:
        swapped: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def swap() -> None:
            refusal = None
            try:
                self._stepper.swap(snapshot, cache_policy)
            except WeightSyncError as error:  # the tensors were changed after they were verified
                refusal = error
            self._call_loop(lambda: _answer(swapped, refusal))

        self._post(swap)
        await self._wait_for(swapped, SWAP_TIMEOUT_S)

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
            raise EngineError(f"the step thread gave no answer in {timeout_s:g} s") from None
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
            with torch.inference_mode():
                while self._run_commands():
                    if self._stepper.has_work:
                        self._stepper.step()
                    if finished := self._stepper.finished:
                        self._stepper.finished = []
                        self._call_loop(lambda finished=finished: self._deliver(finished))
        except Exception as error:  # supervision: whatever it was, everyone who waits must hear of it
            self._failure = error
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
