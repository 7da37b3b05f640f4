"""What a well-formed config may still not say: values out of range, impossible combinations, settings without effect.

Ranges and choices are tables; what settings say together stands in combinations.py, what this machine lacks in
machine.py. Everything raises `ConfigError`, whose message names the key, the value and what would be right.
"""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from math import inf

from conf.combinations import combination_problems
from conf.keys import ConfigError, lookup, nearest
from conf.schema import TrainConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "curriculum.sampler": ("fixed", "uniform", "levels", "pool"),
    "curriculum.gate": ("none", "zero_variance"),
    "policy.kind": ("hybrid", "hf"),
    "policy.dialect": ("tiny", "qwen3_5", "chat_template"),
    "engine.kind": ("local", "vllm"),
    "engine.vllm.process": ("inproc", "core"),
    "engine.vllm.dtype": ("bfloat16", "float16", "float32", "auto"),
    "engine.vllm.kv_cache_dtype": ("auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    "engine.vllm.transport": ("objects", "files", "broadcast"),
    "rollout.lock": ("none", "turn", "trajectory", "group"),
    "rollout.cache_policy": ("keep", "recompute"),
    "learner.optimizer.schedule": ("constant", "cosine"),
    "learner.loss.normalise": ("token", "sequence", "horizon"),
    "learner.loss.anchor": ("rollout", "proximal"),
    "cluster.kind": ("ray", "inprocess"),
    "cluster.layout": ("separate", "shared"),
    "cluster.strategy": ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"),
    "monitor.wandb": ("offline", "online", "disabled"),
}
CHOICES_OF_LISTS: dict[str, tuple[str, ...]] = {"monitor.trackers": ("tensorboard", "trackio")}
"""Any of these names, each once."""
CHOICES_OR_IMPORT: dict[str, tuple[str, ...]] = {
    "learner.optimizer.name": ("adamw",),
    "learner.loss.advantage": ("grpo", "dr_grpo"),
    "learner.loss.name": ("clipped", "gspo"),
}
"""One of these names, or "module:function" of the user's own."""

RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "steps": (1, inf),
    "env.level": (0, 9),
    "env.tool_cost": (0, inf),
    "curriculum.min_level": (0, 9),
    "curriculum.max_level": (0, 9),
    "curriculum.window": (2, 100),
    "curriculum.promote": (0, 1),
    "curriculum.demote": (0, 1),
    "curriculum.probe": (0, 20),
    "curriculum.floor": (0, 1),
    "curriculum.pool_size": (1, inf),
    "curriculum.max_refill": (0, 1000),
    "env.tool_cost_below": (0, 1),
    "engine.max_running": (1, inf),
    "engine.max_sessions": (1, inf),
    "engine.max_model_tokens": (2, inf),
    "engine.threads": (1, inf),
    "engine.vllm.kv_cache_mib": (1, inf),
    "engine.vllm.tensor_parallel": (1, inf),
    "rollout.max_staleness": (0, inf),
    "rollout.groups_per_step": (1, inf),
    "rollout.group_size": (2, inf),
    "agent.processes": (1, 64),
    "rollout.workers": (1, inf),
    "rollout.env_pools": (1, inf),
    "rollout.max_turn_tokens": (1, inf),
    "rollout.max_turns": (0, inf),
    "rollout.max_attempts": (1, inf),
    "learner.optimizer.warmup_steps": (0, inf),
    "learner.optimizer.weight_decay": (0, inf),
    "learner.optimizer.grad_clip": (0, inf),
    "learner.optimizer.max_skipped_steps": (0, inf),
    "learner.loss.clip_low": (0, 1),
    "learner.loss.clip_high": (0, inf),
    "learner.loss.tis_cap": (0, inf),
    "learner.loss.entropy_bonus": (0, inf),
    "learner.updates_per_step": (1, inf),
    "learner.micro_batch_tokens": (1, inf),
    "learner.publish_every": (1, inf),
    "learner.threads": (1, inf),
    "learner.self_check_tolerance": (0, inf),
    "evaluation.every": (0, inf),
    "evaluation.tasks": (1, inf),
    "evaluation.final_tasks": (1, inf),
    "evaluation.temperature": (0, inf),
    "evaluation.seed": (0, 2**31 - 1),
    "evaluation.level": (-1, 9),
    "cluster.num_cpus": (0, inf),
    "cluster.learner_gpus": (0, 1),
    "cluster.worker_gpus": (0, inf),
    "monitor.log_every": (1, inf),
    "monitor.samples_every": (0, inf),
    "monitor.prometheus_port": (0, 65535),
    "monitor.alerts.steps": (1, inf),
    "monitor.alerts.mismatch_kl": (0, inf),
    "monitor.alerts.entropy_floor": (0, inf),
    "monitor.alerts.grad_spike": (0, inf),
    "monitor.alerts.zero_variance_steps": (0, inf),
    "monitor.alerts.env_error_ratio": (0, 1),
    "monitor.alerts.no_tool_steps": (0, inf),
    "monitor.alerts.heartbeat_s": (0, inf),
    "monitor.alerts.no_step": (0, inf),
    "monitor.alerts.no_step_min_s": (0, inf),
    "run.checkpoint_every": (1, inf),
    "run.keep_checkpoints": (1, inf),
    "env.max_running": (1, inf),
    "env.recycle_mib": (0, inf),
    "env.recycle_episodes": (0, inf),
    "sft.steps": (1, inf),
    "sft.batch_size": (1, inf),
    "sft.warmup_steps": (0, inf),
    "sft.noise_from_level": (0, 10),
}
"""Lowest and highest allowed value, both included."""

