"""One sentence that says whether a run learns, computed from the rows of metrics.jsonl and its settings.

Held-out evaluations decide where there are two: success has changed only where the newest 95 % interval and the older
one do not overlap (for two independent samples p < 0.006), so that a swing of chance is no news. Before that the reward
of training decides, by the spread of its steps' means. A low reward alone is never called a collapse, for a curriculum
makes tasks harder: it takes a sign that the policy broke (mismatch KL, entropy) beside it, or a held-out fall to half.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from statistics import fmean, variance
from typing import Any, Literal

from conf.schema import AlertConfig
from rl.monitor.alerts import holds, is_extreme
from rl.monitor.streak import Streak

MIN_STEPS = 3
"""Learner steps without which nothing is said."""
FLAT_STEPS = 30
"""Learner steps without a change that are called flat."""
REWARD_STEPS = 10
"""Steps at the beginning and at the end whose training rewards are compared."""
FALL_STEPS = 3
"""Steps whose mean reward is held against the best of as many in a row."""
STANDARD_ERRORS = 4.0
"""By which mean training rewards must differ: one looks at every step, so that 2 would cry wolf."""
SOLVED = 0.9
"""Solved where the interval of held-out success lies above it."""
FEW_MIXED = 0.2
"""Share of groups with different rewards below which a flat run lacks signal."""
FAQ = "docs/faq.md"

LEARNING_METRICS = (
    *("eval/success", "eval/ci95_low", "eval/ci95_high", "reward/mean", "policy/mismatch_kl/mean"),
    *("policy/mismatch_kl/lag/0", "policy/entropy", "group/frac_mixed", "group/frac_all_good", "env/error_ratio"),
)
"""What the verdict is made of, beside "kind" and "step"."""

State = Literal["unknown", "learning", "flat", "collapsed", "solved", "nothing to learn from", "environment failing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictSettings:
    """What verdicts need of a run's settings."""

    lr: float = 0.0
    """learner.optimizer.lr"""
    max_staleness: int = 0
    """rollout.max_staleness"""
    alerts: AlertConfig = field(default_factory=AlertConfig)
    """Limits; 0 = that sign is not looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningVerdict:
    """Whether a run learns.

    Example: lr 0.3, mismatch KL 9.5 at step 2, held-out success 0.43 then 0.00 -> state "collapsed", first_bad_step 2,
    setting "learner.optimizer.lr", link "docs/faq.md#collapsed".
    """

    state: State
    sentence: str
    """For people: the state, where it began, the numbers, the likely setting and the link."""
    first_bad_step: int | None = None
    """Learner step at which the trouble began; None where there is none, or no step stands out."""
    setting: str = ""
    """The likely one; "" where there is nothing to mend."""
    link: str = ""
    """Entry of the FAQ; "" for "unknown"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trouble:
    """A sign that the policy broke."""

    first_step: int
    what: str
    """Example: "mismatch KL 9.51 (limit 0.03)"."""
    setting: str
    why: str
    """Example: "the learning rate"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Evaluation:
    step: int
    success: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.success:.3f} (95% {self.low:.3f} to {self.high:.3f}) at step {self.step}"


def judge_learning(rows: Iterable[Mapping[str, Any]], settings: VerdictSettings) -> LearningVerdict:
    """`rows`: of metrics.jsonl, all of them and in order."""
    judge = LearningJudge(settings)
    for row in rows:
        judge.add(row)
    return judge.verdict()


class LearningJudge:
    """The same row by row; what it keeps does not grow with the steps but by evaluations and periods of trouble."""

    def __init__(self, settings: VerdictSettings) -> None:
        self._settings = settings
        self._num_steps = 0
        self._step = 0
        self._evaluations: list[_Evaluation] = []
        self._first_rewards: list[float] = []
        self._last_rewards: deque[float] = deque(maxlen=REWARD_STEPS)
        self._best = (float("-inf"), 0)
        """Mean reward of the best FALL_STEPS steps in a row, and the first of them."""
        self._mixed: deque[float] = deque(maxlen=FLAT_STEPS)
        self._row: dict[str, float] = {}
        self._kl, self._entropy = Streak(), Streak()
        self._no_signal, self._env_errors = Streak(), Streak()
        self._first_values: dict[str, float] = {}
        self._troubles: list[_Trouble] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl; a value that is no number counts as missing."""
        step = _number(row, "step")
        if row.get("kind") == "evaluation":
            found = [_number(row, f"eval/{name}") for name in ("success", "ci95_low", "ci95_high")]
            if step is not None and None not in found:
                success, low, high = (value or 0.0 for value in found)
                self._evaluations.append(_Evaluation(step=int(step), success=success, low=low, high=high))
        elif row.get("kind") == "step" and step is not None:
            self._num_steps += 1
            self._step = int(step)
            self._add_rewards(row)
            self._add_signs(row)

    def verdict(self) -> LearningVerdict:
        """The first that holds: environment failing (unless solved), collapsed, solved, nothing to learn from, ..."""
        if self._num_steps < MIN_STEPS:
            told = f"no learning verdict yet: {self._num_steps} of the {MIN_STEPS} learner steps it needs"
            return LearningVerdict(state="unknown", sentence=told)
        solved = self._solved()
        return (
            (None if solved else self._environment_failing())
            or self._collapsed()
            or solved
            or self._nothing_to_learn_from()
            or self._learning_or_flat()
        )

    # --- what rows tell ---------------------------------------------------------------------------------------------

    def _add_rewards(self, row: Mapping[str, Any]) -> None:
        reward = _number(row, "reward/mean")
        if reward is None:
            return
        if len(self._first_rewards) < REWARD_STEPS:
            self._first_rewards.append(reward)
        self._last_rewards.append(reward)
        if len(self._last_rewards) >= FALL_STEPS:
            self._best = max(self._best, (self._recent_reward(), self._step - FALL_STEPS + 1), key=lambda pair: pair[0])

    def _add_signs(self, row: Mapping[str, Any]) -> None:
        alerts = self._settings.alerts
        self._add_sign(row, "policy/mismatch_kl/mean", self._kl, alerts.mismatch_kl)
        self._add_sign(row, "policy/entropy", self._entropy, alerts.entropy_floor)
        mixed, errors = _number(row, "group/frac_mixed"), _number(row, "env/error_ratio")
        if mixed is not None:
            self._mixed.append(mixed)
            self._no_signal.add(mixed <= 0.0, self._step)
        if errors is not None:
            self._env_errors.add(errors > alerts.env_error_ratio, self._step)
        told = {name: _number(row, name) for name in ("env/error_ratio", "group/frac_all_good")}
        self._row |= {name: value for name, value in told.items() if value is not None}

    def _add_sign(self, row: Mapping[str, Any], metric: str, streak: Streak, limit: float) -> None:
        value, least = _number(row, metric), self._settings.alerts.steps
        if value is None or not limit:  # what a step does not tell changes nothing
            return
        compare = "above" if streak is self._kl else "below"
        calm = streak.length <= 0
        length = streak.add(holds(compare, value, limit), self._step)
        if length > 0 and calm:
            self._first_values[metric] = value
        known = any(trouble.first_step == streak.first_step and metric in trouble.what for trouble in self._troubles)
        if length > 0 and not known and (length >= least or is_extreme(compare, value, limit)):
            first = self._first_values[metric]
            at_lag_0 = _number(row, "policy/mismatch_kl/lag/0")
            numerics = streak is self._kl and at_lag_0 is not None and at_lag_0 > limit
            self._troubles.append(
                _Trouble(
                    first_step=streak.first_step,
                    what=f"{metric} {first:.3g} (limit {limit:g})",
                    setting="engine" if numerics else "learner.optimizer.lr",
                    why="numerics, for it differs at lag 0 too: shoal doctor --engine" if numerics else self._rate(),
                )
            )

    def _rate(self) -> str:
        return f"the learning rate, learner.optimizer.lr={self._settings.lr:g}"

    def _recent_reward(self) -> float:
        return fmean(list(self._last_rewards)[-FALL_STEPS:])

    # --- what follows -----------------------------------------------------------------------------------------------

    def _environment_failing(self) -> LearningVerdict | None:
        alerts = self._settings.alerts
        if not alerts.env_error_ratio or self._env_errors.length < alerts.steps:
            return None
        ratio = self._row["env/error_ratio"]
        return _bad(
            "environment failing",
            self._env_errors.first_step,
            f"environments fail {ratio:.0%} of the episodes (limit {alerts.env_error_ratio:.0%})",
            setting="env",
            why="the environment's own code or env.kwargs: shoal show RUN --traj N prints the traceback",
        )

    def _collapsed(self) -> LearningVerdict | None:
        fall = self._fall_of_success() or self._fall_of_reward()
        if fall is None:
            return None
        since, step, told, proven = fall
        troubles = sorted((t for t in self._troubles if t.first_step >= since), key=lambda t: t.first_step)
        if not troubles:
            if not proven:
                return None
            return _bad("collapsed", step, told, setting="learner.optimizer.lr", why=self._rate())
        first = troubles[0]
        return _bad("collapsed", first.first_step, f"{told}, {first.what}", setting=first.setting, why=first.why)

    def _fall_of_success(self) -> tuple[int, int, str, bool] | None:
        """(step of the best evaluation, first step that is below it, numbers, whether it needs no other sign)"""
        if len(self._evaluations) < 2:
            return None
        newest, best = self._evaluations[-1], max(self._evaluations, key=lambda e: e.low)
        if newest.high >= best.low:
            return None
        below = next(e for e in self._evaluations if e.step > best.step and e.high < best.low)
        told = f"held-out success {best.success:.3f} at step {best.step}, {newest}"
        return best.step, below.step, told, newest.success < best.success / 2

    def _fall_of_reward(self) -> tuple[int, int, str, bool] | None:
        """As above, of training; never enough by itself."""
        best, since = self._best
        if len(self._last_rewards) < FALL_STEPS or (now := self._recent_reward()) >= best - abs(best) / 2:
            return None
        if self._evaluations and self._evaluations[-1].step >= self._step:  # the newer word has the evaluation
            return None
        return since, self._step, f"training reward {best:.3f}, now {now:.3f}", False

    def _solved(self) -> LearningVerdict | None:
        if not self._evaluations or self._evaluations[-1].low < SOLVED:
            return None
        if self._collapsed() is not None:
            return None
        told = f"solved: held-out success {self._evaluations[-1]}"
        if len(self._evaluations) > 1:
            told += f", {self._evaluations[0].success:.3f} at step {self._evaluations[0].step}"
        return LearningVerdict(state="solved", sentence=told, link=f"{FAQ}#solved")

    def _nothing_to_learn_from(self) -> LearningVerdict | None:
        least = self._settings.alerts.zero_variance_steps
        if not least or self._no_signal.length < least:
            return None
        right = self._row.get("group/frac_all_good", 0.0) > 0.5
        return _bad(
            "nothing to learn from",
            self._no_signal.first_step,
            f"every group of {self._no_signal.length} steps has equal rewards, {'high' if right else 'low'} ones",
            setting="env.level",
            why="a level too easy, env.level" if right else "a level too hard, env.level, or no warm start (shoal sft)",
        )

    def _learning_or_flat(self) -> LearningVerdict:
        if len(self._evaluations) >= 2:
            first, newest = self._evaluations[0], self._evaluations[-1]
            told, change = (
                f"held-out success {first.success:.3f} at step {first.step}, {newest}",
                newest.low - first.high,
            )
        else:
            told, change = self._change_of_reward()
        if change is not None and change > 0:
            return LearningVerdict(state="learning", sentence=f"learning: {told}", link=f"{FAQ}#learning")
        if change is None or self._num_steps < FLAT_STEPS:
            return LearningVerdict(state="unknown", sentence=f"no learning verdict yet: {told}")
        few = len(self._mixed) > 0 and fmean(self._mixed) < FEW_MIXED
        why = f"too few groups with different rewards ({fmean(self._mixed):.0%}): env.level" if few else self._rate()
        setting = "env.level" if few else "learner.optimizer.lr"
        return _bad("flat", None, f"{told}: no gain beyond chance", setting=setting, why=why)

    def _change_of_reward(self) -> tuple[str, float | None]:
        """Numbers, and by how much the gain of the training reward passes what chance explains; None: too few steps."""
        if self._num_steps < 2 * REWARD_STEPS or len(self._last_rewards) < REWARD_STEPS:
            return f"{self._num_steps} of {2 * REWARD_STEPS} steps, or a second evaluation", None
        first, last = self._first_rewards, list(self._last_rewards)
        error = sqrt((variance(first) + variance(last)) / REWARD_STEPS)
        told = f"training reward {fmean(first):.3f} in the first {REWARD_STEPS} steps, {fmean(last):.3f} in the last"
        return told, fmean(last) - fmean(first) - STANDARD_ERRORS * error


def _bad(state: State, step: int | None, told: str, *, setting: str, why: str) -> LearningVerdict:
    link = f"{FAQ}#{state.replace(' ', '-')}"
    at = "" if step is None else f" at step {step}" if state == "collapsed" else f" since step {step}"
    return LearningVerdict(
        state=state,
        sentence=f"{state}{at}: {told}; likely {why} ({link})",
        first_bad_step=step,
        setting=setting,
        link=link,
    )


def _number(row: Mapping[str, Any], key: str) -> float | None:
    """None for what is missing or no number: a run's files may be of foreign making."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
