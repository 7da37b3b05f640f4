"""Any transformers causal LM behind our surface, and the choice of network that a config makes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from conf.schema import PolicyConfig
from policy.model.checkpoint_io import expected_tensors, load_numpy_tensors, to_numpy_tensors
from policy.model.hf_model import HfModel, load_policy_model
from policy.model.hybrid import HybridModel
from tests.policy.tiny_models import SHAPE, random_tokens, shake, starts_of, transformers_model

torch.set_num_threads(1)


def qwen3(*, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    shake(model, seed=seed)
    return model


@pytest.mark.parametrize("make", [qwen3, lambda: transformers_model(SHAPE)], ids=["qwen3", "hybrid"])
def test_packed_logits_and_gradients_equal_those_of_each_sequence_alone(make) -> None:
    inner = make()
    model = HfModel(inner)
    lengths = [5, 40, 1, 33, 12]
    tokens, starts = random_tokens(sum(lengths)), starts_of(*lengths)
    direction = torch.randn(sum(lengths), 61, generator=torch.Generator().manual_seed(1))

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        return found

    packed = model(tokens, starts).logits
    (packed * direction).sum().backward()
    packed_gradients = gradients()
    alone = torch.cat([inner(piece[None]).logits[0] for piece in tokens.split(lengths)])
    (alone * direction).sum().backward()
    assert (packed - alone).abs().max() <= 2e-5
    for one, other in zip(packed_gradients, gradients(), strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()
    rows = torch.tensor([40, 3])
    assert torch.equal(model(tokens, starts, logits_at=rows).logits, packed[rows])


@pytest.mark.parametrize("make", [qwen3, lambda: transformers_model(SHAPE)], ids=["qwen3", "hybrid"])
def test_cached_slots_continue_copy_and_reset(make) -> None:
    model = HfModel(make())
    tokens = random_tokens(40)
    full = model(tokens, starts_of(40)).logits
    cache = model.new_cache(3, 40)
    model(torch.cat([tokens[:30], tokens[:7]]), starts_of(30, 7), cache=cache, slots=[1, 0])
    assert cache.lengths == [7, 30, 0] and cache.nbytes > 0
    second = model(tokens[30:35], starts_of(5), cache=cache, slots=[1]).logits
    torch.testing.assert_close(second, full[30:35], rtol=0, atol=2e-5)
    cache.copy(1, 2)
    step = model.decode(torch.stack([tokens[7], tokens[0], tokens[35]]), cache).logits
    torch.testing.assert_close(step[[0, 2]], full[[7, 35]], rtol=0, atol=2e-5)
    step = model.decode(torch.stack([tokens[8], tokens[0], tokens[36]]), cache).logits
    torch.testing.assert_close(step[[0, 2]], full[[8, 36]], rtol=0, atol=2e-5)  # slot 1 took another way
    cache.reset(0)
    assert cache.lengths[0] == 0
    torch.testing.assert_close(model.decode(tokens[:1], cache).logits[0], full[0], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="at most 40"):
        model(random_tokens(41), starts_of(41), cache=model.new_cache(1, 40), slots=[0])
    with pytest.raises(ValueError, match="replay"):
        model(tokens, starts_of(40), routed_experts=torch.zeros(40, 1, 2, dtype=torch.long))


def test_weights_travel_under_their_transformers_names() -> None:
    one, other, tokens = HfModel(qwen3()), HfModel(qwen3(seed=1)), random_tokens(9)
    assert expected_tensors(one)["model.embed_tokens.weight"] == ((61, 32), "float32")
    assert "lm_head.weight" not in expected_tensors(one)
    load_numpy_tensors(other, to_numpy_tensors(one))
    assert torch.equal(one(tokens, starts_of(9)).logits, other(tokens, starts_of(9)).logits)


def test_a_config_chooses_our_network_for_our_architecture_and_transformers_for_others(tmp_path: Path) -> None:
    for name, inner, kind in (("qwen3", qwen3(), HfModel), ("hybrid", transformers_model(SHAPE), HybridModel)):
        inner.save_pretrained(tmp_path / name)
        model = load_policy_model(PolicyConfig(kind="hf", path=str(tmp_path / name)), seed=0)
        assert isinstance(model, kind) and model.config.vocab_size == 61
        tokens = random_tokens(50)
        logits = model(tokens, starts_of(50)).logits
        assert (logits - inner(tokens[None]).logits[0]).abs().max() <= 1e-4


def test_presets_take_overrides_and_the_seed_alone_decides_the_weights() -> None:
    config = PolicyConfig(overrides={"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]})
    before = torch.get_rng_state()
    one, same, other = (load_policy_model(config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [to_numpy_tensors(model) for model in (one, same, other)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (weights[0]["model.embed_tokens.weight"] != weights[2]["model.embed_tokens.weight"]).any()
    assert (weights[0]["model.layers.1.linear_attn.A_log"] != weights[2]["model.layers.1.linear_attn.A_log"]).any()
    assert one.config.layer_types == ("full_attention", "linear_attention")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PolicyConfig(preset="tiny_hibrid"), r"'tiny_hibrid'.*nearest: 'tiny_hybrid'"),
        (PolicyConfig(overrides={"hidden": 8}), r"'hidden'.*nearest: 'hidden_size'"),
        (PolicyConfig(kind="jax"), "allowed: 'hybrid', 'hf'"),
        (PolicyConfig(kind="hf"), r"policy\.path"),
        (PolicyConfig(kind="hf", path="no/such/folder"), r"no config\.json"),
    ],
)
def test_unknown_choices_are_refused_by_name(config: PolicyConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_policy_model(config, seed=0)
