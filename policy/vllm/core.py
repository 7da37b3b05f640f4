"""vLLM's LLMEngine as its stepper uses it, in this process or with its core in one of its own: only this file knows.

A core of its own steps by itself while it has requests. Its tokens, answers to calls and the news of its end reach
this process through one queue, in the order in which it sent them: when it has said that it is paused, all that it
sampled before is in `outputs_queue`.

- `step` waits for tokens, at most `WAIT_S`, so that deadlines and aborts are seen to while a core is busy or stuck;
- other calls wait for their answer, or for the end of the core's process;
- a core that hangs is ended after `HANG_S` of silence, in a call or with requests out, so that its worker is replaced.
"""

import contextlib
import json
import multiprocessing.connection
import os
import secrets
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from conf.schema import EngineConfig
from policy.engine.protocol import EngineError, Snapshot
from policy.model.hybrid_config import HybridConfig
from policy.sync.snapshot import WeightSyncError
from policy.sync.weight_files import in_order
from policy.sync.weight_offer import OfferedSnapshot
from policy.vllm.owner import announced, owner
from policy.vllm.packages import prepare, vllm_build

WAIT_S = 0.5
HANG_S = 100.0
"""Silence after which a core counts as stuck; less than a swap may take (`policy.engine.step_engine`)."""
ABOUT_ROUTES = ("AuxOutput", "routed-experts", "Model Runner V2")
"""What vLLM's refusals name where it is the routes that cannot be had."""


