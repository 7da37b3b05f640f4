"""From gradients to weights: parameter groups, AdamW, the learning rate of each update, and what to store of them."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from conf.schema import OptimizerConfig
from policy.model.model import PolicyModel
from rl.algorithm.choice import choose

ParameterGroups = list[dict[str, Any]]
OptimizerFunction = Callable[[ParameterGroups, OptimizerConfig], torch.optim.Optimizer]

NEVER_DECAYED = ("A_log", "dt_bias", "conv1d", "norm", "bias")
"""Parts of names. Decay would pull a Gated DeltaNet's memory span (A_log, dt_bias) and its convolution taps towards
values without meaning, and the usual rule "bias or norm" misses A_log and conv1d."""

COSINE_FLOOR = 0.1
"""Part of the learning rate that is left after the last step of a cosine schedule."""


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float) -> ParameterGroups:
    """Trainable parameters in two groups: with `weight_decay`, and without (`NEVER_DECAYED`, vectors, scalars)."""
    decayed: list[torch.nn.Parameter] = []
    undecayed: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(part in name for part in NEVER_DECAYED)
            (undecayed if spared else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def adamw(groups: ParameterGroups, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Source: decoupled weight decay, arXiv 1711.05101."""
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


OPTIMIZERS: dict[str, OptimizerFunction] = {"adamw": adamw}


def build_optimizer(model: PolicyModel, config: OptimizerConfig) -> torch.optim.Optimizer:
    """`config.name` is "adamw" or an import path of a function (parameter groups, config) -> torch optimizer."""
    groups = parameter_groups(model.named_parameters(), config.weight_decay)
    return choose("optimizer", config.name, OPTIMIZERS)(groups, config)


def learning_rate(update: int, total_updates: int, config: OptimizerConfig) -> float:
    """Rate of update number `update` (0 is the first): linear warm-up, then constant or a half cosine to 10% of lr.

    Example: lr=1, warmup_steps=2, cosine over 5 updates -> 0.5, 1.0, 1.0, 0.55, 0.1
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    last = total_updates - 1 - config.warmup_steps
    progress = min(1.0, (update - config.warmup_steps) / last) if last > 0 else 1.0
    return config.lr * (COSINE_FLOOR + (1 - COSINE_FLOOR) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def export_moments(
    model: PolicyModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What the optimizer remembers, by name: ({"<parameter>:<key>": array}, {"<parameter>:<key>": plain value})."""
    arrays: dict[str, np.ndarray] = {}
    plain: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                arrays[f"{name}:{key}"] = value.detach().cpu().numpy().copy()
            else:
                plain[f"{name}:{key}"] = value
    return arrays, plain


def import_moments(
    model: PolicyModel,
    optimizer: torch.optim.Optimizer,
    arrays: Mapping[str, np.ndarray],
    plain: Mapping[str, Any],
) -> None:
    """Undo `export_moments`. Raises `ValueError` for a name that the model does not have."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in {**arrays, **plain}.items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise ValueError(f"optimizer state {full_name!r} belongs to no parameter of this model")
        if isinstance(value, np.ndarray):
            # a scalar stays on the CPU: that is where AdamW counts its steps
            tensor = torch.from_numpy(value.copy())
            value = tensor if tensor.ndim == 0 else tensor.to(parameters[name].device)
        optimizer.state[parameters[name]][key] = value
