"""What runs where vLLM's model lives: in the rollout worker's process, or in processes of its own.

vLLM makes its worker class inherit from `RankExtension` (`worker_extension_cls`), by name, so nothing has to be
pickled but arguments and answers. Both are plain text and bytes: vLLM's messages between processes hold no more.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from policy.sync.snapshot import WeightSyncError, tensor_digest
from policy.sync.weight_broadcast import receive
from policy.sync.weight_offer import OfferedSnapshot
from policy.vllm.owner import watch, watch_announced
from policy.vllm.parameter_map import Shard, load, verify
from policy.vllm.routes import RouteCapture

log = logging.getLogger(__name__)
watch_announced()  # vLLM imports this while it starts, which takes a minute on a busy machine


class RankExtension:
    """Methods of vLLM's worker, called by `LLMEngine.collective_rpc("shoal_...")`. A name of vLLM's own would clash."""

    model_runner: Any
    rank: int
    _shoal_capture: RouteCapture | None = None
    _shoal_received: Mapping[str, np.ndarray] | None = None
    """What `shoal_receive` pulled and `shoal_replace` has not loaded yet."""

    def shoal_prepare(self, max_model_tokens: int, routes: bool, threads: int, owner: str) -> None:
        """Once, before anything is sampled. `owner`: of `policy.vllm.owner`, "" = it is this process."""
        if next(iter(self.model_runner.get_model().parameters())).device.type == "cpu":
            _mend_prefill_of_one_token()
        if routes:
            self._shoal_capture = RouteCapture(self.model_runner, max_model_tokens)
        if owner:
            torch.set_num_threads(threads)
            watch(owner)  # where another engine's start took the variable away

    def shoal_receive(self, offer: Mapping[str, Any], transfer: str) -> str:
        """Pull an offered snapshot with the other ranks; what is wrong, "" if nothing is. The model is not touched.

        `offer`: of `OfferedSnapshot.to_wire`. `transfer`: the same name on every rank.
        """
        self._shoal_received = None
        ranks = self.model_runner.vllm_config.parallel_config.world_size
        device = next(iter(self.model_runner.get_model().parameters())).device
        try:
            snapshot = receive(
                OfferedSnapshot.from_wire(offer), transfer=transfer, rank=self.rank % ranks, ranks=ranks, device=device
            )
        except WeightSyncError as error:
            return str(error)
        self._shoal_received = snapshot.tensors
        return ""

    def shoal_replace(self, source: str | Mapping[str, np.ndarray] | None, digests: Mapping[str, str]) -> str:
        """Load weights in place and compare what the kernels use with them; what is wrong, "" if nothing is.

        `source`: the tensors, or None for those that `shoal_receive` pulled and compared with their digests, or a
        safetensors file with them, of which each is compared with `digests` first.
        """
        try:
            tensors = self._tensors(source)
            if isinstance(source, str):
                _compare(tensors, digests)
            model = self.model_runner.get_model()
            with torch.no_grad():
                load(self.model_runner, tensors)
                verify(model, tensors, Shard.of(model, self.model_runner.vllm_config.parallel_config, self.rank))
        except WeightSyncError as error:
            return str(error)
        except Exception as error:  # vLLM's loader raises what it likes; a model half loaded must not serve
            log.exception("weights could not be loaded")
            return f"vLLM could not load it: {error!r}"
        return ""

    def _tensors(self, source: str | Mapping[str, np.ndarray] | None) -> Mapping[str, np.ndarray]:
        if isinstance(source, str):
            return load_file(source)
        if source is not None:
            return source
        received, self._shoal_received = self._shoal_received, None
        if received is None:
            raise WeightSyncError("nothing was received")
        return received

    def shoal_routes(self, request_ids: Sequence[str]) -> dict[str, tuple[tuple[int, ...], bytes]]:
        """Request id -> (shape, int16 bytes) of `RouteCapture.take`."""
        found = self._shoal_capture.take(request_ids) if self._shoal_capture else {}
        return {name: (array.shape, array.tobytes()) for name, array in found.items()}


def _compare(tensors: Mapping[str, np.ndarray], digests: Mapping[str, str]) -> None:
    if strays := sorted(tensors.keys() ^ digests.keys()):
        raise WeightSyncError(f"tensor {strays[0]!r} is not in both the file and the manifest")
    for name, array in tensors.items():
        if tensor_digest(array) != digests[name]:
            raise WeightSyncError(f"{name!r}, as read from the file, does not match its digest")


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
