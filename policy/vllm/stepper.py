"""vLLM's LLMEngine, one step at a time: the `Stepper` of the vLLM engine. vLLM is imported when it starts.

Invariants
- Weights change only between two steps, after all tokens sampled before have been taken: the version that holds when a
  token is taken made it.
- Nothing is left to vLLM's defaults: every request says its whole sampling, the model folder has no generation config.
- What the kernels compute with after a swap is compared with the snapshot; on a mismatch the old weights come back.
- A request that has sampled nothing yet shares no state with those that older weights made, whatever a swap keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.schema import EngineConfig
from policy.engine.protocol import CachePolicy, Completion, EngineError, EngineStats, FinishReason, Snapshot
from policy.engine.running_batch import Ticket
from policy.model.hybrid_config import HybridConfig
from policy.model.model import PolicyShape
from policy.sync.snapshot import WeightSyncError
from policy.vllm.core import HANG_S, VllmCore
from policy.vllm.packages import vllm_build
from policy.vllm.routes import returned_routes


@dataclass(kw_only=True, slots=True)
class _Request:
    """What a request has so far."""

    ticket: Ticket
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    """Why it ended; None where it failed."""
    failure: str = ""
    routes: np.ndarray | None = None
    """vLLM's own."""


class VllmStepper:
    """Example: stepper.start(); stepper.swap(snapshot, "recompute"); stepper.add(ticket); stepper.step()"""

    def __init__(
        self, model: HybridConfig, config: EngineConfig, *, clock: Callable[[], float], hang_s: float = HANG_S
    ) -> None:
        self._model = model
        self._config = config
        self._clock = clock
        self._records_routes = self.captures_routes(model, config)
        self._core = VllmCore(model, config, hang_s=hang_s)
        self._served: Snapshot | None = None
        """The version that serves."""
        self._requests: dict[str, _Request] = {}
        self._allowed: dict[tuple[int, ...], list[int] | None] = {(): None}
        """Banned ids -> all others."""
        self._ended: list[_Request] = []
        """Not answered yet."""
        self._swaps_kept = 0
        """Swaps that left states of older weights in vLLM's prefix cache."""
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
        self._core.start(routes=self._records_routes)

    @staticmethod
    def captures_routes(model: PolicyShape, config: EngineConfig) -> bool:
        """vLLM's own on GPUs; the hooks of its CPU build see eager calls alone."""
        own = config.vllm
        return model.num_experts > 0 and own.routes and (own.enforce_eager or vllm_build() == "gpu")

    def close(self) -> None:
        self._core.close()

    # --- commands, between two steps ---

    def add(self, ticket: Ticket) -> None:
        self._requests[ticket.request.request_id] = _Request(ticket=ticket)
        self._submit(ticket)

    def _submit(self, ticket: Ticket) -> None:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        spec = ticket.request.sampling
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
        salt = str(self._swaps_kept)
        self._core.add(ticket.request.request_id, ticket.prompt_ids.tolist(), params, cache_salt=salt)

    def _allowed_ids(self, banned: tuple[int, ...]) -> list[int] | None:
        if banned not in self._allowed:
            self._allowed[banned] = sorted(set(range(self._model.vocab_size)) - set(banned))
        return self._allowed[banned]

    def abort(self, request_id: str) -> None:
        if request := self._requests.get(request_id):
            self._cut_off(request, "abort")
            self._answer()

    def close_session(self, session_id: str) -> None:
        """There are none."""

    def swap(self, snapshot: Snapshot, cache_policy: CachePolicy) -> None:
        self._core.receive(snapshot)  # what does not arrive has changed nothing, and nothing needs to be restored
        self._take(self._core.pause())  # sampled by the weights that still serve
        self._answer()
        try:
            self._core.replace(snapshot)
            if cache_policy == "recompute":
                self._core.recompute()  # before anything is sampled from states of the old weights
            else:
                self._part_from_kept_states()
        except WeightSyncError:
            if self._served is not None:
                self._restore(self._served)
            self._core.resume()
            raise
        self._core.resume()
        self._served = snapshot
        self.policy_version = snapshot.version

    def _part_from_kept_states(self) -> None:
        """Requests that run go on from their states; what has not sampled yet must find none of them in the cache.

        vLLM's reset refuses while requests hold blocks, so their hashes part by a salt. Those that wait have the old
        one, and are submitted again in their order.
        """
        self._swaps_kept += 1
        waiting = [request.ticket for request in self._requests.values() if not request.token_ids]
        for ticket in waiting:
            self._core.abort(ticket.request.request_id)
        self._core.routes([ticket.request.request_id for ticket in waiting])  # forgotten: fed to the old weights
        for ticket in waiting:
            self._submit(ticket)

    def _restore(self, snapshot: Snapshot) -> None:
        """The old weights again. Raises `EngineError`, which ends the engine, where even they are not what it holds."""
        try:
            self._core.receive(snapshot)
            self._core.replace(snapshot)
        except WeightSyncError as error:
            raise EngineError(f"vLLM cannot go back to policy version {self.policy_version}: {error}") from error

    # --- one step ---

    def step(self) -> None:
        now = self._clock()
        for request in [each for each in self._requests.values() if each.ticket.deadline_s <= now]:
            self._cut_off(request, "deadline")
        if self._requests:
            self._take(self._core.step(), now)
        self._answer()
        self._steps += 1
        self._busy_s += self._clock() - now

    def _take(self, outputs: Sequence[Any], step_began_s: float | None = None) -> None:
        for output in outputs:
            if request := self._requests.get(output.request_id):
                self._append(request, output, self._clock() if step_began_s is None else step_began_s)

    def _append(self, request: _Request, output: Any, step_began_s: float) -> None:
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
            failure = f"logits of policy version {self.policy_version} are not finite"
            if output.finished:
                self._end(request, None, failure)
            else:
                self._cut_off(request, None, failure)
        elif output.finished:
            request.routes = sampled.routed_experts
            known: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
            self._end(request, known.get(sampled.finish_reason), f"vLLM ended it with {sampled.finish_reason!r}")

    def _cut_off(self, request: _Request, reason: FinishReason | None, failure: str = "") -> None:
        """End a request that vLLM has not ended; it gives no last output, so the routes are taken from what it has."""
        request.routes = self._core.abort(request.ticket.request.request_id)
        self._end(request, reason, failure)

    def _end(self, request: _Request, reason: FinishReason | None, failure: str = "") -> None:
        request.reason, request.failure = reason, failure
        del self._requests[request.ticket.request.request_id]
        self._ended.append(request)

    def _answer(self) -> None:
        """Answer what has ended; its routes are fetched together, for each fetch may wait for a step."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        hooked = self._core.routes([request.ticket.request.request_id for request in ended])
        now = self._clock()
        for request in ended:
            ticket, reason = request.ticket, request.reason
            outcome: Completion | EngineError
            if reason is None:
                outcome = EngineError(f"{ticket.request.request_id}: {request.failure}")
            elif not request.token_ids:
                outcome = ticket.unstarted(reason, now)
            else:
                outcome = _completion(request, reason, self._routes(request, hooked), now)
            self.finished.append((ticket, outcome))

    def _routes(self, request: _Request, hooked: Mapping[str, np.ndarray]) -> np.ndarray | None:
        """(tokens of the conversation or more, M, k); None where none are recorded."""
        if not self._records_routes:
            return None
        ticket = request.ticket
        found = hooked.get(ticket.request.request_id)
        if found is None:
            tokens = len(ticket.prompt_ids) + len(request.token_ids)
            shape = (tokens, self._model.num_sparse_layers, self._model.num_experts_per_tok)
            found = returned_routes(request.routes, shape)
        return found


def _completion(request: _Request, reason: FinishReason, routes: np.ndarray | None, now_s: float) -> Completion:
    """`routes` (tokens of the conversation or more, M, k)."""
    ticket = request.ticket
    asked, total = len(ticket.prompt_ids), len(ticket.prompt_ids) + len(request.token_ids)
    return Completion(
        token_ids=np.array(request.token_ids, np.int32),
        logprobs=np.array(request.logprobs, np.float32),
        policy_versions=np.array(request.versions, np.int32),
        finish_reason=reason,
        routed_experts=None if routes is None else routes[asked:total].copy(),
        prompt_routes=None if routes is None else routes[:asked].copy(),
        cached_tokens=ticket.cached_tokens,
        queue_s=ticket.admitted_s - ticket.arrived_s,
        prefill_s=ticket.prefilled_s - ticket.admitted_s,
        decode_s=now_s - ticket.prefilled_s,
    )
