"""The contract: gymnasium's interface, tool calls, rewards, deadlines of tools."""

import asyncio
import gc
import random
import threading
import time
from typing import ClassVar

import pytest
from gymnasium.utils.env_checker import check_env

from envs.base import AgentEnv, call, say
from envs.check.demonstration import demonstrate
from envs.errors import AuthorExit, BadReward, InfraFault
from envs.message import Message, ToolCall
from envs.registry import make_env
from envs.tool import tool
from tests.envs.small_envs import (
    Asks,
    Chatty,
    Doubling,
    ExitsInTask,
    ExitsInTool,
    OneAtATime,
    RewardOf,
    SketchShop,
)


def texts(messages: tuple[Message, ...]) -> list[str]:
    return [message.text for message in messages]


def calls(*pairs: tuple[str, dict]) -> Message:
    return Message.assistant(calls=[ToolCall(name=n, arguments=a, call_id=str(i)) for i, (n, a) in enumerate(pairs)])


@pytest.mark.parametrize("env_id", ["Calculator-v0", "ToolGate-v0", "ShopDB-v0", "tests.envs.small_envs:Doubling"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_the_environments(env_id: str) -> None:
    check_env(make_env(env_id), skip_render_check=True)


def test_an_episode_by_hand_gives_new_messages_only_and_the_sum_of_the_parts() -> None:
    env = Doubling()
    opening, info = env.reset(seed=3, options={"level": 1})
    assert texts(opening) == [f"double {env.number}"]
    assert [spec.name for spec in info["tools"]][:2] == ["add", "fail"]
    replies, reward, terminated, truncated, _ = env.step(call("add", a=str(env.number), b=env.number))
    assert (texts(replies), reward, terminated, truncated) == ([str(2 * env.number)], 0.0, False, False)
    replies, reward, terminated, truncated, info = env.step(replies[0].text)
    assert (replies, reward, terminated, truncated) == ((), 0.75, True, False)
    assert info["reward_parts"] == {"answer": 1.0, "style": -0.25}
    counts = {"num_tools": 6, "num_tool_calls": 1, "num_tool_errors": 0, "tool_cost": 1.0, "tool_calls": {"add": 1}}
    assert info["meta"] == {"level": 1, **counts}
    with pytest.raises(RuntimeError, match="call reset"):
        env.step("again")


def test_what_a_policy_does_wrong_is_an_observation_with_a_stable_text() -> None:
    env = Doubling()
    env.reset(seed=0)
    message = Message.assistant(
        calls=[
            ToolCall(name="divide", call_id="a"),
            ToolCall(name="add", arguments={"a": "one"}, call_id="b"),
            ToolCall(name="add", call_id="c", error="bad call"),
            ToolCall(name="fail", call_id="d"),
            ToolCall(name="hang", call_id="e"),
            ToolCall(name="add", arguments={"a": "1"}, call_id="f"),
        ]
    )
    replies, *_, info = env.step(message)
    assert [(m.tool_result.call_id, m.tool_result.error, m.text) for m in replies if m.tool_result] == [
        ("a", "unknown_tool", "error: unknown tool"),
        ("b", "bad_arguments", "error: a must be integer"),
        ("c", "malformed", "error: bad call"),
        ("d", "tool_error", "error: 'shelf'"),
        ("e", "timeout", "error: timed out"),
        ("f", None, "1"),
    ]
    assert (info["meta"]["num_tool_calls"], info["meta"]["num_tool_errors"]) == (6, 5)
    assert info["meta"]["tool_calls"] == {"unknown": 1, "add": 3, "fail": 1, "hang": 1}


def test_results_come_in_call_order_whatever_takes_longest() -> None:
    env = Doubling()
    env.reset(seed=0)
    replies, *_ = env.step(calls(("nap", {"seconds": 0.05}), ("add", {"a": 1}), ("nap", {"seconds": "0.01"})))
    assert texts(replies) == ["slept 0.05", "1", "slept 0.01"]
    assert [m.tool_result.call_id for m in replies if m.tool_result] == ["0", "1", "2"]


def test_without_the_declaration_the_first_call_is_run_and_the_others_are_refused() -> None:
    env = OneAtATime()
    env.reset(seed=0)
    message = calls(("add", {"a": 1}), ("nap", {"seconds": 1}), ("add", {"a": 2}))
    replies, *_, info = env.step(message)
    assert texts(replies) == ["1", "error: one call per message", "error: one call per message"]
    assert [m.tool_result.error for m in replies if m.tool_result] == [None, "malformed", "malformed"]
    assert (info["meta"]["num_tool_calls"], info["meta"]["tool_cost"]) == (3, 3.0)


class Rendezvous(AgentEnv):
    """Its calls must overlap to end, and its blocking ones must not."""

    parallel_calls: ClassVar[bool] = True

    def task(self, rng: random.Random, level: int) -> str:
        self.met = asyncio.Event()
        self.inside = 0
        return "?"

    @tool(timeout_s=5.0)
    async def wait(self) -> str:
        await self.met.wait()
        return "met"

    @tool
    async def meet(self) -> str:
        self.met.set()
        return "here"

    @tool(timeout_s=0.2)
    def block(self) -> int:
        self.inside += 1
        time.sleep(0.08)
        self.inside -= 1
        return self.inside

    @tool(timeout_s=0.05)
    def hang(self) -> None:
        time.sleep(0.3)

    @tool
    def leave(self) -> None:
        raise SystemExit(3)

    @tool
    def lose_server(self) -> None:
        raise InfraFault("the server is gone")

    def reward(self, answer: str) -> float:
        return float(answer)


def test_declared_calls_of_one_message_run_at_the_same_time_and_blocking_ones_in_turn() -> None:
    env = Rendezvous()
    env.reset(seed=0)
    replies, *_ = env.step(calls(("wait", {}), ("meet", {})))
    assert texts(replies) == ["met", "here"]
    # Each has 0.2 s for itself, and the thread that hangs takes no other call with it.
    replies, *_ = env.step(calls(*[("block", {})] * 4, ("hang", {}), ("block", {})))
    assert texts(replies) == ["0"] * 4 + ["error: timed out", "0"]


@pytest.mark.parametrize(("name", "error"), [("leave", AuthorExit), ("lose_server", InfraFault)])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_is_no_observation_raises_also_from_one_of_several_calls(name: str, error: type, parallel: bool) -> None:
    env = Rendezvous()
    env.reset(seed=0)
    with pytest.raises(error):
        env.step(calls((name, {}), *[("meet", {})] * parallel))
    assert demonstrate(Doubling(), 1, 0).reward == 0.75  # the shared loop lives on


def test_the_costs_that_tools_declare_are_summed_over_the_episode() -> None:
    class Priced(Asks):
        @tool(cost=0.25)
        async def cheap(self) -> None: ...

        @tool(cost=3)
        async def dear(self, n: int) -> None: ...

    env = Priced()
    env.reset(seed=0)
    for message in (call("cheap"), call("cheap"), call("dear", n="x"), call("invented")):
        *_, info = env.step(message)
    assert info["meta"]["tool_cost"] == 0.25 + 0.25 + 3 + 1
    assert env.reset(seed=0)[1]["meta"]["tool_cost"] == 0


@pytest.mark.parametrize("answer", ["-1", "1", "1.0000000001"])
def test_a_reward_inside_the_range_is_passed_on(answer: str) -> None:
    env = Rendezvous()
    env.reset(seed=0)
    assert env.step(answer)[1] == float(answer)


@pytest.mark.parametrize("answer", ["-1.1", "1.1", "100"])
def test_a_reward_outside_the_range_raises_with_both(answer: str) -> None:
    env = Rendezvous()
    env.reset(seed=0)
    with pytest.raises(BadReward, match=rf"returned {answer} in sum, which is not in reward_range -1\.\.1"):
        env.step(answer)


def test_every_call_is_answered_also_beyond_the_most_that_are_run() -> None:
    env = Doubling()
    env.reset(seed=0)
    replies, *_ = env.step(calls(*[("add", {"a": i}) for i in range(20)]))
    assert texts(replies) == [str(i) for i in range(16)] + ["error: too many calls"] * 4


def test_parameters_may_be_called_like_those_of_our_own_functions() -> None:
    env = Doubling()
    env.reset(seed=0)
    replies, *_ = env.step(call("odd", function="f", inline="true", args="3"))
    assert texts(replies) == ["f True 3"]


def test_long_results_are_cut_with_a_visible_mark() -> None:
    env = Doubling()
    env.reset(seed=0)
    replies, *_ = env.step(call("shout"))
    assert replies[0].text == "x" * 2000 + " (truncated 1000 chars) " + "x" * 2000


def test_an_episode_without_an_answer_is_truncated_after_max_turns_and_scored() -> None:
    env = Doubling()
    env.reset(seed=0)
    outcomes = [env.step(call("add", a=1)) for _ in range(4)]
    assert [(o[1], o[2], o[3]) for o in outcomes] == [(0.0, False, False)] * 3 + [(-0.25, False, True)]


def test_a_scripted_user_can_go_on_and_a_reward_can_be_async() -> None:
    env = Chatty()
    env.reset(seed=0)
    replies, _, terminated, _, _ = env.step("hi")
    assert (replies[0].role, texts(replies), terminated) == ("user", ["and now?"], False)
    assert env.step("bye")[1:4] == (1.0, True, False)


def test_blocking_code_of_one_environment_stays_on_one_thread_of_its_own() -> None:
    env = Doubling()
    demonstrate(env, 1, 0)
    assert len(env.threads) == 1
    assert threading.current_thread() not in env.threads
    assert demonstrate(SketchShop(), 1, 0).reward == 1.0  # sqlite's default insists on one thread


def test_step_works_inside_a_running_loop() -> None:
    async def notebook_cell() -> float:
        return demonstrate(Doubling(), 5, 0).reward

    assert asyncio.run(notebook_cell()) == 0.75


def test_a_forgotten_environment_leaves_no_thread() -> None:
    environments = [Doubling() for _ in range(20)]
    threads: set[threading.Thread] = set()
    for env in environments:
        env.reset(seed=0)
        threads |= env.threads
    assert len(threads) == 20
    del env, environments
    gc.collect()
    for thread in threads:
        thread.join(timeout=1)
    assert not [thread for thread in threads if thread.is_alive()]


@pytest.mark.parametrize("kind", ["none", "nan", "inf", "text", "empty", "list", "nan part"])
def test_a_reward_that_is_not_finite_numbers_raises(kind: str) -> None:
    env = RewardOf(kind=kind)
    env.reset(seed=0)
    with pytest.raises(BadReward, match=r"reward\(\) returned"):
        env.step("x")


def test_an_exit_reaches_the_caller_as_an_error_and_the_shared_loop_lives_on() -> None:
    with pytest.raises(AuthorExit, match="SystemExit: 3"):
        ExitsInTask().reset(seed=0)
    env = ExitsInTool()
    env.reset(seed=0)
    with pytest.raises(AuthorExit, match="SystemExit: 3"):
        env.step(call("leave"))
    assert demonstrate(Doubling(), 1, 0).reward == 0.75


def test_a_level_outside_the_range_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match=r"level 10 of Doubling is not in 0\.\.9"):
        Doubling().reset(seed=0, options={"level": 10})


def test_each_call_waits_a_latency_of_its_own_also_where_the_task_is_the_same() -> None:
    def seconds() -> float:
        env = make_env("Calculator-v0", latency_median_s=0.01, latency_sigma=0.5)
        env.reset(seed=1)
        replies, *_ = env.step(call("add", a=1, b=2))
        assert replies[0].tool_result is not None
        return replies[0].tool_result.seconds

    waited = [seconds() for _ in range(8)]
    assert min(waited) > 0.0005
    assert max(waited) > 1.2 * min(waited)  # eight draws as close as that: about once in 10,000 runs


def test_digests_tell_problems_apart_and_the_class_not_the_id_counts() -> None:
    def digest(env: AgentEnv, seed: int, level: int = 0) -> str:
        return env.reset(seed=seed, options={"level": level})[1]["problem_digest"]

    env = Doubling()
    assert digest(env, 1) == digest(Doubling(), 1)
    assert len({digest(env, seed, level) for seed in (1, 2) for level in (0, 1)}) == 4
    by_id, by_path = make_env("Calculator-v0"), make_env("envs.library.calculator:Calculator")
    assert digest(by_id, 1) == digest(by_path, 1)


def test_an_action_that_is_no_assistant_message_is_the_callers_error() -> None:
    env = Doubling()
    env.reset(seed=0)
    with pytest.raises(TypeError, match="assistant Message"):
        env.step(Message.user("hi"))
    with pytest.raises(ValueError, match="level 99"):
        env.reset(seed=0, options={"level": 99})
    with pytest.raises(RuntimeError, match="no episode is running"):
        env.step("x")
    env.reset(seed=0)
    assert env.step(say("x"))[2]
