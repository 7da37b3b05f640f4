"""Whether a run learns, in one sentence: from the rows of real runs, and from rows made for each state."""

import re
from pathlib import Path
from typing import Any

import pytest

from rl.monitor.learning_verdict import FLAT_STEPS, LearningVerdict, VerdictSettings, judge_learning
from tests.rl.learning_rows import stored_rows

SETTINGS = VerdictSettings(lr=0.003, max_staleness=2)
FAQ = Path(__file__).parents[2] / "docs" / "faq.md"


def step(number: int, **changes: Any) -> dict[str, Any]:
    names = {"reward": "reward/mean", "kl": "policy/mismatch_kl/mean", "entropy": "policy/entropy",
             "mixed": "group/frac_mixed", "good": "group/frac_all_good", "errors": "env/error_ratio",
             "at_lag_0": "policy/mismatch_kl/lag/0"}  # fmt: skip
    calm = {"reward": 0.4, "kl": 0.001, "entropy": 0.5, "mixed": 0.5, "good": 0.2, "errors": 0.0}
    told = {names[name]: value for name, value in (calm | changes).items()}
    return {"kind": "step", "step": number} | {name: value for name, value in told.items() if value != "absent"}


def evaluation(number: int, success: float, half: float = 0.05) -> dict[str, Any]:
    numbers = {"eval/success": success, "eval/ci95_low": success - half, "eval/ci95_high": success + half}
    return {"kind": "evaluation", "step": number} | numbers


def judged(rows: list[dict[str, Any]]) -> LearningVerdict:
    return judge_learning(rows, SETTINGS)


def test_a_learning_rate_of_0_3_is_called_collapsed_at_the_step_at_which_it_showed_and_named() -> None:  # faults F1
    rows = stored_rows("collapsed")
    found = judge_learning(rows, VerdictSettings(lr=0.3, max_staleness=2))
    assert (found.state, found.first_bad_step, found.setting) == ("collapsed", 2, "learner.optimizer.lr")
    assert found.sentence == (
        "collapsed at step 2: held-out success 0.433 at step 0, 0.000 (95% 0.000 to 0.004) at step 12, "
        "policy/mismatch_kl/mean 11.7 (limit 0.03); likely the learning rate, learner.optimizer.lr=0.3 "
        "(docs/faq.md#collapsed)"
    )


def test_the_collapse_is_told_two_steps_after_rewards_fell_and_before_an_evaluation() -> None:  # faults F1
    rows = stored_rows("collapsed")
    first = next(n for n in range(len(rows)) if judged(rows[: n + 1]).state == "collapsed")
    assert rows[first] == rows[first] | {"kind": "step", "step": 5}  # rewards: 0.44 at step 3, then 0


def test_the_demo_is_learning_then_solved_and_never_anything_worse() -> None:  # faults F1
    rows = stored_rows("demo")
    states = [judged(rows[: n + 1]).state for n in range(len(rows))]
    in_order = [state for n, state in enumerate(states) if n == 0 or states[n - 1] != state]
    assert in_order == ["unknown", "learning", "solved"]
    assert judged(rows).sentence == ("solved: held-out success 0.975 (95% 0.963 to 0.983) at step 100, 0.433 at step 0")


@pytest.mark.parametrize(
    ("rows", "state", "first_bad_step", "setting", "words"),
    [
        ([step(n) for n in (1, 2)], "unknown", None, "", "2 of the 3 learner steps"),
        ([step(n) for n in range(1, 9)], "unknown", None, "", "8 of 20 steps, or a second evaluation"),
        ([evaluation(0, 0.4), *(step(n) for n in range(1, FLAT_STEPS + 1)), evaluation(FLAT_STEPS, 0.42)],
         "flat", None, "learner.optimizer.lr", "0.400 at step 0, 0.420"),
        ([step(n, mixed=0.1) for n in range(1, FLAT_STEPS + 1)], "flat", None, "env.level", "too few groups"),
        ([evaluation(0, 0.4), *(step(n) for n in range(1, 6)), evaluation(5, 0.6)], "learning", None, "", "0.600"),
        ([step(n, mixed=0.0, good=0.0) for n in range(1, 11)],
         "nothing to learn from", 1, "env.level", "too hard, env.level, or no warm start (shoal sft)"),
        ([*(step(n) for n in (1, 2)), *(step(n, mixed=0.0, good=1.0) for n in range(3, 13))],
         "nothing to learn from", 3, "env.level", "too easy"),
        ([*(step(n) for n in (1, 2, 3)), *(step(n, errors=0.5) for n in range(4, 9))],
         "environment failing", 4, "env", "fail 50% of the episodes (limit 5%)"),
        ([evaluation(0, 0.8), *(step(n) for n in range(1, 6)), evaluation(5, 0.3)],
         "collapsed", 5, "learner.optimizer.lr", "0.800 at step 0, 0.300"),
        ([evaluation(0, 0.8), step(1), *(step(n, kl=0.05, at_lag_0=0.05) for n in range(2, 9)), evaluation(8, 0.3)],
         "collapsed", 2, "engine", "numerics, for it differs at lag 0 too: shoal doctor --engine"),
    ],
)  # fmt: skip
def test_each_state_has_its_first_bad_step_and_setting(  # faults F1
    rows: list[dict[str, Any]], state: str, first_bad_step: int | None, setting: str, words: str
) -> None:
    found = judged(rows)
    assert (found.state, found.first_bad_step, found.setting) == (state, first_bad_step, setting), found.sentence
    assert words in found.sentence and (state in found.sentence or state == "unknown")


def test_a_lower_reward_alone_is_no_collapse_for_a_curriculum_makes_tasks_harder() -> None:
    rows = [*(step(n, reward=0.9) for n in range(1, 10)), *(step(n, reward=0.3) for n in range(10, 20))]
    assert judged(rows).state != "collapsed"


def test_a_swing_within_the_interval_is_neither_learning_nor_a_collapse() -> None:
    rows = [evaluation(0, 0.5, half=0.1), *(step(n) for n in range(1, 6)), evaluation(5, 0.42, half=0.1)]
    assert judged(rows).state == "unknown"


def test_steps_that_do_not_tell_a_sign_keep_its_streak() -> None:  # faults F1
    silent = [step(n, errors="absent") for n in (4, 5)]
    rows = [*(step(n, errors=0.5) for n in (1, 2, 3)), *silent, *(step(n, errors=0.5) for n in (6, 7))]
    assert (judged(rows).state, judged(rows).first_bad_step) == ("environment failing", 1)


def test_numbers_of_a_foreign_file_that_are_no_numbers_are_passed_over() -> None:
    rows = [step(1), {"kind": "step", "step": "x"}, {"kind": "evaluation", "step": 1, "eval/success": None}, step(2)]
    assert judged([*rows, step(3, reward="much", kl=None)]).state == "unknown"


def test_every_link_of_a_verdict_is_an_entry_of_the_faq() -> None:  # faults F1
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", FAQ.read_text(), re.M)}
    states = ("learning", "flat", "collapsed", "solved", "nothing-to-learn-from", "environment-failing")
    assert [state for state in states if state not in headings] == []
