"""Weights survive the way through folders and arrays, and damaged ones are refused by name before anything changes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from policy.model.checkpoint_io import expected_tensors, load_model, load_numpy_tensors, save_model, to_numpy_tensors
from policy.model.hybrid_config import HybridConfig
from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from tests.policy.tiny_models import MOE, SHAPE, random_model, random_tokens, starts_of, transformers_model

torch.set_num_threads(1)

CONFIGS = [SHAPE, MOE, MOE.override({"tie_word_embeddings": False})]


@pytest.mark.parametrize("config", CONFIGS, ids=["dense-tied", "moe-tied", "moe-untied"])
def test_a_saved_folder_loads_in_transformers_and_comes_back_equal(config: HybridConfig, tmp_path: Path) -> None:
    model, tokens = random_model(config), random_tokens(70)
    logits = model(tokens, starts_of(70)).logits
    save_model(model, tmp_path / "ours")
    assert torch.equal(load_model(tmp_path / "ours")(tokens, starts_of(70)).logits, logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert (theirs(tokens[None]).logits[0] - logits).abs().max() <= 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    assert torch.equal(load_model(tmp_path / "theirs")(tokens, starts_of(70)).logits, logits)


def test_shards_and_half_precision_load_as_one_fp32_model(tmp_path: Path) -> None:
    theirs = transformers_model(MOE).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    ours = load_model(tmp_path)
    for name, parameter in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter.float()), name


def test_the_text_part_of_a_vision_language_folder_loads(tmp_path: Path) -> None:
    model = random_model(SHAPE)
    save_model(model, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    extra = {"model.visual.patch_embed.weight": torch.zeros(2), "mtp.fc.weight": torch.zeros(2)}
    save_file(renamed | extra, tmp_path / "model.safetensors")
    tokens = random_tokens(9)
    assert torch.equal(load_model(tmp_path)(tokens, starts_of(9)).logits, model(tokens, starts_of(9)).logits)


Tensors = dict[str, np.ndarray]
NAME = "model.layers.1.linear_attn.A_log"


def drop(tensors: Tensors) -> None:
    del tensors[NAME]


def rename(tensors: Tensors) -> None:
    tensors["model.layers.1.linear_attn.a_log"] = tensors[NAME]


def truncate(tensors: Tensors) -> None:
    tensors[NAME] = tensors[NAME][:-1]


def poison(tensors: Tensors) -> None:
    tensors[NAME] = np.full_like(tensors[NAME], np.nan)


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [(drop, f"'{NAME}' is missing"), (rename, "a_log' is unknown"), (truncate, f"'{NAME}' has shape"),
     (poison, f"'{NAME}' holds values")],
)  # fmt: skip
def test_damaged_weights_are_refused_by_name_and_leave_the_model_as_it_was(
    sabotage: Callable[[Tensors], None], message: str, tmp_path: Path
) -> None:
    model = random_model(SHAPE)
    before = to_numpy_tensors(model)
    tensors = to_numpy_tensors(random_model(SHAPE, seed=1))
    sabotage(tensors)
    with pytest.raises(WeightSyncError, match=message):
        load_numpy_tensors(model, tensors)
    after = to_numpy_tensors(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)

    save_model(model, tmp_path)
    save_file({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(WeightSyncError, match=message):
        load_model(tmp_path)


def test_an_expert_missing_from_a_folder_is_named(tmp_path: Path) -> None:
    transformers_model(MOE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightSyncError, match=name):
        load_model(tmp_path)


def test_folders_without_config_or_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_hf()))
    with pytest.raises(ValueError, match=r"'model\.safetensors' is missing"):
        load_model(tmp_path)


def test_arrays_are_copies_that_verify_as_a_snapshot_and_bring_weights_to_another_model() -> None:
    one, other, tokens = random_model(SHAPE), random_model(SHAPE, seed=1), random_tokens(12)
    arrays = to_numpy_tensors(one)
    assert "lm_head.weight" not in arrays  # tied: the embedding stands for both
    logits = one(tokens, starts_of(12)).logits
    with torch.no_grad():
        one.model.norm.weight.add_(1.0)
    PolicySnapshot.create(1, arrays).verify(expected_tensors(other))
    load_numpy_tensors(other, arrays)
    assert torch.equal(other(tokens, starts_of(12)).logits, logits)
