"""Weights inside a vLLM model: how ours become its fused parameters, and proof that they did.

vLLM fuses neighbouring projections, and its CPU build then packs most of them for its kernels and empties the
parameter. A reload that leaves one packed copy stale is silent (vLLM 0.32: a tied head, experts),
so what is checked is what the kernels compute with. vLLM's own names are used only here.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.weight_store import WeightSyncError

FUSED = {
    "in_proj_qkvz.weight": ("in_proj_qkv.weight", "in_proj_z.weight"),
    "in_proj_ba.weight": ("in_proj_b.weight", "in_proj_a.weight"),
    "qkv_proj.weight": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
    "qkv_proj.bias": ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
    "gate_up_proj.weight": ("gate_proj.weight", "up_proj.weight"),
    "experts.routed_experts.w13_weight": ("experts.gate_up_proj",),
    "experts.routed_experts.w2_weight": ("experts.down_proj",),
}
"""End of vLLM's name -> ends of ours whose rows it joins in this order; a name that is not here is ours too."""


def checkpoint_tensors(tensors: Mapping[str, np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """As vLLM's loader takes them: names of a transformers folder, each expert a tensor of its own."""
    for name, array in tensors.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        stem, _, part = name.rpartition(".")
        if not stem.endswith(".experts"):
            yield name, tensor
            continue
        for index, expert in enumerate(tensor):
            if part == "down_proj":
                yield f"{stem}.{index}.down_proj.weight", expert
                continue
            gate, up = expert.chunk(2)
            yield f"{stem}.{index}.gate_proj.weight", gate
            yield f"{stem}.{index}.up_proj.weight", up


def load(model_runner: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Reload the model in place, packed copies included."""
    model_runner.reload_weights(weights_iterator=checkpoint_tensors(tensors))
    model = model_runner.get_model()
    if next(iter(model.parameters())).device.type != "cpu":
        return
    for module in model.modules():  # the two that vLLM's reload leaves stale on a CPU
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            kernel.fused_experts.process_weights_after_loading(module)
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def verify(model: Any, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise `WeightSyncError`, naming ours and vLLM's tensor, unless every one of `tensors` is what the model holds.

    Covers both ways: a parameter of vLLM's that none of ours accounts for is an error too.
    """
    left = set(tensors)
    for name, held, module in _held(model):
        sources = _sources(name)
        if name == "lm_head.weight" and name not in tensors:  # tied
            sources = ["model.embed_tokens.weight"]
        if missing := [source for source in sources if source not in tensors]:
            raise WeightSyncError(f"vLLM's parameter {name!r} comes from {missing[0]!r}, which is not in the snapshot")
        parts = [torch.from_numpy(np.ascontiguousarray(tensors[source])) for source in sources]
        wanted = torch.cat(parts).to(held.dtype)
        if not _equal(held, _as_packed(module, name, wanted, held)):
            raise WeightSyncError(f"after loading, vLLM's parameter {name!r} is not {' + '.join(map(repr, sources))}")
        left -= set(sources)
    if left:
        raise WeightSyncError(f"tensor {min(left)!r} is in no parameter of vLLM's ({len(left)} in all)")


def _sources(name: str) -> list[str]:
    for end, parts in FUSED.items():
        if name.endswith("." + end):
            return [name.removesuffix(end) + part for part in parts]
    return [name]


def _held(model: Any) -> Iterable[tuple[str, Tensor, Any]]:
    """(vLLM's name, what its kernels use, module) of each parameter."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if name == "weight" and hasattr(module, "_cpu_unpacked_conv_weight"):
                yield full, module._cpu_unpacked_conv_weight, module
            elif name == "weight" and hasattr(module, "cpu_linear"):
                yield full, _unpacked(module, parameter), module
                if parameter.numel():  # an embedding: its rows are looked up in the plain copy
                    yield full, parameter.detach(), module
            else:
                yield full, parameter.detach(), module


def _unpacked(module: Any, parameter: Tensor) -> Tensor:
    """The matrix inside a packed product: x @ W.T for x = 1 is exact, for each sum has one term that is not 0."""
    width = parameter.shape[1] if parameter.dim() == 2 and parameter.numel() else _input_size(module)
    return module.cpu_linear(torch.eye(width, dtype=parameter.dtype), parameter, None).T


def _input_size(module: Any) -> int:
    return module.input_size_per_partition if hasattr(module, "input_size_per_partition") else module.input_size


def _as_packed(module: Any, name: str, wanted: Tensor, held: Tensor) -> Tensor:
    """Experts are packed in place by a transform that only goes one way."""
    if wanted.dim() != 3 or held.device.type != "cpu" or name.endswith("conv1d.weight"):
        return wanted
    from vllm._custom_ops import cpu_prepack_moe_weight  # pyright: ignore[reportMissingImports]

    experts = module.quant_method.moe_kernel.fused_experts
    return cpu_prepack_moe_weight(wanted.contiguous(), experts.isa)


def _equal(held: Tensor, wanted: Tensor) -> bool:
    """Rows that only pad a vocabulary do not count."""
    if held.dim() == 2 and wanted.dim() == 2 and len(held) > len(wanted):
        held = held[: len(wanted)]
    return held.numel() == wanted.numel() and torch.equal(held.reshape(wanted.shape), wanted)
