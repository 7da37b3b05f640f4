"""Gated full attention with grouped key-value heads and partial rotary positions.

Letters: T tokens of the packed pass, H query heads, G key-value heads, D head dim, R rotated dims, P most tokens of a
slot, B slots that decode together, n sequences of a bucket.

    o_t = sigmoid(gate_t) * softmax(rope(norm(q_t)) . rope(norm(k_<=t)) / sqrt(D)) v_<=t
Rotary positions: arXiv 2104.09864. Weights and arithmetic are those of transformers' Qwen3_5Attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.model.hybrid_config import HybridConfig
from policy.model.norm import RmsNorm
from policy.model.packing import Bucket, Packing, place_rows, spread_rows, take_rows


def rotary_tables(positions: Tensor, rotated: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (n, 1, R / 2) of position / theta^(2i/R) for positions (n,); computed in fp32."""
    frequencies = theta ** -(torch.arange(0, rotated, 2, dtype=torch.float32, device=positions.device) / rotated)
    angles = positions.float()[:, None, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + R/2}) of the first R dims of x (..., D); cos and sin broadcast to (..., R / 2)."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionState:
    """Keys (rotated) and values of one layer."""

    keys: Tensor
    """(slots, G, P, D)."""
    values: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionDecodeWeights:
    """One layer's weights, merged for single-token steps."""

    inputs: Tensor
    """(hidden, 2HD + 2GD): all queries, keys, values, gates; the gain of the norm before is folded in."""
    bias: Tensor | None
    norm: Tensor
    """(H + G, D) gains of the query heads, with the 1/sqrt(D) of the scores, and of the key heads."""
    output: Tensor
    output_bias: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionStep:
    """What all attention layers of one decode step share."""

    rotary: tuple[Tensor, Tensor]
    """cos, sin (B, 1, R / 2) of the new tokens."""
    write_rows: Tensor
    """(B * G,) rows of the new keys and values in a cache seen as (slots * G * P, D)."""
    mask: Tensor
    """(B, 1, keys): 0 where a slot has a key, else -inf; keys = the most that any slot has."""

    @staticmethod
    def create(lengths: list[int], config: HybridConfig, *, max_tokens: int, device: torch.device) -> "AttentionStep":
        size, groups, keys = len(lengths), config.num_key_value_heads, max(lengths) + 1
        position = torch.tensor(lengths, device=device)
        row = torch.arange(0, size * groups * max_tokens, max_tokens, device=device).view(size, groups)
        absent = torch.arange(keys, device=device) > position.unsqueeze(1)
        return AttentionStep(
            rotary=rotary_tables(position, config.rotary_dim, config.rope_theta, torch.float32),
            write_rows=(row + position.unsqueeze(1)).flatten(),
            mask=torch.zeros(size, keys, device=device).masked_fill_(absent, -torch.inf).unsqueeze(1),
        )


