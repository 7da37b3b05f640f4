"""Rules that tell a run is in trouble, as data; thresholds are settings (`monitor.alerts`), 0 switches a rule off.

An episode of trouble begins when a rule's condition has held for its number of learner steps in a row and ends when it
has been false for as many: one alert is raised and one cleared, however often the value crosses the threshold between.
A value a hundred times over its threshold is raised at once. A value that is there but not finite counts as trouble; a
metric that a step does not tell changes nothing: its streak is kept.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from conf.schema import AlertConfig, TrainConfig
from rl.monitor.streak import Streak

HISTORY_STEPS = 50
"""Learner steps that a median is taken over."""
MIN_HISTORY = 10
"""Steps before anything is compared with a median."""
EXTREME = 100.0
"""Times its threshold at which a value is trouble at once."""

Level = Literal["warn", "error"]
Compare = Literal["above", "below", "at_most"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """When a metric of learner steps is trouble."""

    name: str
    metric: str
    compare: Compare
    threshold: Callable[[AlertConfig, TrainConfig], float | None]
    """None = the rule is off."""
    steps: Callable[[AlertConfig], int]
    """Steps in a row that make an episode of trouble."""
    text: str
    """What is wrong and what to look at; {value} and {threshold} are put in."""
    level: Level = "warn"
    of_median: bool = False
    """The threshold is times the metric's median over the steps before."""
    least_median: Callable[[TrainConfig], float] = lambda config: 0.0
    """With `of_median`: a smaller median counts as this."""
    only_if: str = ""
    """Another metric that must be over 0; "" = none."""


def _on(value: float) -> float | None:
    return value or None


