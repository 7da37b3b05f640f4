"""The vLLM engine: vLLM in this process, stepped by a thread of its own, behind the same protocol as the local one."""

import time
from collections.abc import Callable, Mapping

from conf.combinations import VLLM_MIN_TEMPERATURE
from conf.schema import EngineConfig
from policy.engine.protocol import EngineCapabilities
from policy.engine.step_engine import StepEngine
from policy.model.hybrid_config import HybridConfig
from policy.model.model import PolicyShape
from policy.vllm.core import HANG_S
from policy.vllm.stepper import VllmStepper

TOLERANCE, FREE_ROUTES_TOLERANCE = 0.5, 5.0
"""Largest expected difference to an fp32 learner for the same weights, over the tokens of a step, in bfloat16.

Rounding alone gives 0.1; where it sends a token to other experts than the learner's, whole logprobs move
(docs/vllm.md)."""
START_TIMEOUT_S = 600.0
"""Imports and start; 10 s on an idle machine."""
HEAD_DIMS = (64, 128)
"""Of linear attention, which the CPU build's kernel computes."""


class VllmEngine(StepEngine):
    """An `Engine` over vLLM. It starts with the first `load_weights`; weights come from there alone.

    Example: engine = VllmEngine(config, expected_tensors(model), EngineConfig(kind="vllm"))

    Requests bring no seed (the CPU build dies of one), no session, no top_p and no top_k, and no temperature that vLLM
    would raise: `UnsupportedRequest`.
    Raises ValueError for a model that the engine cannot compute.
    """

    def __init__(
        self,
        model: HybridConfig,
        expected: Mapping[str, tuple[tuple[int, ...], str]],
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        hang_s: float = HANG_S,
    ) -> None:
        """`hang_s`: silence of a core of its own after which it is ended."""
        for name in ("linear_key_head_dim", "linear_value_head_dim"):
            if getattr(model, name) not in HEAD_DIMS:
                raise ValueError(f"policy {name}={getattr(model, name)}, allowed with vLLM: 64, 128")
        super().__init__(
            VllmStepper(model, config, clock=clock, hang_s=hang_s),
            config,
            capabilities=EngineCapabilities(
                name="vllm",
                max_model_tokens=config.max_model_tokens,
                logprob_tolerance=vllm_tolerance(model, config),
                per_request_seed=False,
                sessions=False,
                nucleus=False,
                min_temperature=VLLM_MIN_TEMPERATURE,
                routed_experts=VllmStepper.captures_routes(model, config),
            ),
            expected=expected,
            vocab_size=model.vocab_size,
            clock=clock,
            start_timeout_s=START_TIMEOUT_S,
        )


def vllm_tolerance(model: PolicyShape, config: EngineConfig) -> float:
    """Largest |engine logprob - learner logprob| that is no fault. Learners replay the routes that engines record."""
    free = model.num_experts > 0 and not VllmStepper.captures_routes(model, config)
    return FREE_ROUTES_TOLERANCE if free else TOLERANCE
