"""Engines whose step thread is stuck. What all engines promise is in test_policy_engine_contract.py."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from conf.schema import EngineConfig
from policy.engine.protocol import (
    CachePolicy,
    EngineCapabilities,
    EngineClosed,
    EngineStats,
    GenerationRequest,
    SamplingSpec,
)
from policy.engine.step_engine import StepEngine
from policy.sync.snapshot import PolicySnapshot


class StuckStepper:
    """Takes weights once; the next swap waits for `released`."""

    def __init__(self) -> None:
        self.finished: list[Any] = []
        self.policy_version = -1
        self.has_work = False
        self.released = threading.Event()

    def stats(self) -> EngineStats:
        return EngineStats()

    def swap(self, snapshot: PolicySnapshot, cache_policy: CachePolicy) -> None:
        if self.policy_version >= 0:
            self.released.wait(20)
        self.policy_version = snapshot.version

    def start(self) -> None: ...

    def add(self, ticket: Any) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def close_session(self, session_id: str) -> None: ...

    def step(self) -> None: ...

    def close(self) -> None: ...


def test_a_swap_that_never_ends_is_the_end_of_its_engine_and_of_all_who_wait_for_it() -> None:
    async def scene() -> None:
        stepper = StuckStepper()
        engine = StepEngine(
            stepper,
            EngineConfig(),
            capabilities=EngineCapabilities(name="stuck", max_model_tokens=16, logprob_tolerance=0.0),
            expected={"a": ((1,), "float32")},
            vocab_size=8,
            swap_timeout_s=0.2,
        )
        await engine.load_weights(PolicySnapshot.create(1, {"a": np.zeros(1, np.float32)}))
        sampling = SamplingSpec(max_tokens=4)
        request = GenerationRequest(request_id="r", prompt_ids=np.ones(2, np.int32), sampling=sampling, deadline_s=60)
        waiting = asyncio.create_task(engine.generate(request))
        with pytest.raises(EngineClosed, match=r"no answer in 0\.2 s"):
            await engine.load_weights(PolicySnapshot.create(2, {"a": np.ones(1, np.float32)}))
        with pytest.raises(EngineClosed):
            await waiting
        assert engine.died
        stepper.released.set()
        await engine.close()

    asyncio.run(asyncio.wait_for(scene(), 20))
