"""Weights between a model, a transformers-style folder and the numpy arrays that travel to engines.

A folder holds config.json and safetensors, as `save_pretrained` writes them. Every load covers the model's tensors both
ways and checks all of them before the first is changed, so that a failed load leaves the old weights whole.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import COMPOSITE_TYPES, HybridConfig
from policy.sync.snapshot import WeightSyncError

_EXPERT = re.compile(r"(?P<stem>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def expected_tensors(model: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, numpy dtype)} of the model's weights; a tied head appears once, as the embedding."""
    return {name: (tuple(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()}


def to_numpy_tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """Copies of the model's weights; later updates of the model do not change them."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


@torch.no_grad()
def load_numpy_tensors(model: nn.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Copy `tensors` into the model in place, all or none.

    Raises `WeightSyncError` naming the first tensor that is missing, unknown, of another shape or not finite.
    """
    parameters = dict(model.named_parameters())
    if missing := sorted(parameters.keys() - tensors.keys()):
        raise WeightSyncError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if unknown := sorted(tensors.keys() - parameters.keys()):
        raise WeightSyncError(f"tensor {unknown[0]!r} is unknown ({len(unknown)} in all)")
    for name, parameter in parameters.items():
        if tensors[name].shape != tuple(parameter.shape):
            raise WeightSyncError(f"{name!r} has shape {tensors[name].shape}, expected {tuple(parameter.shape)}")
        if not np.isfinite(tensors[name]).all():
            raise WeightSyncError(f"{name!r} holds values that are not finite")
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))


def save_model(model: HybridModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, which transformers' AutoModelForCausalLM and `load_model` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=2) + "\n")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load_model(folder: str | Path) -> HybridModel:
    """The fp32 model of a Qwen3.5 folder, dense or MoE; of a vision-language model its text part.

    Raises ValueError for a config that this model cannot compute or a folder without weights, `WeightSyncError` naming
    the tensor where config and weights differ.
    """
    folder = Path(folder)
    raw = read_config(folder)
    config = HybridConfig.from_hf(raw)
    model = HybridModel(config)
    tensors = read_safetensors(folder)
    if raw["model_type"] in COMPOSITE_TYPES:
        tensors = _text_part(tensors)
    # Draft layers of speculative decoding, which neither we nor transformers' text model have.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    load_numpy_tensors(model, {name: tensor.float().numpy() for name, tensor in _stack_experts(tensors).items()})
    return model


def read_config(folder: Path) -> dict:
    """The folder's config.json. Raises ValueError where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json, so this is no transformers checkpoint folder")
    return json.loads(path.read_text())


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: weights file {name!r} is missing")
        tensors |= load_file(folder / name)
    return tensors


def _text_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("model.language_model.", "model.", 1): tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.visual.")
    }


def _stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Experts saved one by one (as transformers does) become experts.gate_up_proj and experts.down_proj."""
    stacked: dict[str, Tensor] = {}
    parts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        if found := _EXPERT.fullmatch(name):
            parts.setdefault(found["stem"], {}).setdefault(found["part"], {})[int(found["index"])] = tensor
        else:
            stacked[name] = tensor
    for stem, by_part in parts.items():
        matrices = {}
        for part in ("gate", "up", "down"):
            experts = by_part.get(part, {})
            absent = sorted(set(range(max(max(e) for e in by_part.values()) + 1)) - experts.keys())
            if absent:
                raise WeightSyncError(f"tensor '{stem}.{absent[0]}.{part}_proj.weight' is missing")
            matrices[part] = torch.stack([experts[i] for i in sorted(experts)])
        stacked[f"{stem}.gate_up_proj"] = torch.cat([matrices["gate"], matrices["up"]], 1)
        stacked[f"{stem}.down_proj"] = matrices["down"]
    return stacked
