"""`shoal sft`: a warm start. Next-token loss on the assistant tokens of an environment's own demonstrations.

The tasks are training tasks: their problems are disjoint, by content, from those of every evaluation with the same
evaluation.seed. The result depends on the seed, the config and the number of threads alone.
"""

import asyncio
import hashlib
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save

from conf.checks import secret_values
from conf.keys import ConfigError
from conf.loading import resolved_yaml
from conf.schema import OptimizerConfig, SftConfig, TrainConfig
from envs.base import AgentEnv
from envs.check.demonstration import Demonstration, ademonstrate
from envs.pool.pool import EnvPool
from envs.redaction import expose, redacted
from envs.registry import make_env
from envs.task import Task
from envs.tasks.curriculum import Curriculum, stable_hash
from envs.tasks.task_source import TaskSource, held_out_tasks
from policy.model.checkpoint_io import to_numpy_tensors
from policy.model.hf_model import load_policy_model
from policy.model.initial import load_initial_weights
from policy.model.model import PolicyModel
from policy.sync.snapshot import PolicySnapshot
from rl.algorithm.batch import pack
from rl.algorithm.optimizer import build_optimizer, learning_rate, set_learning_rate
from rl.loop.amplification import sample
from rl.loop.tasks import evaluation_levels, task_entries
from rl.runs.run_folder import RunFolder
from rollout.dialects.dialect import Dialect, make_dialect

GRAD_CLIP = 1.0
NO_NOISE = 10
"""Above every level."""
FINAL_STEPS = 20
"""The final loss is the mean over this many last steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemonstrationRow:
    """A demonstration as the policy would have sampled it. Fits `rl.algorithm.batch.TokenRow`."""

    token_ids: np.ndarray
    """(L,) int32."""
    loss_mask: np.ndarray
    """(L,) uint8: 1 on assistant tokens, their stop token included."""
    temperature: float = 1.0
    routed_experts: None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartCard:
    """What stands beside the weights, and suffices to make them again."""

    command: str
    env: str
    policy: str
    seed: int
    threads: int
    """Of torch: another number rounds otherwise."""
    steps: int
    demonstrations: int
    demonstrations_right: float
    """Mean reward of the demonstrations: what a perfect imitation would reach."""
    seconds: float
    """Of training, making the demonstrations included."""
    final_loss: float
    """Nats per assistant token, mean of the last steps."""
    parameters: int
    sha256: str
    """Of the safetensors file."""


def demonstrate_tasks(tasks: Sequence[Task], *, noise_from_level: int = NO_NOISE) -> list[Demonstration]:
    """One demonstration of each task, by its environment's `noisy_oracle`, or by its `oracle` where its level is below
    `noise_from_level`.

    One environment per id and constructor arguments is made and reset for each task.
    """

    async def play() -> list[Demonstration]:
        envs: dict[str, AgentEnv] = {}
        demonstrations = []
        for task in tasks:
            key = f"{task.env_id} {json.dumps(task.kwargs, sort_keys=True, default=str)}"
            if key not in envs:
                envs[key] = make_env(task.env_id, **task.kwargs)
            errs = task.level >= noise_from_level
            rng = random.Random(f"{task.seed}/{task.level}/demonstration") if errs else None
            demonstrations.append(await ademonstrate(envs[key], task.seed, task.level, rng))
        for env in envs.values():
            env.close()
        return redacted(demonstrations)

    return asyncio.run(play())


def demonstration_row(demonstration: Demonstration, dialect: Dialect) -> DemonstrationRow:
    """Render a demonstration piece by piece, exactly as an episode grows.

    Example: user "1+2=?", assistant "3" -> ids [<user> 1 + 2 = ? <assistant> 3 <end>], mask 1 on the last two.
    """
    messages, tools = demonstration.messages, demonstration.tools
    first = next(i for i, message in enumerate(messages) if message.role == "assistant")
    token_ids = dialect.prompt(messages[:first], tools)
    mask = [0] * len(token_ids)
    replies = []
    for message in messages[first:]:
        if message.role != "assistant":
            replies.append(message)
            continue
        if replies or sum(mask):
            reply = dialect.reply(replies, tools)
            token_ids += reply
            mask += [0] * len(reply)
            replies = []
        completion = dialect.completion(message, tools)
        token_ids += completion
        mask += [1] * len(completion)
    return DemonstrationRow(token_ids=np.array(token_ids, np.int32), loss_mask=np.array(mask, np.uint8))


def supervised_fine_tune(
    model: PolicyModel,
    rows: Sequence[DemonstrationRow],
    config: SftConfig,
    *,
    seed: int,
    max_tokens: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train in place; returns the loss of each step in nats per assistant token.

    Each pass over the rows is in a new seeded order; AdamW with warm-up, then a cosine to 10% of the rate.
    `max_tokens`: of one forward. `on_step(step, loss)` is called after every step.
    """
    optimizer_config = OptimizerConfig(
        lr=config.lr, warmup_steps=config.warmup_steps, schedule="cosine", grad_clip=GRAD_CLIP
    )
    optimizer = build_optimizer(model, optimizer_config)
    rng = np.random.default_rng(seed)
    queue: list[int] = []
    losses = []
    for step in range(config.steps):
        while len(queue) < config.batch_size:
            queue += rng.permutation(len(rows)).tolist()
        batch, queue = [rows[i] for i in queue[: config.batch_size]], queue[config.batch_size :]
        num_tokens = sum(int(row.loss_mask.sum()) for row in batch)
        loss = 0.0
        for micro_batch in pack(batch, max_tokens=max_tokens, device=model.device):
            logits = model(micro_batch.token_ids, micro_batch.sequence_starts, logits_at=micro_batch.logits_at).logits
            share = F.cross_entropy(logits, micro_batch.targets, reduction="sum") / num_tokens
            share.backward()
            loss += float(share.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP, error_if_nonfinite=True)
        set_learning_rate(optimizer, learning_rate(step, config.steps, optimizer_config))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        on_step(step, loss)
    return losses