RULES: tuple[Rule, ...] = (
    Rule(
        name="staleness_violation",
        metric="off_policy/lag/max",
        compare="above",
        threshold=lambda alerts, config: config.rollout.max_staleness * config.learner.updates_per_step,
        steps=lambda alerts: 1,
        text="trained on data {value:g} versions old, allowed are {threshold:g}: this is a bug",
        level="error",
    ),
    Rule(
        name="mismatch_kl",
        metric="policy/mismatch_kl/mean",
        compare="above",
        threshold=lambda alerts, config: _on(alerts.mismatch_kl),
        steps=lambda alerts: alerts.steps,
        text="learner and rollouts disagree: mismatch KL {value:.3g} > {threshold:g}; "
        "policy/mismatch_kl/lag/0 tells numerics from staleness",
    ),
    Rule(
        name="entropy_floor",
        metric="policy/entropy",
        compare="below",
        threshold=lambda alerts, config: _on(alerts.entropy_floor),
        steps=lambda alerts: alerts.steps,
        text="entropy {value:.3g} < {threshold:g} nats: the policy has stopped exploring",
    ),
    Rule(
        name="grad_spike",
        metric="optim/grad_norm",
        compare="above",
        threshold=lambda alerts, config: _on(alerts.grad_spike),
        steps=lambda alerts: 1,
        text="gradient norm {value:.3g} is over {threshold:.3g}, a multiple of its median and of the clip",
        of_median=True,
        # a policy that has learned its task has gradients near 0, and any mistake is many times their median
        least_median=lambda config: config.learner.optimizer.grad_clip,
    ),
    Rule(
        name="zero_variance",
        metric="group/frac_mixed",
        compare="at_most",
        threshold=lambda alerts, config: 0.0 if alerts.zero_variance_steps else None,
        steps=lambda alerts: alerts.zero_variance_steps,
        text="no group has different rewards: nothing to learn from; change the level, the reward or the temperature",
    ),
    Rule(
        name="env_errors",
        metric="env/error_ratio",
        compare="above",
        threshold=lambda alerts, config: _on(alerts.env_error_ratio),
        steps=lambda alerts: alerts.steps,
        text="environments fail {value:.0%} of the episodes (> {threshold:.0%}); "
        "shoal show RUN --traj N prints the traceback",
    ),
    Rule(
        name="no_tool_calls",
        metric="tool/calls_mean",
        compare="at_most",
        threshold=lambda alerts, config: 0.0 if alerts.no_tool_steps else None,
        steps=lambda alerts: alerts.no_tool_steps,
        text="no episode calls a tool although tools are offered",
        only_if="tool/offered",
    ),
)
NO_HEARTBEAT = "no_heartbeat"
NO_STEP = "no_step"
FAILED_RUN_RULES = {"StalenessViolation": "staleness_violation"}
"""Errors that end a run before a metric could show them -> their rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """The begin or the end of an episode of trouble."""

    rule: str
    state: Literal["raised", "cleared"]
    level: Level
    text: str
    step: int
    """Learner steps done by then."""
    value: float | None = None
    """None where it is not finite or there is none."""
    threshold: float | None = None

    def fields(self) -> dict[str, Any]:
        """For an event of kind "alert"."""
        return asdict(self)


class Alerts:
    """Watches one run.

    Example: alerts.step({"step": 7, "group/frac_mixed": 0.0, ...}) -> [Alert(rule="zero_variance", state="raised")]
    at the tenth such step, [] before and after, and one with state "cleared" ten steps after the last.
    """

    def __init__(self, config: TrainConfig, *, now_s: float, active: Iterable[str] = ()) -> None:
        """`active`: rules in trouble when an earlier process of the run ended."""
        self._config = config
        self._active = dict.fromkeys(active, "")
        self._streaks = {rule.name: Streak() for rule in RULES}
        self._history: dict[str, deque[float]] = {
            rule.metric: deque(maxlen=HISTORY_STEPS) for rule in RULES if rule.of_median
        }
        self._step_times: deque[float] = deque(maxlen=HISTORY_STEPS)
        self._last_step_s = now_s
        self._step = 0

    @property
    def active(self) -> tuple[str, ...]:
        """Rules in trouble, in the order they were raised."""
        return tuple(self._active)

    def step(self, row: Mapping[str, Any], now_s: float) -> list[Alert]:
        """Judge a row of metrics.jsonl of kind "step"."""
        self._step = row["step"]
        if row.get("time/step"):
            self._step_times.append(row["time/step"])
        self._last_step_s = now_s
        return [*self._judge_rules(row), *self._judge_step_time(now_s)]

    def tick(self, now_s: float, heartbeat_ages_s: Mapping[str, float]) -> list[Alert]:
        """Judge what no step tells. `heartbeat_ages_s`: worker -> seconds since it was last heard of."""
        return [*self._judge_heartbeats(heartbeat_ages_s), *self._judge_step_time(now_s)]

    def run_failed(self, error: str) -> list[Alert]:
        """The run ends with `error`, "Type: message"."""
        name = FAILED_RUN_RULES.get(error.partition(":")[0], "run_failed")
        return self._change(name, True, text=error, level="error")

    def _judge_rules(self, row: Mapping[str, Any]) -> list[Alert]:
        found = []
        for rule in RULES:
            if rule.metric not in row or (rule.only_if and not row.get(rule.only_if)):
                continue
            value, threshold = row[rule.metric], self._threshold(rule)
            if threshold is not None:
                trouble = value is None or holds(rule.compare, value, threshold)
                extreme = value is not None and is_extreme(rule.compare, value, threshold)
                if self._lasts(rule, trouble) or extreme:
                    shown = rule.text.format(value=float("nan") if value is None else value, threshold=threshold)
                    found += self._change(
                        rule.name, trouble, text=shown, level=rule.level, value=value, threshold=threshold
                    )
            if rule.of_median and value is not None:
                self._history[rule.metric].append(value)
        return found

    def _threshold(self, rule: Rule) -> float | None:
        threshold = rule.threshold(self._config.monitor.alerts, self._config)
        if not rule.of_median or threshold is None:
            return threshold
        past = self._history[rule.metric]
        return threshold * max(median(past), rule.least_median(self._config)) if len(past) >= MIN_HISTORY else None

    def _lasts(self, rule: Rule, trouble: bool) -> bool:
        """Whether the condition has been as it is now for the rule's number of steps."""
        length = self._streaks[rule.name].add(trouble, self._step)
        return abs(length) >= rule.steps(self._config.monitor.alerts)

    def _judge_heartbeats(self, ages_s: Mapping[str, float]) -> list[Alert]:
        limit = self._config.monitor.alerts.heartbeat_s
        if not limit or not ages_s:
            return []
        worker = max(ages_s, key=lambda name: ages_s[name])
        text = f"{worker} has been silent for {ages_s[worker]:.0f} s (limit {limit:g} s)"
        trouble = ages_s[worker] > limit
        return self._change(NO_HEARTBEAT, trouble, text=text, level="error", value=ages_s[worker], threshold=limit)

    def _judge_step_time(self, now_s: float) -> list[Alert]:
        alerts = self._config.monitor.alerts
        if not alerts.no_step or len(self._step_times) < MIN_HISTORY:
            return []
        limit = max(alerts.no_step * median(self._step_times), alerts.no_step_min_s)
        waited_s = now_s - self._last_step_s
        text = f"no learner step for {waited_s:.0f} s; the limit of {limit:.0f} s follows from the usual step"
        return self._change(NO_STEP, waited_s > limit, text=text, level="warn", value=waited_s, threshold=limit)

    def _change(
        self,
        name: str,
        trouble: bool,
        *,
        text: str,
        level: Level,
        value: float | None = None,
        threshold: float | None = None,
    ) -> list[Alert]:
        if trouble == (name in self._active):
            return []
        if trouble:
            self._active[name] = text
        else:
            text = f"over: {self._active.pop(name) or name}"
        state: Literal["raised", "cleared"] = "raised" if trouble else "cleared"
        alert = Alert(rule=name, state=state, level=level, text=text, step=self._step, value=value, threshold=threshold)
        return [alert]


def active_alerts(events: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Rule -> its event, of rules raised and not cleared, from rows of events.jsonl."""
    active: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event["kind"] == "alert":
            if event["state"] == "raised":
                active[event["rule"]] = event
            else:
                active.pop(event["rule"], None)
        elif event["kind"] == "resumed":  # the failure of an earlier process is over
            active.pop("run_failed", None)
    return active


def holds(compare: Compare, value: float, threshold: float) -> bool:
    """Whether a value is trouble."""
    if compare == "above":
        return value > threshold
    return value < threshold if compare == "below" else value <= threshold


def is_extreme(compare: Compare, value: float, threshold: float) -> bool:
    """Whether a value is so far over its threshold that one step tells. Example: is_extreme("above", 3.0, 0.03)"""
    if threshold <= 0:
        return False
    if compare == "above":
        return value >= EXTREME * threshold
    return compare == "below" and value <= threshold / EXTREME


def rule_names() -> Sequence[str]:
    """All that `Alert.rule` may be."""
    return (*(rule.name for rule in RULES), NO_HEARTBEAT, NO_STEP, "run_failed")