class VllmCore:
    """Example: core = VllmCore(model, config); core.start(routes=False); core.replace(snapshot); core.add(...)

    A core of its own that says nothing for `hang_s`, although it was called or has requests, is ended: `EngineError`.
    """

    def __init__(self, model: HybridConfig, config: EngineConfig, *, hang_s: float = HANG_S) -> None:
        self._model = model
        self._config = config
        self._own_process = config.vllm.process == "core"
        self._shares_memory = not self._own_process and config.vllm.tensor_parallel == 1
        """The model lies in this process."""
        self._captures = False
        """Routes come from our hooks."""
        self._engine: Any = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._hang_s = hang_s
        self._silent_s = 0.0
        """How long `step` has waited since the core last said anything."""
        self._why_dead = "the process of vLLM's core ended"

    def start(self, *, routes: bool) -> None:
        """Raises `VllmMissing`, or whatever vLLM raises."""
        self._captures = routes and vllm_build() == "cpu"
        prepare()
        # vLLM reads it too, and would move the core or start one more process between it and the model
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore[reportMissingImports]

        self._folder = tempfile.TemporaryDirectory(prefix="shoal-vllm-")
        Path(self._folder.name, "config.json").write_text(json.dumps(self._model.to_hf()))
        returns_routes = routes and not self._captures
        arguments = EngineArgs(**self._arguments(self._folder.name, returns_routes=returns_routes))
        try:
            with contextlib.nullcontext() if self._shares_memory else announced():
                self._engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=self._own_process)
        except ValueError as error:
            if not (returns_routes and any(word in str(error) for word in ABOUT_ROUTES)):
                raise
            hint = "; if it is the routes that cannot be had here, engine.vllm.routes=false does without"
            raise EngineError(f"{error}{hint}") from error
        if self._own_process:
            threading.Thread(target=self._tell_of_death, daemon=True).start()
        with self._bounded():
            self._engine.get_supported_tasks()  # else the first request would ask, and wait without a bound
        owned_by = "" if self._shares_memory else owner()
        self._call("shoal_prepare", self._config.max_model_tokens, self._captures, self._config.threads, owned_by)

    def _arguments(self, folder: str, *, returns_routes: bool) -> dict[str, Any]:
        own = self._config.vllm
        arguments: dict[str, Any] = {
            "model": folder,
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
            "distributed_executor_backend": "mp" if own.tensor_parallel > 1 else None,  # not Ray, though it runs
            "enable_prefix_caching": own.prefix_cache or returns_routes,  # vLLM returns none without it
            "enable_return_routed_experts": returns_routes,
            "async_scheduling": False,  # a step returns its own tokens, so they are of the weights that serve now
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "policy.vllm.rank_extension.RankExtension",
        }
        return arguments | own.extra

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        """An answer of each rank."""
        with self._bounded():
            return self._engine.collective_rpc(method, timeout=self._hang_s, args=arguments)

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """A call of a core of its own, which is ended where it does not answer: vLLM's client would wait for ever."""
        timer = threading.Timer(self._hang_s, self._end_stuck)
        timer.daemon = True
        if self._own_process:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end_stuck(self) -> None:
        self._why_dead = f"vLLM's core said nothing for {self._hang_s:g} s and was ended"
        for process in self._engine.engine_core.resources.engine_manager.processes:
            process.kill()

    def _tell_of_death(self) -> None:
        """Wake whoever waits for a core whose process is gone: vLLM's own client notices, and leaves them waiting."""
        client = self._engine.engine_core
        multiprocessing.connection.wait([process.sentinel for process in client.resources.engine_manager.processes])
        client.resources.engine_dead = True  # later calls are refused by vLLM itself
        error = EngineError(self._why_dead)
        client.outputs_queue.put_nowait(error)
        for answer in list(client.utility_results.values()):
            with contextlib.suppress(Exception):  # it was answered just now
                answer.set_exception(error)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()
        if self._folder is not None:
            self._folder.cleanup()

    # --- requests ---

    def add(self, request_id: str, prompt_ids: list[int], params: Any, *, cache_salt: str) -> None:
        """`cache_salt`: only requests of the same one share blocks of the prefix cache."""
        self._engine.add_request(request_id, {"prompt_token_ids": prompt_ids, "cache_salt": cache_salt}, params)

    def abort(self, request_id: str) -> np.ndarray | None:
        """The routes that vLLM itself has returned so far (n, M, k); None where it returned none."""
        processor = self._engine.output_processor
        states = [processor.request_states[name] for name in processor.external_req_ids.get(request_id, ())]
        chunks = [chunk for state in states for chunk in state.routed_experts_chunks]
        self._engine.abort_request([request_id])
        return np.concatenate(chunks) if chunks else None

    def step(self) -> list[Any]:
        """vLLM's outputs since the last time; none where a core of its own has none within `WAIT_S`.

        Call it while there are requests: silence counts.
        """
        if not self._own_process:
            return self._engine.step()
        queue = self._engine.engine_core.outputs_queue
        with queue.not_empty:
            heard = queue.not_empty.wait_for(queue._qsize, WAIT_S)
        self._silent_s = 0.0 if heard else self._silent_s + WAIT_S
        if self._silent_s >= self._hang_s:
            self._end_stuck()
            raise EngineError(self._why_dead)
        return self._outputs()

    def _outputs(self) -> list[Any]:
        found: list[Any] = []
        while self._own_process and not self._engine.engine_core.outputs_queue.empty():
            found += self._engine.step()
        return found

    def routes(self, request_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Request id -> (most tokens of a conversation, M, k) int16, of requests that have ended; {} where outputs
        bring them along."""
        if not (self._captures and request_ids):
            return {}
        found = self._call("shoal_routes", list(request_ids))[0]
        return {name: np.frombuffer(content, np.int16).reshape(shape) for name, (shape, content) in found.items()}

    # --- weights ---

    def pause(self) -> list[Any]:
        """Sample nothing until `resume`; what was sampled before."""
        if self._own_process:
            with self._bounded():
                self._engine.engine_core.call_utility("pause_scheduler", "keep", False)
        return self._outputs()

    def resume(self) -> None:
        if self._own_process:
            with self._bounded():
                self._engine.engine_core.call_utility("resume_scheduler")

    def receive(self, snapshot: Snapshot) -> None:
        """Have every rank pull what is only offered, for `replace`; what serves is not touched.

        Raises `WeightSyncError` where one of them could not. What the others pulled stays until the next offer.
        """
        if isinstance(snapshot, OfferedSnapshot):
            _raise_first(self._call("shoal_receive", snapshot.to_wire(), secrets.token_hex(8)))

    def replace(self, snapshot: Snapshot) -> None:
        """Other weights, compared with what the kernels use afterwards. Raises `WeightSyncError`."""
        digests = {spec.name: spec.digest for spec in snapshot.manifest}
        if isinstance(snapshot, OfferedSnapshot):
            answers = self._call("shoal_replace", None, digests)
        elif self._shares_memory:
            answers = self._call("shoal_replace", dict(snapshot.tensors), digests)
        elif os.path.exists(snapshot.path):
            answers = self._call("shoal_replace", snapshot.path, digests)
        else:
            with memory_file(snapshot.tensors) as path:
                answers = self._call("shoal_replace", path, digests)
        _raise_first([answer and f"version {snapshot.version}: {answer}" for answer in answers])

    def recompute(self) -> None:
        """Compute running requests again from their first token. Raises `EngineError` where states are left over."""
        with self._bounded():
            clean = self._engine.reset_prefix_cache(reset_running_requests=True)
        if not clean:
            raise EngineError("vLLM kept states of the old weights")


def _raise_first(answers: Sequence[str]) -> None:
    if wrong := [answer for answer in answers if answer]:
        raise WeightSyncError(wrong[0])


@contextlib.contextmanager
def memory_file(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Path of a safetensors file in memory that other processes of this user can map; gone with this process."""
    descriptor = os.memfd_create("shoal-weights")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(save(in_order(tensors)))
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
