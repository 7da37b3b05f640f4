"""Weights inside a vLLM model: how ours become its fused parameters, and proof that they did.

vLLM fuses neighbouring projections, and its CPU build then packs most of them for its kernels and empties the
parameter. A reload that leaves one packed copy stale is silent (vLLM 0.32: a tied head, experts),
so what is checked is what the kernels compute with. vLLM's own names are used only here.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.sync.snapshot import WeightSyncError

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

SPLIT_ROWS = (
    "in_proj_z.weight",
    "in_proj_b.weight",
    "in_proj_a.weight",
    "A_log",
    "dt_bias",
    "q_proj.weight",
    "q_proj.bias",
    "gate_proj.weight",
    "up_proj.weight",
)
SPLIT_COLUMNS = ("o_proj.weight", "out_proj.weight", "down_proj.weight")
KEYS_VALUES = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")
LINEAR_QKV = ("in_proj_qkv.weight", "conv1d.weight")
VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
VOCABULARY_BLOCK = 64
"""vLLM pads a vocabulary to a multiple of this before it divides it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Which part of each of our tensors one of the tensor-parallel ranks holds; what is not named above it holds whole.

    Example: Shard(rank=1, size=2, linear_keys=128, linear_values=128, kv_heads=2, vocab_size=61)
    .part("x.o_proj.weight", tensor (64, 128)) -> its columns 64 to 127
    """

    rank: int
    size: int
    """Ranks that share the model; 1 = each tensor is held whole."""
    linear_keys: int
    """Rows of the keys of linear attention, all heads; as many of its queries."""
    linear_values: int
    kv_heads: int
    """Of softmax attention; held more than once where there are fewer than ranks."""
    vocab_size: int

    @staticmethod
    def of(model: Any, parallel_config: Any, rank: int) -> "Shard":
        """Of vLLM's model and its process's rank."""
        config = model.config
        return Shard(
            rank=rank % parallel_config.tensor_parallel_size,
            size=parallel_config.tensor_parallel_size,
            linear_keys=config.linear_num_key_heads * config.linear_key_head_dim,
            linear_values=config.linear_num_value_heads * config.linear_value_head_dim,
            kv_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size,
        )

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The rows or columns of our tensor `name` that this rank holds."""

        def named(ends: tuple[str, ...]) -> bool:
            return any(name == end or name.endswith("." + end) for end in ends)

        if self.size == 1:
            return tensor
        if named(VOCABULARY):
            rows = -(-self.vocab_size // VOCABULARY_BLOCK) * VOCABULARY_BLOCK // self.size
            return tensor[rows * self.rank : rows * (self.rank + 1)]
        if named(LINEAR_QKV):
            return self._cut(tensor, 0, [self.linear_keys, self.linear_keys, self.linear_values])
        if named(KEYS_VALUES):
            pieces = min(self.size, self.kv_heads)
            return tensor.chunk(pieces)[self.rank * pieces // self.size]
        if named(("experts.gate_up_proj",)):
            return self._cut(tensor, 1, [tensor.shape[1] // 2] * 2)
        if named(("experts.down_proj",)):
            return self._cut(tensor, 2, [tensor.shape[2]])
        if named(SPLIT_ROWS):
            return self._cut(tensor, 0, [len(tensor)])
        if named(SPLIT_COLUMNS):
            return self._cut(tensor, 1, [tensor.shape[1]])
        return tensor

    def _cut(self, tensor: Tensor, dim: int, sections: list[int]) -> Tensor:
        """This rank's share of each section, joined."""
        return torch.cat([section.chunk(self.size, dim)[self.rank] for section in tensor.split(sections, dim)], dim)


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


def verify(model: Any, tensors: Mapping[str, np.ndarray], shard: Shard) -> None:
    """Raise `WeightSyncError`, naming ours and vLLM's tensor, unless every one of `tensors` is what the model holds of
    it as `shard`.

    Covers both ways: a parameter of vLLM's that none of ours accounts for is an error too.
    """
    left = set(tensors)
    for name, held, module in _held(model):
        sources = _sources(name)
        if name == "lm_head.weight" and name not in tensors:  # tied
            sources = ["model.embed_tokens.weight"]
        if missing := [source for source in sources if source not in tensors]:
            raise WeightSyncError(f"vLLM's parameter {name!r} comes from {missing[0]!r}, which is not in the snapshot")
        parts = [shard.part(source, torch.from_numpy(np.ascontiguousarray(tensors[source]))) for source in sources]
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
