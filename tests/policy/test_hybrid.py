"""The hybrid model: equal to transformers, sealed at sequence boundaries, and the same whatever way tokens arrive."""

import pytest
import torch
from torch import Tensor

from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import PRESETS, HybridConfig
from policy.model.moe import SparseMoe
from tests.policy.tiny_models import MOE, SHAPE, random_model, random_tokens, starts_of, transformers_model

torch.set_num_threads(1)


def logits_of(model: HybridModel, tokens: Tensor) -> Tensor:
    return model(tokens, starts_of(len(tokens))).logits


@pytest.mark.parametrize("base", [SHAPE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": False, "attention_bias": True}], ids=["tied", "untied"]
)
def test_logits_and_every_gradient_equal_those_of_transformers(base: HybridConfig, changes: dict) -> None:
    config = base.override(changes)
    theirs, ours = transformers_model(config), HybridModel(config)
    weights = dict(theirs.named_parameters())
    ours.load_state_dict(weights, strict=True)
    lengths = [20, 65, 130, 1]
    tokens = random_tokens(sum(lengths))
    output = ours(tokens, starts_of(*lengths))
    reference = torch.cat([theirs(piece[None]).logits[0] for piece in tokens.split(lengths)])
    assert (output.logits - reference).abs().max() <= 1e-4
    if config.num_experts:
        assert output.routed_experts is not None
        assert all(len(output.routed_experts[:, layer].unique()) == config.num_experts for layer in range(4))

    direction = torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
    (output.logits * direction).sum().backward()
    (reference * direction).sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and weights[name].grad is not None, name
        scale = weights[name].grad.abs().max()
        assert scale > 0, name
        # Both are fp32 sums that cancel: the decay rates agree to 3 digits, everything else to 4.
        assert (parameter.grad - weights[name].grad).abs().max() <= 2e-3 * scale, name


def test_parameter_names_and_shapes_of_the_presets_are_those_of_transformers() -> None:
    for config in PRESETS.values():
        ours = {name: p.shape for name, p in HybridModel(config).named_parameters()}
        theirs = {name: p.shape for name, p in transformers_model(config).named_parameters()}
        assert ours == theirs


def test_the_tiny_preset_fits_in_two_mebibytes_and_the_moe_preset_computes_as_many_parameters_per_token() -> None:
    dense, moe = (HybridModel(PRESETS[name]) for name in ("tiny_hybrid", "tiny_moe"))
    total = sum(p.numel() for p in dense.parameters())
    assert total * 4 < 2048 * 1024
    idle = 6 / 8 * sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    assert abs(sum(p.numel() for p in moe.parameters()) - idle - total) < 0.02 * total


@pytest.mark.parametrize("config", [SHAPE, MOE], ids=["dense", "moe"])
def test_packed_sequences_give_what_they_give_alone(config: HybridConfig) -> None:
    model = random_model(config)
    lengths = [3, 64, 1, 150, 31, 2]
    tokens = random_tokens(sum(lengths))
    packed = model(tokens, starts_of(*lengths)).logits
    alone = torch.cat([logits_of(model, piece) for piece in tokens.split(lengths)])
    assert (packed - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("config", [SHAPE, MOE], ids=["dense", "moe"])
def test_no_gradient_crosses_a_sequence_boundary(config: HybridConfig) -> None:
    model = random_model(config.override({"tie_word_embeddings": False}))
    lengths = [40, 33, 70]
    vocabulary = torch.arange(60)
    tokens = torch.cat([vocabulary[:20].repeat(2), vocabulary[20:40].repeat(2)[:33], vocabulary[40:].repeat(4)[:70]])
    loss = model(tokens, starts_of(*lengths)).logits[40:73].square().sum()
    (gradient,) = torch.autograd.grad(loss, model.model.embed_tokens.weight)
    assert gradient[20:40].abs().sum() > 0
    assert not gradient[:20].any() and not gradient[40:60].any()


@pytest.mark.parametrize("config", [SHAPE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("prompt", [1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_prefill_and_decode_equal_one_full_forward(config: HybridConfig, prompt: int) -> None:
    model = random_model(config)
    tokens = random_tokens(prompt + 6)
    full = model(tokens, starts_of(len(tokens)))
    cache = model.new_cache(1, len(tokens))
    first = model(tokens[:prompt], starts_of(prompt), cache=cache, slots=[0])
    torch.testing.assert_close(first.logits, full.logits[:prompt], rtol=0, atol=2e-5)
    for position in range(prompt, len(tokens)):
        step = model.decode(tokens[position : position + 1], cache)
        torch.testing.assert_close(step.logits[0], full.logits[position], rtol=0, atol=3e-5)
        if step.routed_experts is not None:
            assert torch.equal(step.routed_experts[0].sort(-1).values, full.routed_experts[position].sort(-1).values)
    assert cache.lengths == [len(tokens)]


@pytest.mark.parametrize("split", [1, 2, 3, 4, 31, 32, 33, 64, 98, 99])
def test_a_prefill_in_two_parts_equals_one_prefill(split: int) -> None:
    model = random_model(SHAPE)
    tokens = random_tokens(100)
    full = logits_of(model, tokens)
    cache = model.new_cache(3, 100)
    model(tokens[:split], starts_of(split), cache=cache, slots=[2])
    rest = model(tokens[split:], starts_of(100 - split), cache=cache, slots=[2])
    torch.testing.assert_close(rest.logits, full[split:], rtol=0, atol=2e-5)


def test_slots_at_different_lengths_prefill_and_decode_together() -> None:
    model = random_model(SHAPE)
    lengths = [5, 70, 33]
    pieces = random_tokens(sum(lengths) + 9).split([length + 3 for length in lengths])
    cache = model.new_cache(4, 80)
    slots = [2, 0, 1]
    prompts = torch.cat([piece[:length] for piece, length in zip(pieces, lengths, strict=True)])
    model(prompts, starts_of(*lengths), cache=cache, slots=slots)
    assert cache.lengths == [70, 33, 5, 0]
    for step in range(3):
        ids = torch.empty(3, dtype=torch.long)
        for slot, piece, length in zip(slots, pieces, lengths, strict=True):
            ids[slot] = piece[length + step]
        out = model.decode(ids, cache).logits
        for slot, piece, length in zip(slots, pieces, lengths, strict=True):
            expected = logits_of(model, piece[: length + step + 1])[-1]
            torch.testing.assert_close(out[slot], expected, rtol=0, atol=3e-5)


def test_a_copied_slot_goes_its_own_way_and_leaves_its_source_untouched() -> None:
    model = random_model(SHAPE)
    tokens, other = random_tokens(50), random_tokens(10, seed=9)
    cache = model.new_cache(2, 64)
    model(tokens[:40], starts_of(40), cache=cache, slots=[0])
    cache.copy(0, 1)
    assert cache.lengths == [40, 40]
    for i in range(10):
        step = model.decode(torch.stack([tokens[40 + i], other[i]]), cache).logits
    fresh = [logits_of(model, torch.cat([tokens[:40], tail]))[-1] for tail in (tokens[40:], other)]
    torch.testing.assert_close(step, torch.stack(fresh), rtol=0, atol=3e-5)


def test_a_reset_slot_gives_what_a_new_cache_gives_even_after_non_finite_values() -> None:
    model = random_model(SHAPE)
    tokens = random_tokens(20)
    cache, fresh = model.new_cache(2, 64), model.new_cache(2, 64)
    model(random_tokens(50, seed=5), starts_of(50), cache=cache, slots=[0])
    for layer in cache.layers:
        for name in layer.__slots__:
            getattr(layer, name)[0, ..., :1] = float("nan")
    cache.reset(0)
    for one in (cache, fresh):
        model(tokens[:10], starts_of(10), cache=one, slots=[0])
    for i in range(10, 20):
        ids = tokens[i : i + 1]
        assert torch.equal(model.decode(ids, cache).logits, model.decode(ids, fresh).logits)


def test_a_cache_keeps_recurrent_and_convolution_state_in_fp32() -> None:
    cache = random_model(SHAPE).bfloat16().new_cache(2, 16)
    for kind, layer in zip(SHAPE.layer_types, cache.layers, strict=True):
        dtypes = {getattr(layer, name).dtype for name in layer.__slots__}
        assert dtypes == ({torch.float32} if kind == "linear_attention" else {torch.bfloat16})


def test_cache_bytes_are_those_of_its_tensors() -> None:
    cache = random_model(SHAPE).new_cache(3, 10)
    linear = 3 * 4 * (3 * (2 * 32 + 96) + 4 * 16 * 24)
    assert cache.nbytes == 3 * linear + 3 * 4 * 2 * (2 * 10 * 16)


def test_decode_follows_an_in_place_update_of_the_weights() -> None:
    model = random_model(SHAPE)
    tokens = random_tokens(5)
    cache = model.new_cache(1, 16)
    model.decode(tokens[:1], cache)
    with torch.no_grad():
        model.model.layers[3].self_attn.q_proj.weight.mul_(1.5)  # type: ignore[union-attr]
        model.model.norm.weight.add_(0.3)
    cache.reset(0)
    for i in range(5):
        step = model.decode(tokens[i : i + 1], cache).logits[0]
    torch.testing.assert_close(step, logits_of(model, tokens)[-1], rtol=0, atol=2e-5)


def test_logits_at_chosen_rows_are_those_of_all_rows() -> None:
    model = random_model(SHAPE)
    tokens, rows = random_tokens(30), torch.tensor([4, 29, 11])
    chosen = model(tokens, starts_of(12, 18), logits_at=rows).logits
    torch.testing.assert_close(chosen, model(tokens, starts_of(12, 18)).logits[rows], rtol=0, atol=1e-6)


def test_replayed_routes_give_equal_logits_and_still_teach_the_router() -> None:
    model = random_model(MOE)
    tokens, starts = random_tokens(40), starts_of(25, 15)
    free = model(tokens, starts)
    replayed = model(tokens, starts, routed_experts=free.routed_experts)
    assert torch.equal(free.logits, replayed.logits)
    half = free.routed_experts.clone()
    half[::2] = -1  # unknown routes are chosen anew, here the same
    assert torch.equal(free.logits, model(tokens, starts, routed_experts=half).logits)
    other = (free.routed_experts + 1) % MOE.num_experts
    moved = model(tokens, starts, routed_experts=other)
    assert torch.equal(moved.routed_experts, other)
    assert (moved.logits - free.logits).abs().max() > 1e-3
    moved.logits.square().sum().backward()
    for layer in model.layers:
        assert isinstance(layer.mlp, SparseMoe)
        assert layer.mlp.gate.weight.grad is not None and layer.mlp.gate.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("bad", "message"), [(6, "allowed: 0 to 5"), (-2, "allowed: 0 to 5"), ("twice", "twice"), ("shape", "shape")]
)
def test_impossible_routes_are_refused(bad: int | str, message: str) -> None:
    model = random_model(MOE)
    routes = torch.tensor([0, 1]).expand(3, 4, 2).clone()
    if bad == "shape":
        routes = routes[:, :3]
    else:
        routes[1, 2, 1] = 0 if bad == "twice" else bad
    with pytest.raises(ValueError, match=message):
        model(random_tokens(3), starts_of(3), routed_experts=routes)


def test_many_experts_decode_as_few_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(MOE), random_tokens(4)
    dense, sparse = model.new_cache(4, 4), model.new_cache(4, 4)
    one = model.decode(tokens, dense)
    monkeypatch.setattr("policy.model.moe.MAX_DENSE_EXPERTS", 1)
    model.refresh_decode_weights()
    other = model.decode(tokens, sparse)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
    assert torch.equal(one.routed_experts, other.routed_experts)


def test_a_full_slot_a_repeated_slot_and_a_missing_slot_are_refused() -> None:
    model = random_model(SHAPE)
    cache = model.new_cache(2, 4)
    with pytest.raises(ValueError, match="at most 4"):
        model(random_tokens(5), starts_of(5), cache=cache, slots=[1])
    for slots in ([0, 0], [0], None):
        with pytest.raises(ValueError, match="different slots"):
            model(random_tokens(2), starts_of(1, 1), cache=cache, slots=slots)
    with pytest.raises(ValueError, match="ends at 3"):
        model(random_tokens(2), starts_of(3))
    model(random_tokens(4), starts_of(4), cache=cache, slots=[1])
    with pytest.raises(ValueError, match="slot 1 is full: 4 tokens"):
        model.decode(random_tokens(2), cache)


def test_configs_survive_the_way_through_transformers() -> None:
    for config in (SHAPE, MOE, *PRESETS.values(), SHAPE.override({"eos_token_id": (1, 2), "rope_theta": 1e6})):
        assert HybridConfig.from_hf(config.to_hf()) == config
        assert HybridConfig.from_hf(transformers_model(config).config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 64}, "'hiden_size'.*nearest: 'hidden_size'"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"layer_types": ["full"]}, "layer_types"),
        ({"partial_rotary_factor": 0.1}, "must be even"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "allowed: 1 to"),
    ],
)
def test_impossible_overrides_are_refused_by_name(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHAPE.override(changes)


@pytest.mark.parametrize(
    "changes", [{"model_type": "llama"}, {"hidden_act": "gelu"}, {"rope_parameters": {"rope_type": "yarn"}}]
)
def test_checkpoints_that_compute_something_else_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"model_type|not supported"):
        HybridConfig.from_hf(SHAPE.to_hf() | changes)
