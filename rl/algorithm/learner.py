"""The learner: whole groups in, a new policy version and a report out.

    groups ─ judge (who is valid, advantages) ─ [self-check] ─ [proximal logprobs] ─┐
               ┌────────────────── for each of updates_per_step parts ──────────────┘
               └─ pack ─ forward, loss, backward per micro-batch ─ finite? ─ clip, AdamW ─ policy_version + 1

It draws no random numbers and reads no clock but for one metric: the same weights, state and groups give the same bits.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate as running_sum
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from conf.schema import LearnerConfig
from policy.model.checkpoint_io import load_numpy_tensors, to_numpy_tensors
from policy.model.model import PolicyModel
from policy.sync.snapshot import PolicySnapshot
from rl.algorithm.advantage import ADVANTAGES, ToolPrice
from rl.algorithm.batch import Row, judge_group, pack, token_weights
from rl.algorithm.choice import choose
from rl.algorithm.gradient import Accumulated, RowValues, accumulate, score_rows
from rl.algorithm.loss import LOSSES
from rl.algorithm.optimizer import build_optimizer, export_moments, import_moments, learning_rate, set_learning_rate
from rl.algorithm.step_report import (
    LearnerReport,
    group_metrics,
    mismatch_metrics,
    replay_metrics,
    row_reports,
    staleness_metrics,
)
from rollout.record.trajectory import TrajectoryGroup
from rollout.schedule.staleness import StalenessBound

Scores = dict[int, np.ndarray]
"""Index of a row in the step -> (n,) float32 learner logprobs of its sampled tokens."""


class LearnerError(RuntimeError):
    """Raised when training cannot go on; weights and optimizer are as they were after the last good update."""


class SelfCheckError(LearnerError):
    """Raised when the learner does not give the logprobs that the engine recorded for the same weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One optimizer update."""

    learning_rate: float
    result: Accumulated = field(default_factory=Accumulated)
    grad_norm: float | None = None
    """Before clipping; None where no row had a signal."""
    failure: str = ""
    """Why it was not applied: a loss or gradient that is not finite."""


class Learner:
    """Owns model, optimizer and version.

    `policy_version` counts attempted updates: one that was skipped, or had nothing to learn from, also makes a version
    (of equal weights), so that staleness, slots and the learning rate depend on the number of steps alone.

    Staleness is bounded in steps; with U updates a step a version is 1/U step, and the last part of a step is U - 1
    versions older, relative to the weights it updates, than `off_policy/lag` says.

    Example: learner.step(groups).policy_version -> 1; learner.snapshot().version -> 1
    """

    def __init__(
        self,
        model: PolicyModel,
        config: LearnerConfig,
        *,
        total_steps: int,
        max_staleness: int,
        groups_per_step: int,
        banned_token_ids: Sequence[int],
        price: ToolPrice,
        engine_tolerance: float,
        horizon: int,
    ) -> None:
        """`total_steps`: of the run, for the cosine schedule. `horizon`: most tokens of a conversation, the constant
        of normalise="horizon". Raises `ValueError` for an unknown loss, advantage or optimizer."""
        self.model = model.eval()  # no dropout: logprobs must be those of sampling
        self.config = config
        self.policy_version = 0
        self.steps_done = 0
        self.skipped_updates = 0
        self._skipped_in_a_row = 0
        self._self_checked = False
        self._bound = StalenessBound(max_staleness=max_staleness, groups_per_step=groups_per_step)
        self._total_updates = total_steps * config.updates_per_step
        self.banned_token_ids = tuple(banned_token_ids)
        self._price = price
        self.tolerance = config.self_check_tolerance or engine_tolerance
        self._horizon = horizon
        self._advantage = choose("advantage", config.loss.advantage, ADVANTAGES)
        self._loss = choose("loss", config.loss.name, LOSSES)
        self._optimizer = build_optimizer(model, config.optimizer)

    def step(self, groups: Sequence[TrajectoryGroup]) -> LearnerReport:
        """Train on the groups, each once.

        Raises `StalenessViolation` (a group is too old), `SelfCheckError` (first batch only) and `LearnerError` (more
        than max_skipped_steps updates in a row were not finite).
        """
        started = time.perf_counter()
        version = self.policy_version
        self._check_staleness(groups)
        banned = frozenset(self.banned_token_ids)
        judged = [judge_group(group, self._advantage, price=self._price, banned=banned) for group in groups]
        rows = [row for group_rows in judged for row in group_rows]
        scores = {} if self._self_checked else self._self_check(rows)
        several = self.config.updates_per_step > 1
        if several:
            missing = [i for i, row in enumerate(rows) if row.status == "trained" and i not in scores]
            scores |= self._score(rows, missing)
        updates = []
        for part in self._parts([len(group_rows) for group_rows in judged]):
            update = self._update(rows, part, scores if several else None)
            if not several:
                scores |= update.result.logprobs
            if update.failure:
                _exclude(rows, part, update.failure)
            updates.append(update)
        self.steps_done += 1
        metrics = (
            group_metrics(groups, rows)
            | staleness_metrics(rows, version)
            | mismatch_metrics(rows, scores, version)
            | (replay_metrics(rows, scores) if self.model.config.num_experts else {})
            | self._update_metrics(updates)
            | {"time/forward_backward": time.perf_counter() - started}
        )
        return LearnerReport(
            step=self.steps_done,
            policy_version=self.policy_version,
            metrics=metrics,
            rows=row_reports(rows, scores),
        )

    def snapshot(self) -> PolicySnapshot:
        """The weights now, for engines."""
        return PolicySnapshot.create(self.policy_version, to_numpy_tensors(self.model))

    def state(self) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Any]]:
        """({"weights": ..., "optimizer": ...} arrays by name, JSON values): all that the next step depends on."""
        moments, plain = export_moments(self.model, self._optimizer)
        counters = {
            "steps_done": self.steps_done,
            "policy_version": self.policy_version,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self._skipped_in_a_row,
            "optimizer": plain,
        }
        return {"weights": to_numpy_tensors(self.model), "optimizer": moments}, counters

    def load_state(self, tensors: Mapping[str, Mapping[str, np.ndarray]], counters: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken. The self-check runs again: the engine is a new one."""
        load_numpy_tensors(self.model, tensors["weights"])
        import_moments(self.model, self._optimizer, tensors["optimizer"], counters["optimizer"])
        self.steps_done = counters["steps_done"]
        self.policy_version = counters["policy_version"]
        self.skipped_updates = counters["skipped_updates"]
        self._skipped_in_a_row = counters["skipped_in_a_row"]
        self._self_checked = False

    def _check_staleness(self, groups: Sequence[TrajectoryGroup]) -> None:
        per_step = self.config.updates_per_step
        for group in groups:
            if group.min_policy_version >= 0:  # -1: nothing was sampled
                self._bound.check(
                    learner_version=self.policy_version // per_step,
                    sampled_version=group.min_policy_version // per_step,
                )

    def _self_check(self, rows: Sequence[Row]) -> Scores:
        """Compare logprobs of trajectories that these very weights sampled; wait for the next step if there are none.

        Trajectories with tokens of older versions prove nothing: a kept cache may hold state of those weights.
        """
        fresh = [
            i
            for i, row in enumerate(rows)
            if row.is_valid
            and row.trajectory.min_policy_version == row.trajectory.max_policy_version == self.policy_version
        ]
        scores = self._score(rows, fresh)
        for i, logprobs in scores.items():
            trajectory = rows[i].trajectory
            positions = np.flatnonzero(trajectory.loss_mask)
            recorded = trajectory.rollout_logprobs[positions]
            gap = np.abs(logprobs - recorded)
            worst = int(np.nan_to_num(gap, nan=np.inf).argmax())
            if not gap[worst] <= self.tolerance:
                raise SelfCheckError(
                    f"learner and engine disagree on weights of version {self.policy_version}: trajectory "
                    f"{trajectory.trajectory_id!r}, token {positions[worst]}: learner logprob {logprobs[worst]:.6f}, "
                    f"rollout logprob {recorded[worst]:.6f}, difference {gap[worst]:.2e} > tolerance "
                    f"{self.tolerance:.0e}. Usual causes: the engine holds other weights or another precision, "
                    "temperature, top_p, top_k or banned tokens differ, or its cached state is wrong"
                )
        self._self_checked = bool(fresh)
        return scores

    def _score(self, rows: Sequence[Row], indices: Sequence[int]) -> Scores:
        trajectories = [rows[i].trajectory for i in indices]
        packs = pack(trajectories, max_tokens=self.config.micro_batch_tokens, device=self.model.device)
        return {indices[k]: logprobs for k, logprobs in score_rows(self.model, packs, self.banned_token_ids).items()}

    def _parts(self, group_sizes: Sequence[int]) -> list[range]:
        """Row indices of each update: whole groups, as even as can be, in order."""
        starts = [0, *running_sum(group_sizes)]
        cuts = [len(group_sizes) * u // self.config.updates_per_step for u in range(self.config.updates_per_step + 1)]
        return [range(starts[a], starts[b]) for a, b in pairwise(cuts)]

    def _update(self, rows: Sequence[Row], part: range, proximal: Scores | None) -> Update:
        """One optimizer update on the rows of `part`. Result logprobs are keyed by row index of the step."""
        rate = learning_rate(self.policy_version, self._total_updates, self.config.optimizer)
        self.policy_version += 1
        weights = token_weights([rows[i] for i in part], self.config.loss.normalise, horizon=self._horizon)
        trained = [i for i in part if rows[i].status == "trained"]
        if not trained:
            return Update(learning_rate=rate)  # stepping on old moments would drift without any signal
        trajectories = [rows[i].trajectory for i in trained]
        result = accumulate(
            self.model,
            pack(trajectories, max_tokens=self.config.micro_batch_tokens, device=self.model.device),
            RowValues(
                advantages=[rows[i].advantage or 0.0 for i in trained],
                weights=[weights[i - part.start] for i in trained],
                rollout_logprobs=[t.rollout_logprobs[t.loss_mask == 1] for t in trajectories],
                proximal_logprobs=None if proximal is None else [proximal[i] for i in trained],
            ),
            self._loss,
            self.config.loss,
            self.banned_token_ids,
        )
        result.logprobs = {trained[k]: logprobs for k, logprobs in result.logprobs.items()}
        return self._apply(result, rate)

    def _apply(self, result: Accumulated, rate: float) -> Update:
        """Clip and step, unless loss or gradient are not finite."""
        limit = self.config.optimizer.grad_clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        failure = ""
        if math.isfinite(result.loss) and math.isfinite(norm):
            set_learning_rate(self._optimizer, rate)
            self._optimizer.step()
            self._skipped_in_a_row = 0
        else:
            failure = f"update skipped: loss {result.loss}, gradient norm {norm}"
            self.skipped_updates += 1
            self._skipped_in_a_row += 1
        self._optimizer.zero_grad(set_to_none=True)
        if self._skipped_in_a_row > self.config.optimizer.max_skipped_steps:
            raise LearnerError(
                f"{self._skipped_in_a_row} updates in a row were not finite (max_skipped_steps = "
                f"{self.config.optimizer.max_skipped_steps}); the last one: {failure}"
            )
        return Update(learning_rate=rate, result=result, grad_norm=norm, failure=failure)

    def _update_metrics(self, updates: Sequence[Update]) -> dict[str, float]:
        metrics = {"optim/lr": updates[-1].learning_rate, "loss/nan_count": float(self.skipped_updates)}
        applied = [update for update in updates if update.grad_norm is not None and not update.failure]
        tokens = sum(len(logprobs) for update in applied for logprobs in update.result.logprobs.values())
        if applied:
            metrics["loss/policy"] = sum(update.result.loss for update in applied) / len(applied)
            metrics["optim/grad_norm"] = sum(update.grad_norm or 0.0 for update in applied) / len(applied)
            for name in applied[0].result.metrics:
                metrics[f"policy/{name}"] = sum(update.result.metrics[name] for update in applied) / tokens
        return metrics


def _exclude(rows: list[Row], part: range, cause: str) -> None:
    """An update that was not applied trained nobody."""
    for i in part:
        if rows[i].status == "trained":
            rows[i] = replace(rows[i], status="excluded", cause=cause)
