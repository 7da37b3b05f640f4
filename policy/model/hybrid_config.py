"""Shape of a hybrid model: the fields, names and defaults that matter of transformers' Qwen3.5 text configs."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

LINEAR, FULL = "linear_attention", "full_attention"
DENSE_TYPE, MOE_TYPE = "qwen3_5_text", "qwen3_5_moe_text"
COMPOSITE_TYPES = ("qwen3_5", "qwen3_5_moe")
"""Vision-language configs whose "text_config" is one of ours."""
MODEL_TYPES = (DENSE_TYPE, MOE_TYPE, *COMPOSITE_TYPES)


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """Field names are those of Qwen3_5TextConfig and Qwen3_5MoeTextConfig.

    Example: HybridConfig(vocab_size=272, hidden_size=96, ...).layer_types -> ("linear_attention",) * 3 +
    ("full_attention",).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    intermediate_size: int = 0
    """Width of the dense MLP; unused with experts."""
    linear_conv_kernel_dim: int = 4
    layer_types: tuple[str, ...] = ()
    """"linear_attention" or "full_attention" of each layer; empty = every fourth layer is full attention."""
    num_experts: int = 0
    """0 = dense MLP in every layer."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    rope_theta: float = 10_000.0
    """With `partial_rotary_factor`, what transformers keeps in `rope_parameters`."""
    partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 32768
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        kinds = tuple(self.layer_types) or tuple(
            FULL if (i + 1) % 4 == 0 else LINEAR for i in range(self.num_hidden_layers)
        )
        object.__setattr__(self, "layer_types", kinds)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {LINEAR, FULL}:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers {LINEAR!r} or {FULL!r}: {kinds}")
        for many, few in (
            ("num_attention_heads", "num_key_value_heads"),
            ("linear_num_value_heads", "linear_num_key_heads"),
        ):
            if getattr(self, few) < 1 or getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many}={getattr(self, many)} is no multiple of {few}={getattr(self, few)}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(f"head_dim * partial_rotary_factor = {self.rotary_dim} must be even and at least 2")
        if self.linear_conv_kernel_dim < 2:
            raise ValueError(f"linear_conv_kernel_dim={self.linear_conv_kernel_dim} must be at least 2")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok}, allowed: 1 to {self.num_experts=}")

    @property
    def rotary_dim(self) -> int:
        """Rotated dims of each attention head."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_sparse_layers(self) -> int:
        """M of `routed_experts`: every layer is sparse, or none."""
        return self.num_hidden_layers if self.num_experts else 0

    def override(self, values: Mapping[str, Any]) -> "HybridConfig":
        """A copy with some fields changed. Raises ValueError for a name that is no field, with the nearest one."""
        names = [field.name for field in fields(self)]
        for key in values:
            if key not in names:
                near = difflib.get_close_matches(key, names, n=1, cutoff=0)
                raise ValueError(f"policy override {key!r} is no field of HybridConfig; nearest: {near[0]!r}")
        values = dict(values)
        if "num_hidden_layers" in values:
            values.setdefault("layer_types", ())
        return replace(self, **values)

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> "HybridConfig":
        """From the contents of a transformers config.json, also of a vision-language model (its text part).

        Raises ValueError where the file asks for what this model does not compute.
        """
        if config.get("model_type") in COMPOSITE_TYPES:
            return HybridConfig.from_hf(config["text_config"])
        if config.get("model_type") not in (DENSE_TYPE, MOE_TYPE):
            raise ValueError(f"model_type {config.get('model_type')!r}, allowed: {', '.join(MODEL_TYPES)}")
        rope = config.get("rope_parameters") or {}
        only = {"hidden_act": "silu", "attention_dropout": 0.0, "attn_output_gate": True}
        for key, value in only.items():
            if config.get(key, value) != value:
                raise ValueError(f"{key}={config[key]!r} is not supported, only {value!r}")
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={rope['rope_type']!r} is not supported, only 'default'")
        known = {field.name for field in fields(HybridConfig)}
        values = {key: value for key, value in config.items() if key in known and value is not None}
        values |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if config["model_type"] == DENSE_TYPE:
            values["num_experts"] = 0
        return HybridConfig(**values)

    def to_hf(self) -> dict[str, Any]:
        """Contents of a config.json that transformers loads as Qwen3_5ForCausalLM or Qwen3_5MoeForCausalLM."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rope = {key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
        moe_only = {key: values.pop(key) for key in list(values) if "expert" in key or key.startswith("moe_")}
        if self.num_experts:
            values |= moe_only
            values.pop("intermediate_size")
        eos = self.eos_token_id
        return values | {
            "model_type": MOE_TYPE if self.num_experts else DENSE_TYPE,
            "architectures": ["Qwen3_5MoeForCausalLM" if self.num_experts else "Qwen3_5ForCausalLM"],
            "layer_types": list(self.layer_types),
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "rope_parameters": {"rope_type": "default", **rope},
            "hidden_act": "silu",
            "dtype": "float32",
        }


_TINY = HybridConfig(
    vocab_size=272,
    hidden_size=96,
    intermediate_size=208,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    tie_word_embeddings=True,
    max_position_embeddings=4096,
)

PRESETS: dict[str, HybridConfig] = {
    "tiny_hybrid": _TINY,
    "tiny_moe": _TINY.override(
        {
            "intermediate_size": 0,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 80,
        }
    ),
}
"""Vocabulary: 256 bytes and 16 special tokens. tiny_moe computes as many parameters per token as tiny_hybrid."""
