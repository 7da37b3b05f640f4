"""Gated DeltaNet layers: a short convolution, the gated delta rule and a gated norm (arXiv 2412.06464, section 3.4).

Letters: T tokens of the packed pass, N sequences, M chunks, C chunk size, H value heads, J key heads, K key head dim,
V value head dim, F = 2JK + HV channels of the short convolution, W its width, B slots that decode together.

Weights and arithmetic are those of transformers' qwen3_5; here state and convolution end at every sequence boundary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.model.delta_rule import chunked_delta_rule
from policy.model.hybrid_config import HybridConfig
from policy.model.norm import Gain, l2_norm, rms_norm
from policy.model.packing import Packing, place_rows, spread_rows, take_rows

CHUNK_SIZE = 32
"""Tokens solved together. 32 beats 64 on a CPU: the work inside a chunk grows with its square."""
CONVOLUTION_ROWS = 128
"""Rows that the convolution handles at once on a CPU: few enough to stay in its cache between the taps."""


class _ShortConvolution(torch.autograd.Function):
    """y[i] = silu(sum_j x[i + j] w[j]) down the rows; W - 1 fewer rows come out than go in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        mixed = x.new_empty(x.shape[0] - len(weight) + 1, x.shape[1])
        step = CONVOLUTION_ROWS if x.is_cpu else len(mixed)
        for begin in range(0, len(mixed), step):
            block = mixed[begin : begin + step]
            torch.mul(x[begin : begin + len(block)], weight[0], out=block)
            for j in range(1, len(weight)):
                block.addcmul_(x[begin + j : begin + j + len(block)], weight[j])
        ctx.save_for_backward(x, weight, mixed)
        return F.silu(mixed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, mixed = ctx.saved_tensors
        d_x, d_weight = torch.zeros_like(x), torch.zeros_like(weight)
        step = CONVOLUTION_ROWS if x.is_cpu else len(mixed)
        for begin in range(0, len(mixed), step):
            d_mixed = torch.ops.aten.silu_backward(grads[0][begin : begin + step], mixed[begin : begin + step])
            for j in range(len(weight)):
                window = slice(begin + j, begin + j + len(d_mixed))
                d_x[window].addcmul_(d_mixed, weight[j])
                d_weight[j] += (d_mixed * x[window]).sum(0)
        return d_x, d_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetState:
    """What one layer keeps of every slot; always fp32."""

    conv: Tensor
    """(slots, W - 1, F) last inputs of the convolution, oldest first."""
    recurrent: Tensor
    """(slots, H, K, V)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaNetDecodeWeights:
    """One layer's weights, merged for single-token steps. The gains of both norms are folded into the projections."""

    inputs: Tensor
    """(D, F + HV + 2H): qkv, z, b, a."""
    conv: Tensor
    """(W, F)."""
    rate: Tensor
    """(H,) -exp(A_log)."""
    dt_bias: Tensor
    qk_scale: Tensor
    """(2J, 1): K^-1/2 for the query heads, 1 for the key heads."""
    output: Tensor
    """(HV, D)."""


class GatedDeltaNet(nn.Module):
    """A linear-attention mixer; parameter names as in transformers' Qwen3_5GatedDeltaNet."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads = config.linear_num_value_heads, config.linear_num_key_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        self.kernel, self.eps = config.linear_conv_kernel_dim, config.rms_norm_eps
        keys, values = self.num_key_heads * self.key_dim, self.num_heads * self.value_dim
        channels = 2 * keys + values
        self.splits = [2 * keys, values]
        self.in_proj_qkv = nn.Linear(config.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(config.hidden_size, values, bias=False)
        self.in_proj_b = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.in_proj_a = nn.Linear(config.hidden_size, self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, self.kernel, groups=channels, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(self.num_heads))
        # Rates from nearly nothing to 16 per unit of time: some heads remember, some forget at once.
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(0.01, 16).log_())
        self.norm = Gain(self.value_dim)
        self.out_proj = nn.Linear(values, config.hidden_size, bias=False)

    def new_state(self, num_slots: int) -> DeltaNetState:
        like = self.A_log
        return DeltaNetState(
            conv=like.new_zeros(num_slots, self.kernel - 1, sum(self.splits), dtype=torch.float32),
            recurrent=like.new_zeros(num_slots, self.num_heads, self.key_dim, self.value_dim, dtype=torch.float32),
        )

    def forward(self, x: Tensor, packing: Packing, cached: DeltaNetState | None, slots: Tensor | None) -> Tensor:
        """x (T, D) -> (T, D). With `cached`, sequences continue from their slots (N,) and the states are advanced."""
        convolved = self._convolve(x, packing, cached, slots)
        qk, v = convolved.split(self.splits, -1)
        rows = convolved.shape[0]
        q, k = l2_norm(qk.reshape(rows, 2 * self.num_key_heads, self.key_dim)).chunk(2, 1)
        q, k, v = (
            self._to_chunks(y, packing) for y in (q * self.key_dim**-0.5, k, v.reshape(rows, self.num_heads, -1))
        )
        if (repeats := self.num_heads // self.num_key_heads) > 1:
            q, k = (y.repeat_interleave(repeats, 1) for y in (q, k))
        narrow = torch.cat([self.in_proj_z.weight, self.in_proj_b.weight, self.in_proj_a.weight])
        gate, b, a = F.linear(x, narrow).float().split([self.splits[1], self.num_heads, self.num_heads], -1)
        g = -self.A_log.float().exp() * F.softplus(a + self.dt_bias.float())
        beta = b.sigmoid()
        num_rows = packing.token_of_chunk_row.shape[0]
        g, beta = (
            place_rows(y, packing.chunk_rows, num_rows).unflatten(0, (-1, CHUNK_SIZE)).mT.contiguous()
            for y in (g, beta)
        )
        start = None if cached is None or slots is None else cached.recurrent[slots[packing.order]]
        o, last = chunked_delta_rule(q, k, v, g, beta, packing.alive, start)
        if cached is not None and slots is not None and last is not None:
            cached.recurrent.index_copy_(0, slots[packing.order], last)
        o = take_rows(o.transpose(1, 2).reshape(num_rows, self.num_heads, self.value_dim), packing.chunk_rows)
        o = rms_norm(o, self.norm.weight, self.eps).flatten(1) * F.silu(gate)
        return self.out_proj(o.to(x.dtype))

    def _convolve(self, x: Tensor, packing: Packing, cached: DeltaNetState | None, slots: Tensor | None) -> Tensor:
        """silu(causal depthwise convolution of the qkv projection), fp32, (T + (N - 1) (W - 1), F).

        Every sequence has W - 1 rows of context before it: zero, for x is placed and in_proj_qkv has no bias, or the
        cached inputs. Rows whose window spans two sequences exist but are never read.
        """
        inputs = self.in_proj_qkv(place_rows(x, packing.conv_rows, packing.num_conv_rows)).float()
        if cached is not None and slots is not None:
            inputs.index_copy_(0, packing.context_rows, cached.conv[slots].flatten(0, 1))
            ends = packing.conv_rows[torch.tensor(packing.lengths, device=x.device).cumsum(0) - 1]
            window = ends[:, None] - torch.arange(self.kernel - 2, -1, -1, device=x.device)
            cached.conv.index_copy_(0, slots, inputs[window])
        return _ShortConvolution.apply(inputs, self.conv1d.weight.float()[:, 0].t().contiguous())  # type: ignore[return-value]

    def _to_chunks(self, y: Tensor, packing: Packing) -> Tensor:
        """(rows of the convolution, heads, dim) -> (M, heads, C, dim)."""
        source = packing.conv_rows - (self.kernel - 1)
        spread = spread_rows(y, source[packing.token_of_chunk_row], source=source, target=packing.chunk_rows)
        return spread.unflatten(0, (-1, CHUNK_SIZE)).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode_weights(self, gain: Tensor) -> DeltaNetDecodeWeights:
        """Weights for `decode`; `gain` (D,) is that of the norm before this layer."""
        merged = torch.cat([m.weight for m in (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)])
        scale = torch.ones(2 * self.num_key_heads, 1, device=gain.device)
        scale[: self.num_key_heads] = self.key_dim**-0.5
        return DeltaNetDecodeWeights(
            inputs=(merged.float() * gain).t().contiguous(),
            conv=self.conv1d.weight[:, 0].float().t().contiguous(),
            rate=-self.A_log.float().exp(),
            dt_bias=self.dt_bias.float().clone(),
            qk_scale=scale,
            output=(self.out_proj.weight.float() * self.norm.weight.float().repeat(self.num_heads)).t().contiguous(),
        )

    def decode(self, x: Tensor, weights: DeltaNetDecodeWeights, cached: DeltaNetState) -> Tensor:
        """x (B, D) fp32, residual included: one token for each of the first B slots, whose states advance in place."""
        size, heads = x.shape[0], self.num_heads
        values = heads * self.value_dim
        normed = F.rms_norm(x, x.shape[1:], None, self.eps)
        qkv, z, b, a = (normed @ weights.inputs).split([sum(self.splits), values, heads, heads], -1)
        window = torch.cat([cached.conv[:size], qkv.unsqueeze(1)], 1)
        cached.conv[:size].copy_(window[:, 1:])
        qk, v = F.silu((window * weights.conv).sum(1)).split(self.splits, -1)
        qk = qk.view(size, 2 * self.num_key_heads, self.key_dim)
        qk = qk * ((qk * qk).sum(-1, keepdim=True).add_(1e-6).rsqrt_() * weights.qk_scale)
        qk = qk.view(size, 2, self.num_key_heads, self.key_dim)
        if heads != self.num_key_heads:
            qk = qk.repeat_interleave(heads // self.num_key_heads, 2)
        decay = (F.softplus(a + weights.dt_bias) * weights.rate).exp_().unsqueeze(-1)
        state = cached.recurrent[:size]
        # One pass over the state reads it with q and k both; what this token writes is added to q's read afterwards.
        q_read, k_read = ((qk.transpose(1, 2) @ state) * decay.unsqueeze(-1)).unbind(2)
        delta = (v.view(size, heads, self.value_dim) - k_read) * b.sigmoid().unsqueeze(-1)
        q, k = qk.unbind(1)
        state.mul_(decay.unsqueeze(-1)).addcmul_(k.unsqueeze(-1), delta.unsqueeze(-2))
        o = torch.addcmul(q_read, (q * k).sum(-1, keepdim=True), delta)
        o = F.rms_norm(o, (self.value_dim,), None, self.eps).view(size, values) * F.silu(z)
        return torch.addmm(x, o, weights.output)
