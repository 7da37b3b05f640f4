"""What trackers get of a step beside its numbers: histograms, and one group to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl.algorithm.step_report import RowReport
from rl.runs.transcript import transcript_text
from rollout.record.trajectory import Trajectory, TrajectoryGroup
from rollout.schedule.staleness import staleness

MAX_SAMPLES = 8
"""Trajectories of one table."""
MAX_TEXT_CHARS = 6000
"""Of one conversation."""
NUM_BINS = 32


def step_detail(
    groups: Sequence[TrajectoryGroup], rows: Sequence[RowReport], *, learner_version: int, with_samples: bool
) -> dict[str, Any]:
    """{"histograms": {name: {"counts": [B], "edges": [B + 1]}}, "samples": [one mapping per trajectory]}.

    Histograms "hist/staleness" and "hist/ratio" (exp(learner - rollout), as far as the learner computed it) are of
    sampled tokens, "hist/length" is tokens of whole conversations. `learner_version`: at the start of the step.
    """
    fates = {row.trajectory_id: row for row in rows}
    trajectories = [t for group in groups for t in group.trajectories if t.is_trainable]
    values: dict[str, list[np.ndarray]] = {"staleness": [], "ratio": [], "length": []}
    for t in trajectories:
        sampled = t.loss_mask == 1
        values["staleness"].append(learner_version - t.policy_versions[sampled])
        values["length"].append(np.array([len(t.token_ids)]))
        logprobs = fates[t.trajectory_id].learner_logprobs
        if logprobs is not None:
            values["ratio"].append(np.exp(np.clip(logprobs[sampled] - t.rollout_logprobs[sampled], -20.0, 20.0)))
    found = {f"hist/{name}": _histogram(np.concatenate(parts)) for name, parts in values.items() if parts}
    samples = _samples(groups, fates, learner_version) if with_samples else []
    return {"histograms": found, "samples": samples}


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Bins of whole numbers are one wide as far as they are few; numbers that hardly differ share one bin."""
    if values.dtype.kind == "i" and values.max() - values.min() < NUM_BINS:
        edges = np.arange(values.min(), values.max() + 2) - 0.5
        counts, edges = np.histogram(values, bins=edges)
    else:
        finite = values[np.isfinite(values)].astype(np.float64)
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        least = 1e-6 * max(1.0, abs(low), abs(high))  # numpy refuses bins that rounding would make empty
        alike = high - low < least
        span = (low - least, high + least) if alike else (low, high)
        counts, edges = np.histogram(finite, bins=1 if alike else NUM_BINS, range=span)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _samples(
    groups: Sequence[TrajectoryGroup], fates: Mapping[str, RowReport], learner_version: int
) -> list[dict[str, Any]]:
    """Members of the group whose rewards differ most: what the step learned from, side by side."""

    def spread(group: TrajectoryGroup) -> float:
        rewards = [reward for reward in group.rewards if reward is not None]
        return max(rewards) - min(rewards) if rewards else -1.0

    chosen = max(groups, key=spread).trajectories[:MAX_SAMPLES]
    return [_sample(t, fates[t.trajectory_id].advantage, learner_version) for t in chosen]


def _sample(t: Trajectory, advantage: float | None, learner_version: int) -> dict[str, Any]:
    return {
        "id": t.trajectory_id,
        "env": t.task.env_name,
        "level": t.task.level,
        "reward": t.reward,
        "advantage": advantage,
        "staleness": staleness(learner_version=learner_version, sampled_version=t.min_policy_version)
        if t.loss_mask.any()
        else None,
        "stop_reason": str(t.stop_reason),
        "turns": t.num_turns,
        "tokens": len(t.token_ids),
        "text": transcript_text(t)[:MAX_TEXT_CHARS],
    }