class Attention(nn.Module):
    """A full-attention mixer; parameter names as in transformers' Qwen3_5Attention."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim * 2, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = RmsNorm(self.head_dim, self.eps)
        self.k_norm = RmsNorm(self.head_dim, self.eps)

    def new_state(self, num_slots: int, max_tokens: int) -> AttentionState:
        shape = (num_slots, self.num_kv_heads, max_tokens, self.head_dim)
        return AttentionState(keys=self.k_proj.weight.new_zeros(shape), values=self.k_proj.weight.new_zeros(shape))

    def forward(
        self, x: Tensor, packing: Packing, rotary: tuple[Tensor, Tensor], cached: AttentionState | None
    ) -> Tensor:
        """x (T, hidden) -> (T, hidden); `rotary` cos, sin (T, 1, R / 2). With `cached`, slots are read and extended."""
        q, gate = self.q_proj(x).unflatten(-1, (self.num_heads, 2 * self.head_dim)).chunk(2, -1)
        q = rotate(self.q_norm(q), *rotary)
        k = rotate(self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))), *rotary)
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        outputs = [_attend(q, k, v, bucket, packing, cached) for bucket in packing.buckets]
        tokens = torch.cat([bucket.tokens for bucket in packing.buckets])
        o = place_rows(torch.cat(outputs), tokens, packing.num_tokens)
        return self.o_proj((o * gate.sigmoid()).flatten(1))

    @torch.no_grad()
    def decode_weights(self, gain: Tensor) -> AttentionDecodeWeights:
        """Weights for `decode`; `gain` is that of the norm before this layer."""
        q, k, v = self.q_proj, self.k_proj, self.v_proj

        def merge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            queries, gates = q.float().unflatten(0, (self.num_heads, 2 * self.head_dim)).chunk(2, 1)
            return torch.cat([queries.flatten(0, 1), k.float(), v.float(), gates.flatten(0, 1)])

        norms = [
            ((1 + self.q_norm.weight.float()) * self.head_dim**-0.5).expand(self.num_heads, -1),
            (1 + self.k_norm.weight.float()).expand(self.num_kv_heads, -1),
        ]
        biased = q.bias is not None and k.bias is not None and v.bias is not None
        return AttentionDecodeWeights(
            inputs=(merge(q.weight, k.weight, v.weight) * gain).t().contiguous(),
            bias=merge(q.bias, k.bias, v.bias) if biased else None,
            norm=torch.cat(norms),
            output=self.o_proj.weight.float().t().contiguous(),
            output_bias=None if self.o_proj.bias is None else self.o_proj.bias.float().clone(),
        )

    def decode(self, x: Tensor, weights: AttentionDecodeWeights, step: AttentionStep, cached: AttentionState) -> Tensor:
        """x (B, hidden) fp32, residual included: one token for each of the first B slots, written to the cache."""
        size, heads, groups, dim = x.shape[0], self.num_heads, self.num_kv_heads, self.head_dim
        y = F.rms_norm(x, x.shape[1:], None, self.eps) @ weights.inputs
        if weights.bias is not None:
            y = y + weights.bias
        qk, v, gate = y.split([(heads + groups) * dim, groups * dim, heads * dim], -1)
        qk = F.rms_norm(qk.view(size, heads + groups, dim), (dim,), None, self.eps) * weights.norm
        q, k = rotate(qk, *step.rotary).split([heads, groups], 1)
        cached.keys.view(-1, dim).index_copy_(0, step.write_rows, k.reshape(-1, dim).to(cached.keys.dtype))
        cached.values.view(-1, dim).index_copy_(0, step.write_rows, v.reshape(-1, dim).to(cached.values.dtype))
        keys, values = (t[:size, :, : step.mask.shape[-1]].flatten(0, 1).float() for t in (cached.keys, cached.values))
        # Heads that share keys are rows of one product: nothing is repeated.
        scores = (q.reshape(size * groups, heads // groups, dim) @ keys.mT).view(size, heads, -1) + step.mask
        o = scores.softmax(-1).view(size * groups, heads // groups, -1) @ values
        out = torch.addmm(x, o.view(size, -1) * gate.sigmoid(), weights.output)
        return out if weights.output_bias is None else out + weights.output_bias


def _attend(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, packing: Packing, cached: AttentionState | None) -> Tensor:
    """Outputs (tokens of the bucket, H, D). Padding lies after the tokens, where a causal query never looks."""
    q, k, v = (
        spread_rows(y, bucket.token_of_row, source=bucket.tokens, target=bucket.rows)
        .unflatten(0, (-1, bucket.max_length))
        .transpose(1, 2)
        for y in (q, k, v)
    )
    mask = None
    if cached is not None:
        k, v = _extend(cached, k, v, bucket, packing)
        past = torch.tensor([packing.past[i] for i in bucket.sequences], device=q.device)
        query_position = past[:, None] + torch.arange(bucket.max_length, device=q.device)
        mask = (torch.arange(bucket.max_context, device=q.device) <= query_position[..., None]).unsqueeze(1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return take_rows(o.transpose(1, 2).flatten(0, 1), bucket.rows)


def _extend(cached: AttentionState, k: Tensor, v: Tensor, bucket: Bucket, packing: Packing) -> tuple[Tensor, Tensor]:
    """Write the new keys and values (n, G, L, D) to the slots; return all of the bucket's (n, G, max_context, D)."""
    assert packing.slots is not None
    slots = [packing.slots[i] for i in bucket.sequences]
    for row, (sequence, slot) in enumerate(zip(bucket.sequences, slots, strict=True)):
        begin, length = packing.past[sequence], packing.lengths[sequence]
        cached.keys[slot, :, begin : begin + length] = k[row, :, :length]
        cached.values[slot, :, begin : begin + length] = v[row, :, :length]
    index = torch.tensor(slots, device=k.device)
    return cached.keys[index, :, : bucket.max_context], cached.values[index, :, : bucket.max_context]
