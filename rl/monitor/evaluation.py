"""What an evaluation found: shares of solved held-out tasks with their interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rollout.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What one evaluation found.

    Example: 950 of 1000 solved -> success 0.95, ci95 (0.935, 0.962).
    """

    step: int
    policy_version: int
    success: float
    """Share of episodes with reward >= 1."""
    ci95: tuple[float, float]
    """Wilson score interval of `success`."""
    n: int
    """Episodes with a reward; failed ones are counted in `errors` and never as wrong answers."""
    errors: int
    reward: float
    """Mean reward."""
    turns: float
    tool_calls: float
    """Mean calls per episode."""
    facts: dict[str, float] = field(default_factory=dict)
    """Shares by fact: "call_rate/needed", "success/unneeded" and their like where the environment says whether a tool
    was needed; "success/level_5" where the tasks are of several levels."""


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); (0, 1) for n = 0."""
    if n == 0:
        return (0.0, 1.0)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, centre - half), min(1.0, centre + half))


def is_success(trajectory: Trajectory) -> bool:
    return trajectory.reward is not None and trajectory.reward >= 1 - 1e-6


def summarise(trajectories: Sequence[Trajectory], *, step: int, policy_version: int) -> Evaluation:
    """Raises RuntimeError if any token came from another version: an evaluation must not mix them (pitfalls C3)."""
    for trajectory in trajectories:
        sampled = set(trajectory.policy_versions[trajectory.loss_mask == 1].tolist())
        if sampled - {policy_version}:
            raise RuntimeError(
                f"evaluation of version {policy_version} holds tokens of {sorted(sampled)} ({trajectory.trajectory_id})"
            )
    scored = [t for t in trajectories if t.reward is not None]
    wins = sum(is_success(t) for t in scored)
    n = len(scored)
    return Evaluation(
        step=step,
        policy_version=policy_version,
        success=wins / max(n, 1),
        ci95=wilson(wins, n),
        n=n,
        errors=len(trajectories) - n,
        reward=sum(t.reward or 0.0 for t in scored) / max(n, 1),
        turns=sum(t.num_turns for t in scored) / max(n, 1),
        tool_calls=_mean([float(t.meta.get("num_tool_calls", 0)) for t in scored]),
        facts=_need_facts(scored) | _level_facts(scored),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _need_facts(scored: Sequence[Trajectory]) -> dict[str, float]:
    facts: dict[str, float] = {}
    for needed, name in ((True, "needed"), (False, "unneeded")):
        rows = [t for t in scored if t.meta.get("needs_tool") is needed]
        if rows:
            facts[f"call_rate/{name}"] = _mean([float(t.meta.get("num_tool_calls", 0) > 0) for t in rows])
            facts[f"success/{name}"] = _mean([float(is_success(t)) for t in rows])
    return facts if "call_rate/unneeded" in facts else {}


def _level_facts(scored: Sequence[Trajectory]) -> dict[str, float]:
    levels = sorted({t.task.level for t in scored})
    if len(levels) < 2:
        return {}
    return {f"success/level_{n}": _mean([float(is_success(t)) for t in scored if t.task.level == n]) for n in levels}
