"""The learner with its model and its checkpoints, in whatever process it runs."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from conf.schema import TrainConfig
from policy.engine.local_engine import LOGPROB_TOLERANCE
from policy.model.device import claim_device
from policy.model.hf_model import load_policy_model
from policy.model.initial import load_initial_weights
from policy.sync.snapshot import PolicySnapshot
from policy.vllm.engine import vllm_tolerance
from rl.algorithm.advantage import ToolPrice
from rl.algorithm.learner import Learner
from rl.algorithm.step_report import LearnerReport
from rl.runs.checkpoint import read_checkpoint, save_checkpoint
from rollout.dialects.dialect import make_dialect
from rollout.record.trajectory import TrajectoryGroup

T = TypeVar("T")


def build_learner(config: TrainConfig) -> Learner:
    """The configured model with its first weights, and a learner around it."""
    torch.set_num_threads(config.learner.threads)
    model = load_policy_model(config.policy, seed=config.seed)
    load_initial_weights(model, config.policy, config.env.name)
    return Learner(
        model.to(claim_device(config.cluster.learner_gpus)),
        config.learner,
        total_steps=config.steps,
        max_staleness=config.rollout.max_staleness,
        groups_per_step=config.rollout.groups_per_step,
        banned_token_ids=make_dialect(config.policy).banned_token_ids,
        price=ToolPrice(cost=config.env.tool_cost, below=config.env.tool_cost_below),
        engine_tolerance=(
            vllm_tolerance(model.config, config.engine) if config.engine.kind == "vllm" else LOGPROB_TOLERANCE
        ),
        horizon=config.engine.max_model_tokens,
    )


class LearnerService:
    """What a learner process offers. Not thread-safe: one call at a time."""

    def __init__(self, config: TrainConfig) -> None:
        self.learner = build_learner(config)

    def step(self, groups: Sequence[TrajectoryGroup]) -> LearnerReport:
        return self.learner.step(groups)

    def snapshot(self) -> PolicySnapshot:
        return self.learner.snapshot()

    def save(self, folder: str, step: int, state: dict[str, Any], keep: int) -> str:
        tensors, learner_state = self.learner.state()
        path = save_checkpoint(
            Path(folder), step, tensors=tensors, state={"learner": learner_state, "run": state}, keep=keep
        )
        return str(path)

    def restore(self, path: str) -> int:
        checkpoint = read_checkpoint(Path(path))
        self.learner.load_state(checkpoint.tensors, checkpoint.state["learner"])
        return self.learner.policy_version


class InProcessLearner:
    """A `LearnerClient` in this process: its work runs in one thread of its own, so the loop stays free."""

    def __init__(self, config: TrainConfig) -> None:
        self._service = LearnerService(config)
        self._keep = config.run.keep_checkpoints
        self._turn = asyncio.Lock()

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        async with self._turn:
            return await asyncio.to_thread(work, *args)

    async def step(self, groups: Sequence[TrajectoryGroup]) -> LearnerReport:
        return await self._run(self._service.step, groups)

    async def snapshot(self) -> PolicySnapshot:
        return await self._run(self._service.snapshot)

    async def save(self, folder: str, step: int, state: dict[str, Any]) -> str:
        return await self._run(self._service.save, folder, step, state, self._keep)

    async def restore(self, path: str) -> int:
        return await self._run(self._service.restore, path)

    async def close(self) -> None:
        """Nothing outlives the last call."""
