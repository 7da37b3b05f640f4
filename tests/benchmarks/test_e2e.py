"""The benchmark against a peer: both sides must do the same task, and the comparison must be right."""

import asyncio
import json
import random
from pathlib import Path

import pytest

from benchmarks.e2e import SharedTask, Training, compare, difference, our_tokens, shoal_words
from benchmarks.peers import task as shared
from benchmarks.peers.shoal_env import Reverse, SumTool
from conf.loading import load_config
from envs.base import AgentEnv, call, say
from envs.message import Message, ToolCall, ToolResult
from policy.model.tokenizer import HfTokenizer
from rl.loop.preflight import check_parts
from rollout.dialects.template_dialect import TemplateDialect

TOOL = SharedTask(name="tool", env="SumTool", max_new_tokens=220, trl_steps=5, shoal_steps=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared tokenizer in a folder that passes for a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    shared.build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    return folder


def test_episodes_have_the_tokens_of_the_warm_start(checkpoint: Path) -> None:
    tokenizer = HfTokenizer.load(checkpoint)
    dialect = TemplateDialect(tokenizer, end_ids=tokenizer.end_ids(checkpoint))
    env = SumTool(latency=0.0)
    for seed in range(20):
        opening, info = env.reset(seed=seed)
        problem = shared.problem("tool", random.Random(f"{seed}/0"))
        assert problem == {"prompt": opening[0].text, "answer": env.right_answer}
        first, *rest = (int(word) for word in problem["prompt"].split()[1:])
        ids = dialect.prompt(opening, info["tools"])
        total = first
        for number in rest:
            ids += dialect.completion(call("add", a=total, b=number), info["tools"])
            total += number
            result = ToolResult(call_id="0", name="add", content=str(total))
            ids += dialect.reply([Message.tool(result)], info["tools"])
        ids += dialect.completion(say(str(total)), info["tools"])
        pieces = [tokenizer.hf(text, add_special_tokens=False)["input_ids"] for _, text in shared.demo(problem)]
        assert ids == [i for piece in pieces for i in piece]


@pytest.mark.parametrize("name", ["tool", "reverse"])
def test_prompts_are_those_of_the_chat_template_without_a_header_of_tools(checkpoint: Path, name: str) -> None:
    task = SharedTask(name=name, env={"tool": "SumTool", "reverse": "Reverse"}[name], max_new_tokens=12,
                      trl_steps=5, shoal_steps=5)  # fmt: skip
    tokenizer = HfTokenizer.load(checkpoint).hf
    tools = [shared.add] if name == "tool" else None
    for conversation, ids in zip(*our_tokens(task, checkpoint), strict=True):
        expected = tokenizer.apply_chat_template(
            conversation["messages"], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert ids == expected
        opening = f"<|im_start|>user\n{conversation['messages'][0]['content']}<|im_end|>"
        assert str(tokenizer.decode(ids)).startswith(opening)


def test_rewards_are_those_of_the_shared_module() -> None:
    def play(env: AgentEnv, *messages: Message) -> tuple[float, bool, bool]:
        env.reset(seed=1)
        for message in messages:
            _, reward, terminated, truncated, _ = env.step(message)
        return reward, terminated, truncated

    env = SumTool(latency=0.0)
    env.reset(seed=1)
    answer, add = env.right_answer, call("add", a=1, b=2)
    unreadable = Message.assistant(calls=[ToolCall(name="add", arguments={}, error="call is not valid JSON")])
    assert play(env, add, say(answer)) == (1.0, True, False)
    assert play(env, say(answer)) == (1.0, True, False)
    assert play(env, add, say("0")) == (0.1, True, False)
    assert play(env, say("0")) == (0.0, True, False)
    assert play(env, unreadable) == (0.0, True, False)
    assert play(env, add, unreadable) == (0.1, True, False)
    assert play(env, *[add] * 6) == (0.1, False, True)
    assert play(env, *[add] * 5, say(answer)) == (1.0, True, False)
    reverse = Reverse()
    reverse.reset(seed=1)
    assert play(reverse, say(reverse.right_answer)) == (1.0, True, False)
    assert 0 < play(reverse, say(reverse.right_answer[0]))[0] < 0.5


def test_the_tool_waits_as_long_as_the_shared_module_says(monkeypatch: pytest.MonkeyPatch) -> None:
    env = SumTool(latency=0.02)
    env.reset(seed=1)
    monkeypatch.setattr(shared.LAT, "total", 0.0)
    asyncio.run(env.respond(call("add", a=1, b=2)))
    assert 0.02 * 0.05 <= shared.LAT.total <= 0.02 * 2.0


def test_shoals_side_is_a_config_that_loads(checkpoint: Path) -> None:
    config = load_config(shoal_words(TOOL, checkpoint=checkpoint, seed=3, latency=0.5))
    check_parts(config)
    assert config.env.kwargs == {"latency": 0.5}
    assert (config.rollout.groups_per_step, config.rollout.group_size, config.rollout.max_staleness) == (8, 8, 2)
    assert config.learner.optimizer.lr == 5e-4 and config.learner.loss.clip_high == 0.2


def training(side: str, ends: list[float], rewards: list[float]) -> Training:
    return Training(
        side=side, seed=1, step_end_s=ends, rewards=rewards, trained_tokens_per_second=1.0,
        trajectories_per_cpu_second=1.0, tool_calls=2.0, load=0.0,
    )  # fmt: skip


def test_ratios_are_of_steady_rates_and_rewards_of_equal_training() -> None:
    trl = training("trl", [10.0, 20.0, 30.0], [0.1, 0.2, 0.3])
    shoal = training("shoal", [9.0, 10.0, 11.0, 13.0, 15.0], [0.2, 0.3, 0.4, 0.9, 0.9])
    figures = compare([trl], [shoal])
    assert figures["trajectories_per_second"] == {"trl": [6.4], "shoal": [42.667]}
    assert figures["speedup_per_pair"] == [round(64 * 4 / 6 / 6.4, 3)]
    assert figures["shoal_trajectories_per_second_later"] == [32.0]
    assert figures["reward_difference_first_steps"]["mean"] == pytest.approx(0.1)
    assert figures["reward_difference"]["mean"] == pytest.approx(0.34)
    json.dumps(figures)


def test_the_interval_of_a_difference_is_welchs() -> None:
    ours, theirs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    found = difference(ours, theirs)  # 10 degrees of freedom: t = 2.22814; both variances 3.5
    assert found["mean"] == 1.0
    assert found["high"] - 1.0 == pytest.approx(2.22814 * (3.5 / 6 * 2) ** 0.5, rel=2e-3)
    assert difference([1.0, 1.0], [1.0, 1.0]) == {"mean": 0.0, "low": 0.0, "high": 0.0}
