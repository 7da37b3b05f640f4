"""What a learner step tells: one report per trajectory, and the metrics of the step.

Names never change silently: dashboards and alerts go by them. Every mean over trajectories is over those with a valid
reward; ratios and counts are over all that arrived. Everything can be computed again from stored rows.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rl.algorithm.advantage import EQUAL
from rollout.record.trajectory import StopReason, TrajectoryGroup
from rollout.schedule.staleness import staleness

if TYPE_CHECKING:  # reports reach processes that have no use for torch
    from rl.algorithm.batch import Row, RowStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReport:
    """What became of one trajectory."""

    trajectory_id: str
    advantage: float | None
    """None where the row has no part in its group's statistics."""
    learner_logprobs: np.ndarray | None
    """(L,) float32, of the weights at the start of the step, 0 where nothing was sampled; None where the row was never
    computed: no "zero_advantage" row is, but for the self-check of the first step."""
    status: "RowStatus"
    cause: str
    """Why it was not trained; "" for "trained" and "zero_advantage"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerReport:
    """What one learner step did."""

    step: int
    """Steps done, this one included."""
    policy_version: int
    """After the step."""
    metrics: dict[str, float]
    rows: tuple[RowReport, ...]
    """One per trajectory, in the order of the groups."""


def group_metrics(groups: Sequence[TrajectoryGroup], rows: "Sequence[Row]") -> dict[str, float]:
    """Rewards, groups, episodes, tools, errors, rows."""
    valid = [row.trajectory for row in rows if row.is_valid]
    everything = [row.trajectory for row in rows]
    advantages = np.array([row.advantage for row in rows if row.advantage is not None])
    metrics = {
        "reward/mean": _mean(t.reward for t in valid),
        "advantage/mean": float(advantages.mean()) if len(advantages) else 0.0,
        "advantage/std": float(advantages.std()) if len(advantages) else 0.0,
        "episode/turns/mean": _mean(t.num_turns for t in valid),
        "episode/tokens/mean": _mean(len(t.token_ids) for t in valid),
        "tool/calls_mean": _mean(t.meta.get("num_tool_calls", 0) for t in valid),
        "env/error_ratio": _mean(t.stop_reason == StopReason.ENV_ERROR for t in everything),
        **_tool_metrics(rows),
        "trainer/tokens": float(sum(row.trajectory.num_sampled_tokens for row in rows if row.status == "trained")),
    }
    for name in sorted({t.task.env_name for t in valid}):
        metrics[f"reward/{name}/mean"] = _mean(t.reward for t in valid if t.task.env_name == name)
    for part in sorted({part for t in valid for part in t.reward_parts}):
        metrics[f"reward/{part}"] = _mean(t.reward_parts[part] for t in valid if part in t.reward_parts)
    for reason, count in Counter(t.stop_reason for t in everything).items():
        metrics[f"stop/{reason}"] = count / len(everything)
    for status, count in Counter(row.status for row in rows).items():
        metrics[f"rows/{status}"] = float(count)
    return metrics | _group_shares(groups, {row.trajectory.trajectory_id for row in rows if row.is_valid})


def _tool_metrics(rows: "Sequence[Row]") -> dict[str, float]:
    """How tools were used. Over-use and under-use are known where environments say whether a task needs a tool."""
    valid = [row.trajectory for row in rows if row.is_valid]
    calls = sum(t.meta.get("num_tool_calls", 0) for t in valid)
    correct = [t.reward is not None and t.reward >= 1.0 - EQUAL for t in valid]
    called = [t.meta.get("num_tool_calls", 0) > 0 for t in valid]
    needed = [t.meta.get("needs_tool") for t in valid]
    metrics = {
        "tool/offered": _mean(t.meta.get("num_tools", 0) > 0 for t in valid),
        "tool/productivity": sum(correct) / calls if calls else 0.0,
        "tool/error_ratio": sum(t.meta.get("num_tool_errors", 0) for t in valid) / calls if calls else 0.0,
        "tool/cost_share": _share(sum(row.paid for row in rows), sum(t.reward or 0.0 for t in valid)),
    }
    if any(need is not None for need in needed):
        metrics["tool/overuse"] = _mean(c for c, need in zip(called, needed, strict=True) if need is False)
        metrics["tool/underuse"] = _mean(
            not c and not right for c, right, need in zip(called, correct, needed, strict=True) if need is True
        )
    return metrics


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _group_shares(groups: Sequence[TrajectoryGroup], valid_ids: set[str]) -> dict[str, float]:
    """Shares of groups with different rewards, all correct, all equal and not correct; they ignore tool costs."""
    shares: Counter[str] = Counter()
    for group in groups:
        rewards = [t.reward for t in group.trajectories if t.trajectory_id in valid_ids and t.reward is not None]
        if len(rewards) >= 2:
            mixed = max(rewards) - min(rewards) > EQUAL
            shares["mixed" if mixed else "all_good" if min(rewards) >= 1.0 - EQUAL else "all_bad"] += 1
    return {f"group/frac_{kind}": shares[kind] / max(len(groups), 1) for kind in ("mixed", "all_good", "all_bad")}


def staleness_metrics(rows: "Sequence[Row]", policy_version: int) -> dict[str, float]:
    """Lag: version of the learner at the start of the step minus the oldest version in a trajectory."""
    valid = [row.trajectory for row in rows if row.is_valid]
    lags = [staleness(learner_version=policy_version, sampled_version=t.min_policy_version) for t in valid]
    spans = [len(np.unique(t.policy_versions[t.loss_mask == 1])) for t in valid]
    metrics = {
        "off_policy/lag/mean": _mean(lags),
        "off_policy/lag/max": float(max(lags, default=0)),
        "off_policy/versions_per_trajectory": _mean(spans),
    }
    return metrics | {f"off_policy/lag/count/{lag}": float(count) for lag, count in sorted(Counter(lags).items())}


def mismatch_metrics(rows: "Sequence[Row]", scores: Mapping[int, np.ndarray], policy_version: int) -> dict[str, float]:
    """How far the learner, at the start of the step, is from the policies that sampled.

    ratio = exp(learner - rollout) per token; mismatch_kl is its k3 estimate of KL(rollout || learner), ratio - 1 -
    log ratio; ess_ratio = (sum ratio)^2 / (n sum ratio^2) is the share of samples that still count (1 = on-policy).
    Lag 0 shows numerics alone, larger lags also that the policy moved.

    `scores`: index of a row -> learner logprobs of its sampled tokens.
    """
    if not scores:
        return {}
    sampled = {i: rows[i].trajectory.loss_mask == 1 for i in scores}
    log_ratio = np.concatenate([s - rows[i].trajectory.rollout_logprobs[sampled[i]] for i, s in scores.items()])
    lags = policy_version - np.concatenate([rows[i].trajectory.policy_versions[sampled[i]] for i in scores])
    log_ratio = log_ratio.astype(np.float64)
    ratio = np.exp(np.minimum(log_ratio, 50.0))
    k3 = ratio - 1 - log_ratio
    metrics = {
        "policy/mismatch_kl/mean": float(k3.mean()),
        "policy/mismatch_kl/max": float(k3.max()),
        "policy/logprob_abs_diff/mean": float(np.abs(log_ratio).mean()),
        "policy/logprob_abs_diff/max": float(np.abs(log_ratio).max()),
        "policy/importance_ratio/mean": float(ratio.mean()),
        "policy/importance_ratio/max": float(ratio.max()),
        "policy/ess_ratio": float(ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum())),
    }
    return metrics | {f"policy/mismatch_kl/lag/{lag}": float(k3[lags == lag].mean()) for lag in np.unique(lags)}


def replay_metrics(rows: "Sequence[Row]", scores: Mapping[int, np.ndarray]) -> dict[str, float]:
    """Share of the routes of experts, each of a token in a layer, that no engine told: there the learner's router
    decides, and may send the token to other experts than sampling did.

    Counted are the tokens before the last sampled one of each row that was computed: nothing rests on those after it.
    `scores`: index of a row -> learner logprobs of its sampled tokens.
    """
    unknown, tokens = 0.0, 0
    for trajectory in (rows[i].trajectory for i in scores):
        count = int(np.flatnonzero(trajectory.loss_mask)[-1])
        routes = trajectory.routed_experts
        unknown += count if routes is None else float((routes[:count] < 0).any(-1).mean(-1).sum())
        tokens += count
    return {"moe/replay_fallback_ratio": unknown / tokens} if tokens else {}


def row_reports(rows: "Sequence[Row]", scores: Mapping[int, np.ndarray]) -> tuple[RowReport, ...]:
    """`scores`: index of a row -> learner logprobs of its sampled tokens."""
    reports = []
    for i, row in enumerate(rows):
        logprobs = None
        if i in scores:
            logprobs = np.zeros(len(row.trajectory.token_ids), np.float32)
            logprobs[row.trajectory.loss_mask == 1] = scores[i]
        reports.append(
            RowReport(
                trajectory_id=row.trajectory.trajectory_id,
                advantage=row.advantage,
                learner_logprobs=logprobs,
                status=row.status,
                cause=row.cause,
            )
        )
    return tuple(reports)


def _mean(values: Iterable[float | None]) -> float:
    present = [float(value) for value in values if value is not None]
    return sum(present) / len(present) if present else 0.0
