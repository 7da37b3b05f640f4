"""Stand-ins for time and for the policy, so that loops are tested without waiting and without a model."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from policy.engine.protocol import (
    CachePolicy,
    Completion,
    EngineCapabilities,
    EngineClosed,
    EngineError,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Snapshot,
    UnsupportedRequest,
)
from policy.engine.request_limits import check_request
from policy.sync.snapshot import WeightSyncError

Script = Callable[[np.ndarray, np.random.Generator], Sequence[int]]


class FakeClock:
    """Seconds that pass only when told.

    Example: clock = FakeClock(); clock.advance(5); clock() -> 5.0
    """

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class ScriptedEngine:
    """An `Engine` whose tokens come from a function of the prompt and a seeded generator.

    One token a turn of the event loop, so that aborts, deadlines and weight swaps land between tokens as in a real one.
    `script(prompt_ids, rng)` gives all tokens the policy would say; they are cut at `max_tokens`, the model's length or
    a stop token. If it gives fewer, the last one counts as a stop token. Without a seed in the request, `rng` is seeded
    by the number of requests so far: the same calls in the same order give the same tokens.

    Example: engine = ScriptedEngine(lambda prompt_ids, rng: [7, 8, 1]); (await engine.generate(request)).token_ids
    -> [7, 8, 1] with logprobs -0.5
    """

    def __init__(
        self,
        script: Script,
        *,
        vocab_size: int = 272,
        max_model_tokens: int = 256,
        expected: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
        logprob: float = -0.5,
        token_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`expected` {name: (shape, dtype)} is what snapshots are checked against; None = whatever they bring.

        `token_s` is the real time of a token; 0 = one turn of the event loop.
        """
        self._script = script
        self._vocab_size = vocab_size
        self._expected = expected
        self._logprob = logprob
        self._token_s = token_s
        self._clock = clock
        self._capabilities = EngineCapabilities(
            name="scripted", max_model_tokens=max_model_tokens, logprob_tolerance=float("inf")
        )
        self._version = -1
        self._closed = False
        self.died = False
        self._aborted: dict[str, bool] = {}
        """Running requests; True = to be aborted."""
        self._num_sampled = 0
        self.requests: list[GenerationRequest] = []
        """All that were accepted, in order."""
        self.loaded: list[tuple[int, CachePolicy]] = []
        """Version and cache policy of each swap."""

    @property
    def capabilities(self) -> EngineCapabilities:
        return self._capabilities

    @property
    def policy_version(self) -> int:
        return self._version

    async def generate(self, request: GenerationRequest) -> Completion:
        if self._closed:
            raise EngineClosed("the engine is closed")
        if self._version < 0:
            raise EngineError("the engine serves nothing before it holds weights: call load_weights first")
        limits = self._capabilities
        check_request(request, vocab_size=self._vocab_size, max_model_tokens=limits.max_model_tokens)
        if request.request_id in self._aborted:
            raise UnsupportedRequest(f"request_id {request.request_id!r} is in use by a request that has not ended")
        self._aborted[request.request_id] = False
        self.requests.append(request)
        try:
            return await self._sample(request)
        finally:
            del self._aborted[request.request_id]

    async def _sample(self, request: GenerationRequest) -> Completion:
        arrived_s, spec = self._clock(), request.sampling
        rng = np.random.default_rng(len(self.requests) - 1 if spec.seed is None else spec.seed)
        script = list(self._script(request.prompt_ids, rng))
        room = min(spec.max_tokens, self._capabilities.max_model_tokens - len(request.prompt_ids))
        token_ids: list[int] = []
        versions: list[int] = []
        reason: FinishReason | None = None
        while reason is None:
            await asyncio.sleep(self._token_s)
            if self._closed:
                raise EngineClosed("the engine is closed")
            if self._aborted[request.request_id]:
                reason = "abort"
            elif self._clock() >= arrived_s + request.deadline_s:
                reason = "deadline"
            else:
                token_ids.append(script[len(token_ids)])
                versions.append(self._version)
                self._num_sampled += 1
                if token_ids[-1] in spec.stop_token_ids or len(token_ids) == len(script):
                    reason = "stop"
                elif len(token_ids) == room:
                    reason = "length"
        return Completion(
            token_ids=np.array(token_ids, np.int32),
            logprobs=np.full(len(token_ids), self._logprob, np.float32),
            policy_versions=np.array(versions, np.int32),
            finish_reason=reason,
            decode_s=self._clock() - arrived_s,
        )

    async def abort(self, request_id: str) -> None:
        if request_id in self._aborted:
            self._aborted[request_id] = True

    async def close_session(self, session_id: str) -> None:
        """Nothing is kept between turns."""

    async def load_weights(self, snapshot: Snapshot, *, cache_policy: CachePolicy = "recompute") -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")
        if snapshot.version < 0:
            raise WeightSyncError(f"version {snapshot.version} is not at least 0")
        own = {spec.name: (spec.shape, spec.dtype) for spec in snapshot.manifest}
        snapshot.verify(own if self._expected is None else self._expected)
        self._version = snapshot.version
        self.loaded.append((snapshot.version, cache_policy))

    def stats(self) -> EngineStats:
        return EngineStats(sampled_tokens=self._num_sampled, steps=self._num_sampled, running=len(self._aborted))

    async def close(self) -> None:
        self._closed = True
