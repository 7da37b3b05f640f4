"""The Engine protocol: token ids in, token ids and what is known about each of them out.

An engine knows nothing about messages, tools or rewards. Every engine passes tests/policy/test_engine_contract.py.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from policy.sync.transport import Snapshot

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-3, 1e3
"""Temperatures allowed beside 0; outside, logits in fp32 lose their meaning."""
FinishReason = Literal["stop", "length", "abort", "deadline"]
CachePolicy = Literal["keep", "recompute"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How to sample, fully said on every request: engines have no defaults of their own.

    The logprob of a token is `log_softmax(logits.float() / temperature)[token]`, without top-p or top-k, so that the
    learner can reproduce it. temperature = 0 is greedy; its logprobs are those at temperature 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    """1 = off. Training demands 1 (the learner's distribution is the full one)."""
    top_k: int = 0
    """0 = off."""
    max_tokens: int = 128
    """Most tokens sampled by this request; one more than allowed is never sampled."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling ends after one of these; it is part of the completion."""
    banned_token_ids: tuple[int, ...] = ()
    """Never sampled: their logits are set to -inf before the softmax, in the engine and in the learner alike."""
    seed: int | None = None
    """Seed of this request. The same seed, prompt and weights give the same tokens whatever else is in the batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One turn to sample."""

    request_id: str
    prompt_ids: np.ndarray
    """(L,) int32: everything before the first sampled token, from the start of the conversation."""
    sampling: SamplingSpec
    session_id: str | None = None
    """Requests of one conversation share it: the engine may keep state between them. The prompt is still sent whole,
    and a kept state is used only where it is exactly a prefix of it."""
    deadline_s: float = 60.0
    """Seconds from arrival; past it the request ends with finish_reason "deadline" and what was sampled so far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What one request gave. L = tokens sampled; all arrays have length L."""

    token_ids: np.ndarray
    """(L,) int32."""
    logprobs: np.ndarray
    """(L,) float32: log-softmax in fp32 at the sampling temperature, of the sampled token."""
    policy_versions: np.ndarray
    """(L,) int32: version of the weights that sampled each token."""
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = None
    """(L, M, k) int16, M sparse layers, k experts per token; None for dense models or where not captured. Row j = the
    experts that token j itself took as an input; -1 for the last token, which no step has been fed yet."""
    prompt_routes: np.ndarray | None = None
    """(P, M, k) int16 experts of the P prompt tokens, -1 where a kept state stood for them; None where not captured. An
    engine that computes as the learner does need not tell: the learner then finds the same ones."""
    cached_tokens: int = 0
    """Prompt tokens that needed no prefill."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCapabilities:
    """What an engine can do; asking for more is a typed refusal (`UnsupportedRequest`)."""

    name: str
    max_model_tokens: int
    """Most tokens of a conversation, prompt and completion together."""
    logprob_tolerance: float
    """Largest expected |engine logprob - learner logprob| for the same weights (1e-3 for fp32 on CPU)."""
    per_request_seed: bool = True
    sessions: bool = True
    nucleus: bool = True
    """top_p and top_k, with logprobs of the full distribution."""
    min_temperature: float = MIN_TEMPERATURE
    """Least temperature beside 0."""
    routed_experts: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters since the engine started; differences between two readings give rates."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    steps: int = 0
    running: int = 0
    waiting: int = 0
    sessions: int = 0
    busy_s: float = 0.0
    """Seconds spent in model steps."""


class EngineError(RuntimeError):
    """Base of what an engine raises."""


class UnsupportedRequest(EngineError, ValueError):
    """Raised when a request asks for what the engine lacks, or can never fit (too long, empty, bad token ids)."""


class EngineClosed(EngineError):
    """Raised by requests that were waiting or running when the engine was closed or died."""


class Engine(Protocol):
    """A token generator with versioned weights. All methods are safe to call from one asyncio loop."""

    @property
    def capabilities(self) -> EngineCapabilities: ...

    @property
    def policy_version(self) -> int:
        """Version of the weights that samples now; -1 before the first `load_weights`."""
        ...

    @property
    def died(self) -> bool:
        """It ended by itself, not by `close`: it serves nothing any more, and whoever holds it must be replaced."""
        ...

    async def generate(self, request: GenerationRequest) -> Completion: ...

    async def abort(self, request_id: str) -> None:
        """End one request now: it returns what it has with finish_reason "abort". Unknown ids are ignored."""
        ...

    async def close_session(self, session_id: str) -> None: ...

    async def load_weights(self, snapshot: Snapshot, *, cache_policy: CachePolicy = "recompute") -> None:
        """Verify, then swap between two decode steps; running requests go on under the new weights.

        Raises `WeightSyncError` and keeps serving the old version where anything differs, or an offer cannot be pulled.
        """
        ...

    def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...
