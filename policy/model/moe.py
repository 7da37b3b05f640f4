"""Feed-forward layers: a gated MLP, or routed experts beside one shared expert.

Letters: T tokens, D hidden size, I width of an expert, S width of the shared expert, E experts, k experts per token.

    MLP(x) = W_down (silu(W_gate x) * W_up x)
    p = softmax(W_r x);  y = sum_{e in top-k} p_e / sum_top-k(p) MLP_e(x) + sigmoid(w_s x) MLP_shared(x)
Weights and arithmetic are those of transformers' qwen3_5 and qwen3_5_moe.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.model.hybrid_config import HybridConfig
from policy.model.packing import take_rows

MAX_DENSE_EXPERTS = 32
"""Up to this many experts a decode step computes all of them in one product, which beats many small ones."""


class _GatedUnits(torch.autograd.Function):
    """silu(gate) * up of rows [gate, up]; the gradient is written in place of both halves, nothing is joined."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        d_both = torch.empty_like(both)
        d_gate, d_up = d_both.chunk(2, -1)
        torch.mul(grads[0], F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return d_both


def gated_units(both: Tensor) -> Tensor:
    """(T, 2I) rows [gate, up] -> silu(gate) * up (T, I)."""
    return _GatedUnits.apply(both)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpDecodeWeights:
    """An MLP for single-token steps; the gain of the norm before is folded into `inputs`."""

    inputs: Tensor
    """(D, 2I): gate, up."""
    output: Tensor
    """(I, D)."""


class Mlp(nn.Module):
    """silu-gated MLP."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        merged = torch.cat([self.gate_proj.weight, self.up_proj.weight])
        return self.down_proj(gated_units(F.linear(x, merged)))

    @torch.no_grad()
    def decode_weights(self, gain: Tensor) -> MlpDecodeWeights:
        merged = torch.cat([self.gate_proj.weight, self.up_proj.weight]).float()
        return MlpDecodeWeights(
            inputs=(merged * gain).t().contiguous(), output=self.down_proj.weight.float().t().contiguous()
        )

    def decode(self, x: Tensor, normed: Tensor, weights: MlpDecodeWeights) -> Tensor:
        """x + MLP(normed * gain), both (B, D) fp32."""
        gate, up = (normed @ weights.inputs).chunk(2, -1)
        return torch.addmm(x, F.silu(gate) * up, weights.output)


class Router(nn.Module):
    """(E, D) scores of the experts."""

    def __init__(self, num_experts: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))


class Experts(nn.Module):
    """All routed experts in two tensors."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, hidden_size, width))


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeDecodeWeights:
    """All experts, the shared one first, as one wide MLP whose hidden units are scaled by the routing weights."""

    inputs: Tensor
    """(D, E + 1 + 2 (S + E I)): router, shared gate, all gates, all ups; the gain of the norm before is folded in."""
    output: Tensor
    """(S + E I, D)."""


class SparseMoe(nn.Module):
    """Top-k routed experts and a shared expert; parameter names as in transformers' Qwen3_5MoeSparseMoeBlock."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.gate = Router(self.num_experts, hidden)
        self.experts = Experts(self.num_experts, hidden, width)
        self.shared_expert = Mlp(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (T, D), replay (T, k) or None -> outputs (T, D) and routes (T, k).

        Replayed tokens use the recorded experts with the router's present probabilities, so the router still learns;
        -1 means that no route is known and the router decides.
        """
        routes, weights = self._route(F.linear(x, self.gate.weight), replay)
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return self._experts(x, routes, weights) + shared, routes

    def _route(self, logits: Tensor, replay: Tensor | None) -> tuple[Tensor, Tensor]:
        """Router logits (T, E) -> routes (T, k) and their weights, which sum to 1."""
        probabilities = logits.softmax(-1, dtype=torch.float32)
        routes = probabilities.detach().topk(self.top_k, -1).indices
        if replay is not None:
            routes = torch.where(replay < 0, routes, replay)
        chosen = probabilities.gather(-1, routes)
        return routes, (chosen / chosen.sum(-1, keepdim=True)).to(logits.dtype)

    def _experts(self, x: Tensor, routes: Tensor, weights: Tensor) -> Tensor:
        """Each expert sees its tokens in one product: sort by expert, multiply, sort back."""
        order = routes.flatten().argsort(stable=True)
        counts = torch.bincount(routes.flatten(), minlength=self.num_experts).tolist()
        copies = x.unsqueeze(1).expand(-1, self.top_k, -1).reshape(-1, x.shape[-1])
        outputs = []
        for expert, rows in enumerate(take_rows(copies, order).split(counts)):
            hidden = gated_units(F.linear(rows, self.experts.gate_up_proj[expert]))
            outputs.append(F.linear(hidden, self.experts.down_proj[expert]))
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
        y = take_rows(torch.cat(outputs), back).unflatten(0, (-1, self.top_k))
        return (y * weights.unsqueeze(-1)).sum(1)

    def check_replay(self, replay: Tensor, num_tokens: int) -> None:
        """Raise ValueError unless `replay` (T, k) holds k different experts, or -1, for every token."""
        if replay.shape != (num_tokens, self.top_k):
            raise ValueError(
                f"routed_experts of a layer has shape {tuple(replay.shape)}, expected {(num_tokens, self.top_k)}"
            )
        if replay.numel() and not -1 <= int(replay.min()) <= int(replay.max()) < self.num_experts:
            raise ValueError(
                f"routed_experts lies in [{int(replay.min())}, {int(replay.max())}], "
                f"allowed: 0 to {self.num_experts - 1}, or -1 for an unknown route"
            )
        ranked = replay.sort(-1).values
        if bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any()):
            raise ValueError("routed_experts names the same expert twice for one token")

    @torch.no_grad()
    def decode_weights(self, gain: Tensor) -> MoeDecodeWeights | None:
        """None where there are too many experts to compute all of them."""
        if self.num_experts > MAX_DENSE_EXPERTS:
            return None
        gates, ups = self.experts.gate_up_proj.float().chunk(2, 1)
        shared = self.shared_expert
        merged = [self.gate.weight, self.shared_expert_gate.weight, shared.gate_proj.weight, gates.flatten(0, 1)]
        merged += [shared.up_proj.weight, ups.flatten(0, 1)]
        down = [shared.down_proj.weight.float(), *self.experts.down_proj.float().unbind(0)]
        return MoeDecodeWeights(
            inputs=(torch.cat([w.float() for w in merged]) * gain).t().contiguous(),
            output=torch.cat(down, 1).t().contiguous(),
        )

    def decode(self, x: Tensor, normed: Tensor, weights: MoeDecodeWeights) -> tuple[Tensor, Tensor]:
        """x + MoE(normed * gain), both (B, D) fp32, and the routes (B, k)."""
        wide = weights.output.shape[0]
        logits, shared, gate, up = (normed @ weights.inputs).split([self.num_experts, 1, wide, wide], -1)
        routes, chosen = self._route(logits, None)
        scale = torch.zeros_like(logits).scatter_(-1, routes, chosen)
        width = self.experts.down_proj.shape[-1]
        spread = torch.cat(
            [shared.sigmoid().expand(-1, wide - self.num_experts * width), scale.repeat_interleave(width, -1)], -1
        )
        return torch.addmm(x, F.silu(gate) * up * spread, weights.output), routes
