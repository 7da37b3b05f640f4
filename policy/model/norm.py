"""Normalisation with a hand-written gradient: half the memory traffic of the composed operations on a CPU."""

from typing import Any

import torch
from torch import Tensor, nn


class _Normalise(torch.autograd.Function):
    """y = x r, r = (sum(x^2) / scale + eps)^-1/2 over the last axis; dx = r (dy - y sum(dy y) / scale)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(scale).add_(eps).rsqrt_()
        y = x * r
        ctx.save_for_backward(y, r)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        y, r = ctx.saved_tensors
        projection = torch.linalg.vecdot(grads[0], y).unsqueeze_(-1)
        return torch.addcmul(grads[0], y, projection, value=-1.0 / ctx.scale).mul_(r), None, None


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps) over the last axis."""
    return _Normalise.apply(x, 1.0, eps)  # type: ignore[return-value]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) in fp32, returned in x's dtype."""
    return (_Normalise.apply(x.float(), float(x.shape[-1]), eps) * weight).to(x.dtype)  # type: ignore[operator]


class Gain(nn.Module):
    """The gain of an RMS norm that begins at one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class RmsNorm(nn.Module):
    """RMS norm with gain 1 + weight, so that zeros are the identity (Qwen3.5's convention)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)