def save_warm_start(model: PolicyModel, path: Path, **facts: object) -> WarmStartCard:
    """Write `path` (.safetensors) and its card beside it (.json); each appears whole or not at all.

    `facts`: the fields of the card that the weights do not tell.
    """
    data = save(to_numpy_tensors(model))
    card = WarmStartCard(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sha256=hashlib.sha256(data).hexdigest(),
        **facts,  # type: ignore[arg-type]  # the dataclass checks the names
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, data)
    _write_whole(path.with_suffix(".json"), (json.dumps(asdict(card), indent=2) + "\n").encode())
    return card


def _write_whole(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


async def training_tasks(config: TrainConfig, count: int) -> list[Task]:
    """`count` training tasks, none of which is held out by an evaluation of this config."""
    if config.curriculum.sampler not in ("fixed", "uniform"):
        raise ConfigError(
            f"curriculum.sampler={config.curriculum.sampler!r} needs rewards, which demonstrations do not have. "
            "Allowed here: fixed, uniform"
        )
    entries = task_entries(config)
    expose(secret_values(config.env.secrets))
    pool = EnvPool(reset_timeout_s=config.env.reset_timeout_s)
    num_held_out = max(config.evaluation.final_tasks, config.evaluation.tasks)
    held_out = await held_out_tasks(
        entries, pool, count=num_held_out, seed=config.evaluation.seed, levels=evaluation_levels(config)
    )
    seed = stable_hash("sft", config.seed) % 2**31
    curriculum = Curriculum(entries, config.curriculum, seed=seed)
    source = TaskSource(entries, pool, seed=seed, held_out=frozenset(held_out), curriculum=curriculum)
    return [await source.next() for _ in range(count)]


def main(config: TrainConfig) -> int:
    """The whole command. Weights go to sft.output, or as model.safetensors into a run folder; then they are sampled."""
    torch.set_num_threads(config.learner.threads)
    started = time.perf_counter()
    folder = None if config.sft.output else _new_folder(config)
    path = folder.path / "model.safetensors" if folder else Path(config.sft.output)
    dialect = make_dialect(config.policy)
    tasks = asyncio.run(training_tasks(config, config.sft.steps * config.sft.batch_size))
    demonstrations = demonstrate_tasks(tasks, noise_from_level=config.sft.noise_from_level)
    right = float(np.mean([demonstration.reward for demonstration in demonstrations]))
    print(f"{len(tasks)} demonstrations of {config.env.name}, mean reward {right:.3f}")
    model = load_policy_model(config.policy, seed=config.seed)
    if config.policy.init not in ("auto", "random"):
        load_initial_weights(model, config.policy, config.env.name)

    def show(step: int, loss: float) -> None:
        if step % 20 == 0 or step == config.sft.steps - 1:
            seconds = time.perf_counter() - started
            print(f"step {step + 1:4d}/{config.sft.steps}  loss {loss:.4f}  {seconds:.0f} s", flush=True)

    losses = supervised_fine_tune(
        model,
        [demonstration_row(demonstration, dialect) for demonstration in demonstrations],
        config.sft,
        seed=config.seed,
        max_tokens=config.learner.micro_batch_tokens,
        on_step=show,
    )
    save_warm_start(
        model,
        path,
        command=shlex.join(["shoal", *sys.argv[1:]]),
        env=config.env.name,
        policy=config.policy.preset if config.policy.kind == "hybrid" else config.policy.path,
        seed=config.seed,
        threads=config.learner.threads,
        steps=config.sft.steps,
        demonstrations=len(tasks),
        demonstrations_right=round(right, 4),
        seconds=round(time.perf_counter() - started, 1),
        final_loss=round(float(np.mean(losses[-FINAL_STEPS:])), 5),
    )
    print(asyncio.run(sample(config, PolicySnapshot.create(0, to_numpy_tensors(model)))).sentence)
    if folder:
        folder.finish("finished")
    chosen = config.env.id if ":" in config.env.id else config.env.name
    print(f"weights {path}\nuse them: shoal train env={chosen} policy.init={path}")
    return 0


def _new_folder(config: TrainConfig) -> RunFolder:
    folder = RunFolder.create(config.run.root, config.env.name, "sft", config.run.name)
    folder.write_config(resolved_yaml(config))
    return folder
