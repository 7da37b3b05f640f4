"""vLLM's LLMEngine, one step at a time: the `Stepper` of the vLLM engine. vLLM is imported when it starts.

Invariants
- Weights change only between two steps, and a step returns the tokens it sampled: the version that holds at the end of
  a step made them.
- Nothing is left to vLLM's defaults: every request says its whole sampling, the model folder has no generation config.
- What the kernels compute with after a swap is compared with the snapshot; on a mismatch the old weights come back.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.schema import EngineConfig
from policy.engine import CachePolicy, Completion, EngineError, EngineStats, FinishReason
from policy.hybrid_config import HybridConfig
from policy.model import PolicyShape
from policy.running_batch import Ticket
from policy.vllm_packages import prepare, vllm_build
from policy.vllm_routes import RouteCapture
from policy.vllm_weights import load, verify
from policy.weight_store import PolicySnapshot, WeightSyncError


@dataclass(kw_only=True, slots=True)
class _Request:
    """What a request has so far."""

    ticket: Ticket
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    routes: np.ndarray | None = None
    """(most tokens, M, k) int16 experts of each token as an input, -1 until it is fed."""


class VllmStepper:
    """Example: stepper.start(); stepper.swap(snapshot, "recompute"); stepper.add(ticket); stepper.step()"""

    def __init__(self, model: HybridConfig, config: EngineConfig, *, clock: Callable[[], float]) -> None:
        self._model = model
        self._config = config
        self._clock = clock
        self._engine: Any = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._capture: RouteCapture | None = None
        self._served: Mapping[str, np.ndarray] | None = None
        """Tensors of the version that serves."""
        self._requests: dict[str, _Request] = {}
        self._allowed: dict[tuple[int, ...], list[int] | None] = {(): None}
        """Banned ids -> all others."""
        self.policy_version = -1
        self.finished: list[tuple[Ticket, Completion | EngineError]] = []
        self._sampled = self._prefilled = self._cached = self._steps = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def stats(self) -> EngineStats:
        running = sum(request.ticket.prefilled_s > 0 for request in list(self._requests.values()))
        return EngineStats(
            sampled_tokens=self._sampled,
            prefilled_tokens=self._prefilled,
            cached_tokens=self._cached,
            steps=self._steps,
            running=running,
            waiting=len(self._requests) - running,
            busy_s=self._busy_s,
        )

    def start(self) -> None:
        """Import vLLM and build its engine with random weights: seconds, and minutes on a loaded machine.

        Raises `VllmMissing`, or whatever vLLM raises.
        """
        prepare()
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        if vllm_build() == "cpu":
            _mend_prefill_of_one_token()
        own = self._config.vllm
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-vllm-")
        Path(self._folder.name, "config.json").write_text(json.dumps(self._model.to_hf()))
        speculative = {"method": "mtp", "num_speculative_tokens": own.speculative_tokens}
        arguments: dict[str, Any] = {
            "model": self._folder.name,
            "load_format": "dummy",  # shapes come from the folder, weights from the learner
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": own.dtype,
            "enforce_eager": own.enforce_eager,
            "max_model_len": self._config.max_model_tokens,
            "max_num_seqs": self._config.max_running,
            "kv_cache_memory_bytes": own.kv_cache_mib << 20,
            "kv_cache_dtype": own.kv_cache_dtype,
            "tensor_parallel_size": own.tensor_parallel,
            "enable_prefix_caching": own.prefix_cache,
            "speculative_config": speculative if own.speculative_tokens else None,
            "async_scheduling": False,  # a step returns its own tokens, so they are of the weights that serve now
            "logprobs_mode": "processed_logprobs",
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**(arguments | own.extra)))
        if self.captures_routes(self._model, self._config):
            (self._capture,) = self._engine.collective_rpc(lambda worker: RouteCapture(worker.model_runner))

    @staticmethod
    def captures_routes(model: PolicyShape, config: EngineConfig) -> bool:
        """The hooks see eager calls alone."""
        own = config.vllm
        return model.num_experts > 0 and own.routes and own.enforce_eager and vllm_build() == "cpu"

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()
        if self._folder is not None:
            self._folder.cleanup()

    # --- commands, between two steps ---

    def add(self, ticket: Ticket) -> None:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        spec, request_id = ticket.request.sampling, ticket.request.request_id
        self._requests[request_id] = _Request(ticket=ticket)
        params = SamplingParams(
            temperature=spec.temperature,
            max_tokens=min(spec.max_tokens, self._config.max_model_tokens - len(ticket.prompt_ids)),
            stop_token_ids=list(spec.stop_token_ids),
            allowed_token_ids=self._allowed_ids(spec.banned_token_ids),
            ignore_eos=True,  # the request names all that stop it
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(request_id, {"prompt_token_ids": ticket.prompt_ids.tolist()}, params)

    def _allowed_ids(self, banned: tuple[int, ...]) -> list[int] | None:
        if banned not in self._allowed:
            self._allowed[banned] = sorted(set(range(self._model.vocab_size)) - set(banned))
        return self._allowed[banned]

    def abort(self, request_id: str) -> None:
        if request := self._requests.get(request_id):
            self._engine.abort_request([request_id])
            self._end(request, "abort")

    def close_session(self, session_id: str) -> None:
        """There are none."""

    def swap(self, snapshot: PolicySnapshot, cache_policy: CachePolicy) -> None:
        try:
            self._load(snapshot.tensors)
        except Exception as error:  # vLLM's loader raises what it likes; a model half loaded must not serve
            if self._served is not None:
                self._restore(self._served)
            if isinstance(error, WeightSyncError):
                raise
            raise WeightSyncError(f"version {snapshot.version}: vLLM could not load it: {error!r}") from error
        self._served = dict(snapshot.tensors)
        self.policy_version = snapshot.version
        if cache_policy == "recompute":
            self._engine.reset_prefix_cache(reset_running_requests=True)

    def _restore(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The old weights again. Raises `EngineError`, which ends the engine, where even they are not what it holds."""
        try:
            self._load(tensors)
        except WeightSyncError as error:
            raise EngineError(f"vLLM cannot go back to policy version {self.policy_version}: {error}") from error

    def _load(self, tensors: Mapping[str, np.ndarray]) -> None:
        def replace(worker: Any) -> None:
            load(worker.model_runner, tensors)
            verify(worker.model_runner.get_model(), tensors)

        self._engine.collective_rpc(replace)

    # --- one step ---

    def step(self) -> None:
        now = self._clock()
        for request in [each for each in self._requests.values() if each.ticket.deadline_s <= now]:
            self._engine.abort_request([request.ticket.request.request_id])
            self._end(request, "deadline")
        if self._requests:
            outputs = self._engine.step()
            self._keep_routes()
            for output in outputs:
                if request := self._requests.get(output.request_id):
                    self._take(request, output, now)
        self._steps += 1
        self._busy_s += self._clock() - now

    def _keep_routes(self) -> None:
        """A token keeps the experts of the first time it was fed: when its state is computed again under other weights,
        what was sampled after it then stays as it was."""
        for request_id, (first, rows) in (self._capture.take() if self._capture else {}).items():
            if (request := self._requests.get(request_id)) is None:
                continue
            if request.routes is None:
                request.routes = np.full((self._config.max_model_tokens, *rows.shape[1:]), -1, np.int16)
            kept = request.routes[first : first + len(rows)]
            unknown = (kept < 0).all((1, 2))
            kept[unknown] = rows[unknown]

    def _take(self, request: _Request, output: Any, step_began_s: float) -> None:
        ticket, sampled = request.ticket, output.outputs[0]
        if ticket.prefilled_s == 0.0:
            ticket.admitted_s, ticket.prefilled_s = step_began_s, self._clock()
            ticket.cached_tokens = output.num_cached_tokens or 0
            self._cached += ticket.cached_tokens
            self._prefilled += len(ticket.prompt_ids) - ticket.cached_tokens
        logprobs = [rows[token].logprob for token, rows in zip(sampled.token_ids, sampled.logprobs or (), strict=True)]
        request.token_ids += sampled.token_ids
        request.logprobs += logprobs
        request.versions += [self.policy_version] * len(logprobs)
        self._sampled += len(logprobs)
        if not np.isfinite(logprobs).all():
            if not output.finished:
                self._engine.abort_request([ticket.request.request_id])
            self._end(request, None)
        elif output.finished:
            self._end(request, "stop" if sampled.finish_reason == "stop" else "length")

    def _end(self, request: _Request, reason: FinishReason | None) -> None:
        """Answer a request; None = its logits were not finite."""
        ticket, now = request.ticket, self._clock()
        request_id = ticket.request.request_id
        del self._requests[request_id]
        if reason is None:
            message = f"{request_id}: logits of policy version {self.policy_version} are not finite"
            self.finished.append((ticket, EngineError(message)))
        elif not request.token_ids:
            self.finished.append((ticket, ticket.unstarted(reason, now)))
        else:
            asked, total = len(ticket.prompt_ids), len(ticket.prompt_ids) + len(request.token_ids)
            routes = request.routes
            completion = Completion(
                token_ids=np.array(request.token_ids, np.int32),
                logprobs=np.array(request.logprobs, np.float32),
                policy_versions=np.array(request.versions, np.int32),
                finish_reason=reason,
                routed_experts=None if routes is None else routes[asked:total].copy(),
                prompt_routes=None if routes is None else routes[:asked].copy(),
                cached_tokens=ticket.cached_tokens,
                queue_s=ticket.admitted_s - ticket.arrived_s,
                prefill_s=ticket.prefilled_s - ticket.admitted_s,
                decode_s=now - ticket.prefilled_s,
            )
            self.finished.append((ticket, completion))


def _mend_prefill_of_one_token() -> None:
    """vLLM 0.32's CPU convolution asks for a transposed input, and tells it by a stride that says nothing when all that
    is prefilled in a step is one token: the engine dies. The same numbers with the stride it expects are all it needs.
    """
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention  # pyright: ignore[reportMissingImports]

    inner = gdn_attention._causal_conv1d_fwd_cpu
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def transposed(*, x: torch.Tensor, **others: Any) -> torch.Tensor:
        return inner(x=x.as_strided(x.shape, (1, x.shape[0])) if x.shape[1] == 1 else x, **others)

    gdn_attention._causal_conv1d_fwd_cpu = transposed
