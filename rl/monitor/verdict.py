"""What a run says about itself in two sentences: whether it learns, then what limits its speed. Everywhere the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.keys import lookup
from conf.schema import AlertConfig, TrainConfig
from rl.monitor.learning_verdict import LearningVerdict, VerdictSettings, judge_learning
from rl.monitor.throughput_verdict import ThroughputVerdict, judge_throughput

LIMITS = ("steps", "mismatch_kl", "entropy_floor", "zero_variance_steps", "env_error_ratio")
"""Of `monitor.alerts`: those that the learning verdict looks at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunVerdict:
    """Both verdicts on a run."""

    learning: LearningVerdict
    throughput: ThroughputVerdict

    @property
    def lines(self) -> tuple[str, str]:
        """What every reader prints, in this order."""
        return self.learning.sentence, self.throughput.sentence


def judge(rows: Sequence[Mapping[str, Any]], settings: VerdictSettings) -> RunVerdict:
    """`rows`: of metrics.jsonl, all of them and in order."""
    return RunVerdict(
        learning=judge_learning(rows, settings),
        throughput=judge_throughput(rows, max_staleness=settings.max_staleness),
    )


def settings_of_config(config: TrainConfig) -> VerdictSettings:
    keys = ("learner.optimizer.lr", "rollout.max_staleness", *(f"monitor.alerts.{name}" for name in LIMITS))
    return verdict_settings({key: lookup(config, key) for key in keys})


def verdict_settings(settings: Mapping[str, Any]) -> VerdictSettings:
    """Out of a config.yaml by full names, {"learner.optimizer.lr": 0.003, ...}; what is missing or no number keeps
    its default, for a run of an older version is judged too."""

    def number(key: str, default: float) -> float:
        value = settings.get(key, default)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else default

    defaults = AlertConfig()
    limits = {name: number(f"monitor.alerts.{name}", getattr(defaults, name)) for name in LIMITS}
    return VerdictSettings(
        lr=float(number("learner.optimizer.lr", 0.0)),
        max_staleness=int(number("rollout.max_staleness", 0)),
        alerts=AlertConfig(
            steps=int(limits["steps"]),
            mismatch_kl=float(limits["mismatch_kl"]),
            entropy_floor=float(limits["entropy_floor"]),
            zero_variance_steps=int(limits["zero_variance_steps"]),
            env_error_ratio=float(limits["env_error_ratio"]),
        ),
    )
