"""ShellBox-v0: commands on a file system in memory, which is compared at the end."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.base import call, say
from envs.check.demonstration import demonstrate
from envs.library.parts.file_tree import Tree
from envs.library.shell_box import PARAMETERS, Job, ShellBox
from envs.message import Message, ToolCall


def small_tree() -> Tree:
    tree = Tree()
    tree.folders |= {"/lup", "/lup/bag"}
    tree.files |= {"/kem": "481", "/lup/dax": "17", "/lup/bag/wix": "4811"}
    return tree


def ready(job: Job) -> ShellBox:
    """A shell on the small tree with one job."""
    env = ShellBox()
    env.reset(seed=0)
    env.tree, ends, env.jobs = small_tree(), small_tree(), [job]
    for name, *arguments in job.commands:
        getattr(ends, name)(*arguments)
    env.gold_digest = ends.digest()
    return env


def shown(env: ShellBox, name: str, **arguments: str) -> str:
    return env.step(call(name, **arguments))[0][0].text


MOVE = Job(text="rename kem to lup/kem", commands=(("mv", "kem", "lup/kem"),))
READ = Job(text="what is in lup/dax", commands=(("cat", "lup/dax"),), answer="17")


@pytest.mark.parametrize("level", range(10))
def test_the_oracle_scores_one_without_an_error(level: int) -> None:
    demonstrations = [demonstrate(ShellBox(), seed, level) for seed in range(30)]
    assert {d.reward for d in demonstrations} == {1.0}
    assert {d.meta["num_tool_errors"] for d in demonstrations} == {0}


def test_jobs_get_longer_with_the_level() -> None:
    means = [sum(len(demonstrate(ShellBox(), s, level).messages) for s in range(40)) for level in (0, 2, 3, 6, 9)]
    assert means == sorted(set(means))


def test_commands_do_what_their_names_say() -> None:
    env = ready(MOVE)
    assert shown(env, "ls") == "kem lup/"
    assert shown(env, "cd", path="lup") == "ok"
    assert shown(env, "ls") == "bag/ dax"
    assert shown(env, "cat", path="../kem") == "481"
    assert shown(env, "grep", word="481", path="/") == "../kem bag/wix"
    assert shown(env, "grep", word="999") == "none"
    assert shown(env, "mv", old="/kem", new="bag") == "ok"
    assert shown(env, "cp", old="bag/kem", new="copy") == "ok"
    assert shown(env, "mkdir", path="new") == "ok"
    assert shown(env, "ls", path="new") == "empty"
    assert shown(env, "write", path="new/note", text="hi") == "ok"
    assert shown(env, "write", path="dax", text="18") == "ok"
    assert shown(env, "rm", path="new/note") == "ok"
    assert shown(env, "rm", path="new") == "ok"
    assert env.tree.files == {"/lup/bag/kem": "481", "/lup/copy": "481", "/lup/dax": "18", "/lup/bag/wix": "4811"}
    assert env.tree.folders == {"/", "/lup", "/lup/bag"}


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("cat", {"path": "zzz"}, "no such file"),
        ("cat", {"path": "lup"}, "is a folder"),
        ("ls", {"path": "kem"}, "not a folder"),
        ("cd", {"path": "zzz"}, "no such folder"),
        ("mv", {"old": "kem", "new": "lup/dax"}, "already there"),
        ("cp", {"old": "kem", "new": "zzz/kem"}, "no such folder"),
        ("rm", {"path": "lup"}, "is a folder"),
        ("rm", {"path": "/"}, "is a folder"),
        ("mkdir", {"path": "lup"}, "already there"),
        ("write", {"path": "lup", "text": ""}, "already there"),
        ("mv", {"old": "kem"}, "missing new"),
    ],
)
def test_what_cannot_be_done_is_said_and_changes_nothing(name: str, arguments: dict[str, str], text: str) -> None:
    env = ready(MOVE)
    assert shown(env, name, **arguments) == f"error: {text}"
    assert env.tree.digest() == small_tree().digest()


def test_a_job_counts_by_its_end_state_and_not_by_the_way() -> None:
    env = ready(MOVE)
    env.step(call("cp", old="kem", new="lup"))
    env.step(call("rm", path="kem"))
    _, reward, _, _, info = env.step(say("whatever"))
    assert (reward, info["reward_parts"]) == (1.0, {"state": 1.0, "answer": 0.0})


@pytest.mark.parametrize("step", [call("cp", old="kem", new="lup"), call("rm", path="kem"), call("ls")])
def test_another_end_state_scores_nothing(step: Message) -> None:
    env = ready(MOVE)
    env.step(step)
    assert env.step(say("done"))[1] == 0.0


def test_a_question_needs_the_exact_answer_and_an_unharmed_tree() -> None:
    assert ready(READ).step(say("17"))[1] == 1.0
    assert ready(READ).step(say("17 "))[1] == 1.0
    assert ready(READ).step(say("the number 17"))[1] == 0.0
    assert ready(READ).step(say("done"))[1] == 0.0
    env = ready(READ)
    env.step(call("rm", path="kem"))
    assert env.step(say("17"))[1] == 0.0


@pytest.mark.parametrize("level", range(10))
def test_the_answer_is_not_in_the_prompt_and_work_always_changes_the_tree(level: int) -> None:
    env = ShellBox()
    for seed in range(60):
        opening, info = env.reset(seed=seed, options={"level": level})
        answer = env.jobs[-1].answer
        assert answer or env.tree.digest() != env.gold_digest
        assert not answer or answer not in opening[0].text + repr(info)


TEXTS = st.text(st.sampled_from("ab./~\x00\ud800"), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*PARAMETERS, "cd"]), TEXTS, TEXTS), max_size=12))
def test_no_sequence_of_commands_raises_or_leaves_the_tree_broken(commands: list[tuple[str, str, str]]) -> None:
    env = ready(MOVE)
    for name, *texts in commands:
        arguments = dict(zip(PARAMETERS.get(name, ("path",)), texts, strict=False))
        replies, *_ = env.step(Message.assistant(calls=[ToolCall(name=name, arguments=arguments)]))
        result = replies[0].tool_result
        assert result is not None
        assert result.error in (None, "tool_error")
    entries = [*env.tree.files, *(env.tree.folders - {"/"})]
    assert len(entries) == len(set(entries))
    assert {path.rpartition("/")[0] or "/" for path in entries} <= env.tree.folders
    assert "/" in env.tree.folders
    assert env.tree.cwd in env.tree.folders
    env.tree.digest()


def test_noisy_demonstrations_are_right_in_four_of_ten() -> None:
    env, rng = ShellBox(), random.Random(7)
    assert 0.36 < sum(demonstrate(env, seed, 0, rng).reward for seed in range(1000)) / 1000 < 0.46


def test_level_zero_is_short_and_has_many_problems() -> None:
    env = ShellBox()
    resets = [env.reset(seed=seed) for seed in range(1000)]
    assert max(len(opening[0].text) for opening, _ in resets) <= 24
    assert len({info["problem_digest"] for _, info in resets}) == 1000
