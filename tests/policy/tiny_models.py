"""Small random models of ours and of transformers for the policy tests."""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import HybridConfig

SHAPE = HybridConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,  # heads share keys, which the presets do not exercise
    linear_key_head_dim=16,
    linear_value_head_dim=24,
    tie_word_embeddings=True,
)
MOE = SHAPE.override(
    {
        "intermediate_size": 0,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    }
)


def shake(model: nn.Module, *, seed: int, scale: float = 0.1) -> None:
    """Move every weight, A_log and dt_bias and norms included, away from what initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def random_model(config: HybridConfig, *, seed: int = 0) -> HybridModel:
    torch.manual_seed(seed)
    model = HybridModel(config)
    shake(model, seed=seed)
    return model


def transformers_model(config: HybridConfig, *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    fields = config.to_hf()
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()
    shake(model, seed=seed)
    return model


def random_tokens(count: int, *, seed: int = 0, vocab_size: int = SHAPE.vocab_size) -> Tensor:
    return torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def starts_of(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)
