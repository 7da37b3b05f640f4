"""The checker: a good environment passes, each broken one fails its own probe and no other, the built-in ones pass."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.check.checker import check_environment, default_levels
from envs.check.pay_probes import _chance
from envs.check.scripted_policies import leaves, made_arguments, readings, words_of
from envs.check.subject import Start, Subject
from envs.errors import MalformedEnvironment
from envs.message import ToolSpec
from envs.registry import BUILT_IN
from rl.cli.environments.env_check import check, report_text
from tests.envs.checker_envs import BROKEN


def test_an_environment_that_keeps_its_promises_passes_and_leaves_the_process_alone():
    state = random.getstate()
    report = check("tests.envs.checker_envs:Vault", num_seeds=5)
    assert report.passed, report_text(report)
    assert random.getstate() == state
    assert report.sample.reward == 1.0 and len(report.results) == 19


def test_a_failure_names_the_seed_and_the_level_where_it_is_seen_again():
    report = check("tests.envs.checker_envs:HalfSolved", num_seeds=4)
    failure = report.failures["oracle"]
    assert (failure.seed, failure.level) == (0, 1) and not report.passed
    assert "shoal env play tests.envs.checker_envs:HalfSolved --seed 0 --level 1" in report_text(report)
    episode = asyncio.run(Subject("tests.envs.checker_envs:HalfSolved", levels=(1,), num_seeds=2).oracle_episode(0, 1))
    assert episode.reward == 0.0 and episode.answer == "1"


IN_CI = ("Calculator-v0", "ShopDB-v0", "ToolGate-v0")
"""One of arithmetic, one of a database, one that is gated; all thirteen are part of the full sweep."""


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "probe"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_environment_fails_its_own_probe_and_no_other(owner, probe):
    report = check(f"tests.envs.checker_envs:{owner.__name__}", num_seeds=5)
    assert set(report.failures) == {probe}, report_text(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env_id", [each if each in IN_CI else pytest.param(each, marks=pytest.mark.sweep) for each in BUILT_IN]
)
def test_a_built_in_environment_passes_at_two_seeds_of_its_lowest_middle_and_highest_level(env_id):
    report = check(env_id, num_seeds=2)
    assert report.passed, report_text(report)


@pytest.mark.slow
def test_an_environment_is_checked_with_the_arguments_that_it_is_given():
    report = check("ApiDesk-v0", levels=(0,), num_seeds=2, kwargs={"http": True})
    assert report.passed, report_text(report)
    with pytest.raises(MalformedEnvironment, match="'turns'; its arguments are: max_turns"):
        check("Calculator-v0", num_seeds=2, kwargs={"turns": 2})


@pytest.mark.slow
def test_blind_calls_and_guesses_are_tried_on_all_the_seeds_that_were_asked_for():
    report = check("tests.envs.checker_envs:PaysLate", levels=(0,), num_seeds=20)
    assert set(report.failures) == {"always_call", "guess"}, report_text(report)


@pytest.mark.slow
def test_an_environment_that_hangs_ends_the_check_and_is_told_of():
    report = check_environment("tests.envs.checker_envs:Hangs", levels=(0,), num_seeds=2)
    assert "did not come back" in report.failures["oracle"].seen
    assert all("not run" in failure.seen for name, failure in report.failures.items() if name != "oracle")


def test_levels_that_an_environment_does_not_have_are_refused():
    with pytest.raises(ValueError, match="levels 0 to 1"):
        check_environment("tests.envs.checker_envs:Vault", levels=(0, 2), num_seeds=3)
    assert default_levels("Calculator-v0") == (0, 5, 9)
    assert default_levels("tests.envs.checker_envs:Vault") == (0, 1)


def test_arguments_are_made_to_fit_a_schema_and_enumerations_are_tried_in_turn():
    parameters = {
        "type": "object",
        "properties": {
            "way": {"enum": ["up", "down"]},
            "n": {"type": "integer", "minimum": 3, "maximum": 4},
            "at": {"$ref": "#/$defs/At"},
            "words": {"type": "array", "items": {"type": "string"}},
            "more": {"type": "string"},
        },
        "required": ["way", "n", "at", "words"],
        "$defs": {"At": {"type": "object", "properties": {"x": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}}}},
    }
    spec = ToolSpec(name="go", description="Go.", parameters=parameters)
    assert made_arguments(spec, 0) == {"way": "up", "n": 3, "at": {"x": True}, "words": ["a"]}
    assert made_arguments(spec, 1) == {"way": "down", "n": 4, "at": {"x": None}, "words": ["b"]}


def test_a_cheater_reads_prompt_tools_info_and_errors_by_position():
    start = Start(messages=(), tools=(), meta={"gold": 48, "deep": [{"x": "y"}]})
    said = readings(start, ())
    assert said["info gold"] == "48" and said["info deep.0.x"] == "y" and said["number 1 of the info"] == "48"
    assert list(leaves({"a": [5, {"b": None}]})) == [("a.0", "5"), ("a.1.b", "None")]
    assert words_of("47*385-x_1=?") == ["47", "385", "x_1"]


@given(st.text(max_size=60), st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_chance_to_find_an_answer_is_a_probability_and_one_where_nothing_else_stands(text, gold):
    assert 0.0 <= _chance(gold, text) <= 1.0
    assert _chance("5", "4 or 5?") == 0.5 and _chance("18095", "the key is 18095") == 1.0
