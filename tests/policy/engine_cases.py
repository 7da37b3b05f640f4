"""The engines that the contract suite runs against, and which tests are for which."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from conf.schema import EngineConfig, VllmConfig
from policy.engine.local_engine import LocalEngine
from policy.engine.protocol import (
    Engine,
)
from policy.model.checkpoint_io import expected_tensors, to_numpy_tensors
from policy.model.hybrid import HybridModel
from policy.model.hybrid_config import PRESETS
from policy.sync.snapshot import PolicySnapshot
from policy.vllm.core import HANG_S
from policy.vllm.engine import VllmEngine
from policy.vllm.packages import vllm_build
from tests.fakes import ScriptedEngine

VOCAB = 61
MAX_TOKENS = 160
MAX_RUNNING = 4
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
DENSE = PRESETS["tiny_hybrid"].override(SMALL | {"intermediate_size": 48})
MOE = PRESETS["tiny_moe"].override(SMALL | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16})
# vLLM's kernels on a CPU: linear heads of 64 or 128, widths in multiples of 32
WIDE = {"vocab_size": VOCAB, "hidden_size": 64, "head_dim": 32}
WIDE_MOE = PRESETS["tiny_moe"].override(WIDE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32})
MODELS = {
    "dense": DENSE,
    "dense-untied": DENSE.override({"tie_word_embeddings": False}),
    "moe": MOE,
    "moe-untied": MOE.override({"tie_word_embeddings": False}),
    "vllm-dense": PRESETS["tiny_hybrid"].override(WIDE | {"intermediate_size": 64}),
    "vllm-moe": WIDE_MOE,
    "vllm-dense-untied": PRESETS["tiny_hybrid"].override(
        WIDE | {"intermediate_size": 64, "tie_word_embeddings": False}
    ),
    # 32 a rank: narrower experts vLLM widens when it loads them first, and cannot load again
    "vllm-two-ranks": WIDE_MOE.override({"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}),
    "vllm-moe-untied": WIDE_MOE.override({"tie_word_embeddings": False}),
}


@dataclass(frozen=True, kw_only=True)
class EngineCase:
    """One kind of engine."""

    make: Callable[..., Engine]
    """(clock) -> an engine with MAX_RUNNING rows, MAX_TOKENS tokens and VOCAB tokens; vLLM's with other MAX_TOKENS."""
    tensors: Callable[[int], dict[str, np.ndarray]]
    """Weights of a seed."""
    model: Callable[[int], HybridModel] | None = None
    """The learner's model with the weights of a seed; None where logits mean nothing."""
    noise: tuple[float, float] = (1e-4, 1e-4)
    """Largest mean and largest difference of its logprobs to the learner's, and between two ways to the same ones."""
    exact: bool = True
    """One's company in a batch changes no token."""

    def snapshot(self, version: int, *, seed: int = 0) -> PolicySnapshot:
        return PolicySnapshot.create(version, self.tensors(seed))


@functools.cache
def model_of(config: str, seed: int) -> HybridModel:
    """A model with lively random weights, A_log, dt_bias and norms included.

    Not livelier: with twice the noise a state read out near 0 magnifies the rounding of fp32 to 3e-4 in a logprob,
    and that of vLLM's bfloat16 to 1 with the noise of the others.
    """
    torch.set_num_threads(1)
    model = HybridModel(MODELS[config])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.03 if "vllm" in config else 0.1))
    return model


def local_case(config: str) -> EngineCase:
    def make(clock: Callable[[], float] = time.monotonic) -> Engine:
        model = HybridModel(MODELS[config])
        settings = EngineConfig(max_running=MAX_RUNNING, max_sessions=10, max_model_tokens=MAX_TOKENS)
        return LocalEngine(model, settings, clock=clock)

    return EngineCase(
        make=make,
        tensors=lambda seed: dict(to_numpy_tensors(model_of(config, seed))),
        model=lambda seed: model_of(config, seed),
    )


def vllm_case(config: str, own: VllmConfig | None = None) -> EngineCase:
    def make(
        clock: Callable[[], float] = time.monotonic, hang_s: float = HANG_S, max_model_tokens: int = MAX_TOKENS
    ) -> Engine:
        settings = EngineConfig(
            kind="vllm", max_running=MAX_RUNNING, max_model_tokens=max_model_tokens, vllm=own or VllmConfig()
        )
        expected = expected_tensors(HybridModel(MODELS[config]))
        return VllmEngine(MODELS[config], expected, settings, clock=clock, hang_s=hang_s)

    return EngineCase(
        make=make,
        tensors=lambda seed: dict(to_numpy_tensors(model_of(config, seed))),
        model=lambda seed: model_of(config, seed),
        noise=(0.03, 0.3),  # bfloat16; the learner replays the routes of experts
        exact=False,
    )


def babble(prompt_ids: np.ndarray, rng: np.random.Generator) -> list[int]:
    return rng.integers(0, VOCAB, MAX_TOKENS).tolist()


def scripted_case() -> EngineCase:
    def make(clock: Callable[[], float] = time.monotonic) -> Engine:
        expected = {"a": ((3, 2), "float32"), "b": ((4,), "float32")}
        return ScriptedEngine(
            babble, vocab_size=VOCAB, max_model_tokens=MAX_TOKENS, expected=expected, token_s=0.001, clock=clock
        )

    return EngineCase(
        make=make,
        tensors=lambda seed: {"a": np.full((3, 2), seed, np.float32), "b": np.full(4, seed, np.float32)},
    )


CASES = {f"local-{name}": local_case(name) for name in ("dense", "dense-untied", "moe", "moe-untied")}
CASES["scripted"] = scripted_case()
VLLM = {name: vllm_case(name) for name in ("vllm-dense", "vllm-dense-untied", "vllm-moe", "vllm-moe-untied")}
VLLM["vllm-core"] = vllm_case("vllm-dense", VllmConfig(process="core"))
VLLM["vllm-core-moe"] = vllm_case("vllm-moe-untied", VllmConfig(process="core"))
VLLM["vllm-two-ranks"] = vllm_case("vllm-two-ranks", VllmConfig(tensor_parallel=2))
needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(vllm_build() is None, reason="needs the vLLM extra")]
SMALL_SETTING = ("vllm-dense", "vllm-moe-untied")
"""What CI runs of them; the others are part of `make test-all` alone."""
VLLM_PARAMETERS = [
    pytest.param(case, id=name, marks=needs_vllm if name in SMALL_SETTING else [*needs_vllm, pytest.mark.sweep])
    for name, case in VLLM.items()
    if name != "vllm-core-moe"  # each start takes half a minute; test_policy_vllm_core.py has it
]


VLLM_CORE = pytest.param(VLLM["vllm-core"], id="vllm-core", marks=[*needs_vllm, pytest.mark.sweep])


def every(*cases: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [*map(own_parameter, cases), *VLLM_PARAMETERS])


def own_parameter(name: str) -> Any:
    """Those without tied embeddings repeat the others but for one matrix, so they are not in the fast suite."""
    return pytest.param(CASES[name], id=name, marks=[pytest.mark.slow] if name.endswith("untied") else [])


every_engine = every(*CASES)
LOCAL = [name for name in CASES if name != "scripted"]
every_real_engine = every(*LOCAL)
every_local_engine = pytest.mark.parametrize("case", [own_parameter(name) for name in LOCAL])
"""For what capabilities say that others lack."""
