"""The local engine: continuous batching in plain PyTorch, in this process, on a thread of its own."""

import time
from collections.abc import Callable

from conf.schema import EngineConfig
from policy.engine.batch_stepper import BatchStepper
from policy.engine.protocol import EngineCapabilities
from policy.engine.step_engine import StepEngine
from policy.model.checkpoint_io import expected_tensors
from policy.model.model import PolicyModel

LOGPROB_TOLERANCE = 1e-3
"""Largest expected difference to the learner for the same weights, fp32 on a CPU."""


class LocalEngine(StepEngine):
    """An `Engine` over a model of its own, which nobody else may change.

    Example: engine = LocalEngine(model, EngineConfig()); await engine.load_weights(snapshot)
    completion = await engine.generate(GenerationRequest(request_id="0", prompt_ids=ids, sampling=SamplingSpec()))

    `seed` starts the streams of requests that bring no seed; None = other numbers in every process.
    """

    def __init__(
        self,
        model: PolicyModel,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            BatchStepper(model, config, clock=clock),
            config,
            capabilities=EngineCapabilities(
                name="local",
                max_model_tokens=config.max_model_tokens,
                logprob_tolerance=LOGPROB_TOLERANCE,
                routed_experts=model.config.num_experts > 0,
            ),
            expected=expected_tensors(model),
            vocab_size=model.config.vocab_size,
            clock=clock,
            seed=seed,
        )