POSITIVE = (
    "env.tool_cost_below",
    "curriculum.max_refill",
    "rollout.temperature",
    "rollout.episode_deadline_s",
    "env.reset_timeout_s",
    "env.step_timeout_s",
    "env.reward_timeout_s",
    "learner.optimizer.lr",
    "learner.optimizer.eps",
    "learner.step_timeout_s",
    "cluster.start_timeout_s",
    "cluster.heartbeat_s",
    "cluster.stall_timeout_s",
    "sft.lr",
)
FRACTIONS = ("learner.optimizer.beta1", "learner.optimizer.beta2")
"""At least 0, less than 1."""

ENV_ID = re.compile(r"[\w-]+-v\d+|[A-Za-z_][\w.]*:[A-Za-z_][\w.-]*")
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
NAME = re.compile(r"\w[\w.-]*")
RUN_NAME = re.compile(r"[a-z0-9-]+")
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
MIN_SECRET_CHARS = 6
"""Shorter values also occur by chance, and taking them out would destroy texts."""


def check_config(config: TrainConfig) -> None:
    """Raise `ConfigError` at the first value or combination that cannot be meant. Looks at nothing but the config."""
    _check_choices(config)
    _check_numbers(config)
    _check_names(config)
    for problem in combination_problems(config):
        raise ConfigError(problem)


def _check_choices(config: TrainConfig) -> None:
    for key, options in CHOICES.items():
        value = lookup(config, key)
        if value not in options:
            raise ConfigError(f"{key}={value!r} is unknown.{nearest(value, options)} Allowed: {', '.join(options)}")
    for key, options in CHOICES_OF_LISTS.items():
        values = lookup(config, key)
        for value in values:
            if value not in options:
                raise ConfigError(
                    f"{key}: {value!r} is unknown.{nearest(value, options)} Allowed: {', '.join(options)}"
                )
            if values.count(value) > 1:
                raise ConfigError(f"{key}: {value!r} is there {values.count(value)} times")
    for key, options in CHOICES_OR_IMPORT.items():
        value = lookup(config, key)
        if value in options:
            continue
        if not IMPORT_PATH.fullmatch(value):
            hint = f"{nearest(value, options)} Allowed: {', '.join(options)} or module:function"
            raise ConfigError(f"{key}={value!r} is unknown.{hint}")
        _check_importable(key, value)


def _check_importable(key: str, value: str) -> None:
    package = value.split(":")[0].split(".")[0]
    if find_spec(package) is None:
        raise ConfigError(f"{key}={value!r}: no module named {package!r} can be imported from here")


def _check_numbers(config: TrainConfig) -> None:
    for key, (low, high) in RANGES.items():
        value = lookup(config, key)
        if not low <= value <= high:
            allowed = f"at least {low}" if high == inf else f"{low} to {high}"
            raise ConfigError(f"{key}={value} is out of range: must be {allowed}")
    for key in POSITIVE:
        if lookup(config, key) <= 0:
            raise ConfigError(f"{key}={lookup(config, key)} is out of range: must be more than 0")
    for key in FRACTIONS:
        if not 0 <= lookup(config, key) < 1:
            raise ConfigError(f"{key}={lookup(config, key)} is out of range: must be at least 0 and less than 1")
    for name, entry in config.env.mix.items():
        if entry.weight <= 0:
            raise ConfigError(f"env.mix.{name}.weight={entry.weight} is out of range: must be more than 0")
        if not 0 <= entry.level <= 9:
            raise ConfigError(f"env.mix.{name}.level={entry.level} is out of range: must be 0 to 9")
    names = list(config.env.mix) or [config.env.name]
    for name, pace in config.env.steps_per_second.items():
        if name not in names:
            known = ", ".join(names)
            raise ConfigError(f"env.steps_per_second: no environment is named {name!r}; there is {known}")
        if not pace > 0:
            raise ConfigError(f"env.steps_per_second.{name}={pace} is out of range: must be more than 0")


def _check_names(config: TrainConfig) -> None:
    for key, name in [("env.name", config.env.name), *(("env.mix", name) for name in config.env.mix)]:
        if not NAME.fullmatch(name):
            raise ConfigError(f"{key}: the name {name!r} may hold letters, digits, '_', '.' and '-' only")
    if config.run.name and (not RUN_NAME.fullmatch(config.run.name) or config.run.name == "latest"):
        raise ConfigError(f"run.name={config.run.name!r} must be made of a-z, 0-9 and '-', and not be 'latest'")
    ids = {f"env.mix.{name}.id": entry.id for name, entry in config.env.mix.items()} or {"env.id": config.env.id}
    for key, value in ids.items():
        if not value:
            raise ConfigError(f"{key} is missing: give an id such as Calculator-v0 or module:MyEnv-v0")
        if not ENV_ID.fullmatch(value):
            raise ConfigError(f"{key}={value!r} is no environment id: write Name-v0, module:Name-v0 or module:Class")
        if ":" in value:
            _check_importable(key, value)


def secret_values(names: Sequence[str]) -> dict[str, str]:
    """Values of the variables that `env.secrets` names. Raises `ConfigError`, which shows none of them."""
    for number, name in enumerate(names, start=1):
        if not VARIABLE.fullmatch(name):
            raise ConfigError(
                f"env.secrets: entry {number} is no name of an environment variable (it is not shown here, it may be "
                "the secret itself). Write the name: env.secrets=[JUDGE_KEY]"
            )
        if name not in os.environ:
            raise ConfigError(f"env.secrets names {name}, but no environment variable {name} is set: export it first")
        if len(os.environ[name].strip()) < MIN_SECRET_CHARS:
            raise ConfigError(
                f"env.secrets: the value of {name} has fewer than {MIN_SECRET_CHARS} characters. It would be taken out "
                "wherever it occurs, also by chance: choose a longer one"
            )
    return {name: os.environ[name] for name in names}
