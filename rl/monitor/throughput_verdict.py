"""One sentence that says what limits the speed of a run, computed from the rows of metrics.jsonl and nothing else.

Ratios are sums of seconds over sums of seconds: a mean of ratios would count a short step as much as a long one. A
share that no row tells is None, and no sentence rests on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

WINDOW_STEPS = 20
"""Newest learner steps that a verdict looks at."""
MIN_STEPS = 3
WORTH_SAYING = 0.15
"""Share of the time from which a part is called what limits the run."""
MOSTLY = 0.6

Limit = Literal[
    "unknown",
    "rollout",
    "staleness",
    "environment",
    "evaluation",
    "learner",
    "sync",
    "checkpoint",
    "records",
    "balanced",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ThroughputVerdict:
    """What limits the speed of a run, and the numbers it was judged by.

    Example: steps of 10 s of which the learner waited 5.7 s, engines busy 9 s of each -> limit "rollout", sentence
    "rollout-bound: the learner waits 57% of the time; add workers or raise max_staleness".
    """

    limit: Limit
    sentence: str
    num_steps: int
    """Learner steps that it rests on."""
    learner_idle: float | None = None
    """Share of the time that the learner waited for groups while no evaluation kept the workers from making them."""
    evaluation: float | None = None
    """Share of the time that it waited while workers evaluated."""
    rollout_idle: float | None = None
    """Share of the time that engines took no model step, mean over workers."""
    env_share: float | None = None
    """Share of an episode's time that it waited for its environment."""
    sync: float | None = None
    """Share of the time that the learner made snapshots."""
    checkpoint: float | None = None
    other: float | None = None
    """Share of the time that went into the learner's transport and the run's own records."""
    queue_age_s: float | None = None
    """Mean over steps of the longest wait of a finished group."""
    staleness: float | None = None
    """Mean staleness of what was trained, in policy versions."""


def judge_throughput(rows: Sequence[Mapping[str, Any]], *, max_staleness: int) -> ThroughputVerdict:
    """`rows`: of metrics.jsonl, in order; those of evaluations are passed over."""
    steps = [row for row in rows if row["kind"] == "step" and _number(row, "time/step")][-WINDOW_STEPS:]
    if len(steps) < MIN_STEPS:
        sentence = f"no verdict yet: {len(steps)} of the {MIN_STEPS} learner steps it needs"
        return ThroughputVerdict(limit="unknown", sentence=sentence, num_steps=len(steps))
    # busy 0: no heartbeat told it yet, for engines that made these groups were busy
    busy = _share(steps, "rollout/busy_s", "time/step")
    waits, evaluation = (_share(steps, f"time/wait_for_{what}", "time/step") for what in ("batch", "evaluation"))
    shares = {
        "learner_idle": None if waits is None else waits - (evaluation or 0.0),
        "evaluation": evaluation,
        "rollout_idle": None if not busy else min(max(1.0 - busy, 0.0), 1.0),
        "env_share": _share(steps, "rollout/env_s/mean", "rollout/episode_s/mean"),
        "sync": _share(steps, "time/sync", "time/step"),
        "checkpoint": _share(steps, "time/checkpoint", "time/step"),
        "other": _share(steps, "time/other", "time/step"),
        "queue_age_s": _mean(steps, "queue/oldest_age_s"),
        "staleness": _mean(steps, "off_policy/lag/mean"),
    }
    limit, sentence = _sentence(shares, max_staleness)
    return ThroughputVerdict(limit=limit, sentence=sentence, num_steps=len(steps), **shares)


def _sentence(shares: Mapping[str, float | None], max_staleness: int) -> tuple[Limit, str]:
    """The largest part of the learner's time that is not learning decides; if none is large, what the engines do."""
    not_learning = {name: shares[name] or 0.0 for name in ("learner_idle", "evaluation", "checkpoint", "sync", "other")}
    worst = max(not_learning, key=lambda name: not_learning[name])
    share = not_learning[worst]
    if share < WORTH_SAYING:
        return _learner_is_busy(shares, max_staleness)
    if worst == "evaluation":
        return "evaluation", (
            f"evaluation-bound: the learner waits {share:.0%} of the time for evaluations; "
            "raise evaluation.every or lower evaluation.tasks"
        )
    if worst == "checkpoint":
        return "checkpoint", f"checkpoint-bound: checkpoints take {share:.0%} of the time; raise run.checkpoint_every"
    if worst == "sync":
        return "sync", f"sync-bound: snapshots of weights take {share:.0%} of the time; raise learner.publish_every"
    if worst == "other":
        return "records", (
            f"record-bound: {share:.0%} of the time goes into moving groups and writing records; "
            "make steps larger or put run.root on a faster disk"
        )
    return _learner_waits(share, shares, max_staleness)


def _learner_waits(waits: float, shares: Mapping[str, float | None], max_staleness: int) -> tuple[Limit, str]:
    seen = f"the learner waits {waits:.0%} of the time"
    idle, env = shares["rollout_idle"], shares["env_share"]
    if env is not None and env >= MOSTLY and (idle is None or idle >= WORTH_SAYING):
        return "environment", (
            f"environment-bound: {seen} and episodes wait {env:.0%} of theirs for tools; "
            "add rollout.env_pools, make tools faster or raise max_staleness"
        )
    if max_staleness == 0:
        return "staleness", f"synchronous: {seen}, for max_staleness=0 samples only while it waits; raise max_staleness"
    if idle is not None and idle >= MOSTLY:
        return "staleness", f"slot-bound: {seen} while engines idle {idle:.0%} of it; raise max_staleness"
    return "rollout", f"rollout-bound: {seen}; add workers or raise max_staleness"


def _learner_is_busy(shares: Mapping[str, float | None], max_staleness: int) -> tuple[Limit, str]:
    idle, age, lag = shares["rollout_idle"], shares["queue_age_s"], shares["staleness"]
    if idle is None or idle < WORTH_SAYING:
        return "balanced", f"balanced: the learner waits {shares['learner_idle'] or 0.0:.0%} of the time"
    advice = "fewer workers would do"
    if max_staleness > 1 and lag is not None and lag > max_staleness / 2:
        advice += f", and a lower max_staleness would train on fresher data (staleness is {lag:.1f} of {max_staleness})"
    waits = "" if not age else f" and finished groups wait {age:.1f} s"
    return "learner", f"learner-bound: engines idle {idle:.0%} of the time{waits}; {advice}, or give the learner more"


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value = row.get(key)
    return None if value is None else float(value)


def _share(rows: Sequence[Mapping[str, Any]], part: str, whole: str) -> float | None:
    """Sum of `part` / sum of `whole` over the rows that tell both; None where none does or the whole is 0."""
    pairs = [(_number(row, part), _number(row, whole)) for row in rows]
    told = [(a, b) for a, b in pairs if a is not None and b is not None]
    total = sum(b for _, b in told)
    return sum(a for a, _ in told) / total if total > 0 else None


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for row in rows if (value := _number(row, key)) is not None]
    return sum(values) / len(values) if values else None
