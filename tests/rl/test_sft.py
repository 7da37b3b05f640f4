"""Warm starts: what is learned on, that it is learned, that it is reproducible, and what is written."""

import asyncio
import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from conf.schema import EnvConfig, EvaluationConfig, MixEntry, PolicyConfig, RunConfig, SftConfig, TrainConfig
from envs.base import call, say
from envs.check.demonstration import Demonstration
from envs.message import Message, ToolResult, ToolSpec
from envs.pool.pool import EnvPool
from envs.task import Task
from envs.tasks.task_source import held_out_tasks
from policy.model.checkpoint_io import load_numpy_tensors, to_numpy_tensors
from policy.model.hf_model import load_policy_model
from rl.loop.tasks import task_entries
from rl.sft import demonstrate_tasks, demonstration_row, main, save_warm_start, supervised_fine_tune, training_tasks
from rollout.dialects.tiny_dialect import TinyDialect
from tests.rollout.trajectories import tiny_model

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ("linear_attention", "full_attention"),
}
CONFIG = TrainConfig(
    policy=PolicyConfig(overrides=SMALL),
    evaluation=EvaluationConfig(tasks=5, final_tasks=5),
    sft=SftConfig(steps=3, batch_size=4, warmup_steps=1),
)


def calculator_tasks(count: int) -> list[Task]:
    return [Task(task_id=str(i), env_id="Calculator-v0", env_name="calculator", seed=i) for i in range(count)]


def test_a_row_grows_like_an_episode_and_learns_only_what_the_assistant_says() -> None:
    dialect = TinyDialect()
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
    tools = (ToolSpec(name="add", description="", parameters=parameters),)
    result = Message.tool(ToolResult(call_id="0", name="add", content="5"))
    demonstration = Demonstration(
        messages=(Message.user("2+3=?"), call("add", a=2, b=3), result, say("5")),
        tools=tools,
        reward=1.0,
    )
    row = demonstration_row(demonstration, dialect)
    special = dialect.tokenizer.special_id
    prompt = [special("<user>"), *b"2+3=?", special("<assistant>")]
    completion = [special("<call>"), *b"add", special("<arg>"), *b"2", special("<arg>"), *b"3", special("<end>")]
    reply = [special("<result>"), *b"5", special("<assistant>")]
    answer = [*b"5", special("<end>")]
    assert row.token_ids.tolist() == prompt + completion + reply + answer
    assert row.loss_mask.tolist() == ([0] * len(prompt) + [1] * len(completion) + [0] * len(reply) + [1] * len(answer))


def test_without_noise_every_demonstration_is_right_and_with_noise_some_are_not() -> None:
    tasks = calculator_tasks(40)
    assert {d.reward for d in demonstrate_tasks(tasks, noise_from_level=10)} == {1.0}
    noisy = demonstrate_tasks(tasks, noise_from_level=0)
    assert {d.reward for d in noisy} == {0.0, 1.0}
    again = demonstrate_tasks(tasks, noise_from_level=0)
    for one, other in zip(noisy, again, strict=True):
        ids = [demonstration_row(d, TinyDialect()).token_ids.tolist() for d in (one, other)]
        assert ids[0] == ids[1]


def test_levels_below_the_noise_are_demonstrated_without_a_mistake() -> None:
    tasks = [replace(task, level=index % 3) for index, task in enumerate(calculator_tasks(90))]
    demonstrations = demonstrate_tasks(tasks, noise_from_level=2)
    rewards = {level: {d.reward for d in demonstrations[level::3]} for level in range(3)}
    assert rewards == {0: {1.0}, 1: {1.0}, 2: {0.0, 1.0}}


def test_training_lowers_the_loss_and_is_the_same_bits_for_a_seed() -> None:
    tasks = calculator_tasks(32)
    rows = [demonstration_row(d, TinyDialect()) for d in demonstrate_tasks(tasks, noise_from_level=10)]
    config = SftConfig(steps=12, batch_size=8, lr=2e-2, warmup_steps=2)
    weights = []
    for seed in (1, 1, 2):
        model = load_policy_model(CONFIG.policy, seed=0)
        losses = supervised_fine_tune(model, rows, config, seed=seed, max_tokens=8192)
        assert losses[-1] < 0.8 * losses[0]
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_loss_does_not_depend_on_the_size_of_a_forward() -> None:
    rows = [demonstration_row(d, TinyDialect()) for d in demonstrate_tasks(calculator_tasks(8), noise_from_level=0)]
    config = SftConfig(steps=1, batch_size=8)
    losses = [
        supervised_fine_tune(load_policy_model(CONFIG.policy, seed=0), rows, config, seed=1, max_tokens=n)[0]
        for n in (1, 100, 10_000)
    ]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_card_describes_the_file_which_loads_into_an_equal_model(tmp_path: Path) -> None:
    model = tiny_model()
    path = tmp_path / "new" / "warm.safetensors"
    card = save_warm_start(
        model,
        path,
        command="shoal sft",
        env="e",
        policy="p",
        seed=1,
        threads=1,
        steps=2,
        demonstrations=3,
        demonstrations_right=0.5,
        seconds=4.0,
        final_loss=0.1,
    )
    assert json.loads(path.with_suffix(".json").read_text()) == asdict(card)
    assert card.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card.parameters == sum(p.numel() for p in model.parameters())
    other = tiny_model(seed=1)
    load_numpy_tensors(other, load_file(path))
    ours = to_numpy_tensors(model)
    assert all(np.array_equal(value, ours[name]) for name, value in to_numpy_tensors(other).items())
    assert sorted(p.name for p in path.parent.iterdir()) == ["warm.json", "warm.safetensors"]


def test_demonstrated_problems_are_never_held_out_also_in_a_mix() -> None:
    mix = {"sums": MixEntry(id="Calculator-v0"), "gate": MixEntry(id="ToolGate-v0", level=1)}
    config = replace(CONFIG, env=EnvConfig(mix=mix), evaluation=EvaluationConfig(tasks=50, final_tasks=50))
    tasks = asyncio.run(training_tasks(config, 60))
    assert {task.env_name for task in tasks} == {"sums", "gate"} and len(tasks) == 60

    async def digests() -> tuple[set[str], set[str]]:
        pool = EnvPool()
        held_out = await held_out_tasks(task_entries(config), pool, count=50, seed=config.evaluation.seed)
        return set(held_out), set(await pool.digests(tasks))

    held_out, demonstrated = asyncio.run(digests())
    assert not held_out & demonstrated
    assert len(demonstrate_tasks(tasks, noise_from_level=0)) == 60


def test_the_command_writes_weights_that_a_run_can_start_from(tmp_path: Path, capsys) -> None:
    output = tmp_path / "warm.safetensors"
    assert main(replace(CONFIG, sft=replace(CONFIG.sft, output=str(output)))) == 0
    card = json.loads(output.with_suffix(".json").read_text())
    assert (card["env"], card["seed"], card["steps"], card["demonstrations"]) == ("calculator", 1, 3, 12)
    load_numpy_tensors(load_policy_model(CONFIG.policy, seed=5), load_file(output))
    told = capsys.readouterr().out
    assert f"policy.init={output}" in told
    assert "sampled success 0.000" in told and "RL has nothing to amplify, for no episode is right" in told  # faults F3


def test_without_an_output_the_weights_go_into_a_run_folder_that_policy_init_accepts(tmp_path: Path) -> None:
    assert main(replace(CONFIG, run=RunConfig(root=str(tmp_path), name="warm"))) == 0
    assert (tmp_path / "warm" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "warm" / "run.json").read_text())["status"] == "finished"
