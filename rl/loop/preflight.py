"""What a config names outside `conf`, found before any process starts: environments, presets, weights, functions.

No torch is imported, so that `dry_run=true` and errors come at once.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.checks import secret_values
from conf.keys import ConfigError, nearest
from conf.schema import PolicyConfig, TrainConfig
from envs.base import AgentEnv
from envs.declared import declared_timeouts
from envs.registry import find_class
from envs.tool import tool_names
from policy.model.hybrid_config import PRESETS
from policy.model.initial import initial_weights_file
from policy.vllm.packages import VllmMissing, vllm_build
from rl.algorithm.choice import choose
from rl.monitor.tracker_packages import check_trackers
from rollout.dialects.dialect import make_dialect, sees_images


def check_parts(config: TrainConfig, *, trains: bool = True) -> None:
    """Raise `ConfigError`, or the registry's own error for an environment, naming what is wrong.

    `trains` false: no loss is looked for, and no weights unless they are named (`shoal sft` has a loss of its own, and
    makes weights).
    """
    if config.engine.kind == "vllm":
        _check_vllm(config)
    env = config.env
    secret_values(env.secrets)  # first: an environment's module may read them when it is imported
    entries = {f"env.mix.{name}": entry for name, entry in env.mix.items()} or {"env": env}
    for key, entry in entries.items():
        _check_environment(entry.id, entry.kwargs, entry.level, key)
        _check_levels(config, entry.id)
        _check_timeouts(config, entry.id)
        _check_images(entry.id, config.policy, key)
    _check_dialect(config.policy, [find_class(entry.id) for entry in entries.values()])
    if config.policy.kind == "hybrid":
        _check_preset(config.policy.preset, config.policy.overrides)
    if trains or config.policy.init not in ("auto", "random"):
        try:
            initial_weights_file(config.policy, env.name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if not trains:
        return
    check_trackers(config.monitor)
    loss = config.learner.loss
    names = {"loss": loss.name, "advantage": loss.advantage, "optimizer": config.learner.optimizer.name}
    try:
        for what, name in names.items():
            if ":" in name:  # a user's function; the built-in names are known to conf.checks
                choose(what, name, {})
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_vllm(config: TrainConfig) -> None:
    if vllm_build() is None:
        raise ConfigError(f"engine.kind='vllm': {VllmMissing()}")
    dtype = config.engine.vllm.dtype
    if vllm_build() == "cpu" and dtype != "bfloat16":
        raise ConfigError(
            f"engine.vllm.dtype={dtype}: vLLM's CPU build computes linear attention in bfloat16 alone. Allowed here: "
            "bfloat16"
        )


def _check_dialect(policy: PolicyConfig, owners: Sequence[type[AgentEnv]]) -> None:
    """A chat template is asked for a whole conversation now: what it loses is found out late or never."""
    if policy.dialect != "chat_template" or not Path(policy.path, "tokenizer_config.json").is_file():
        return
    try:
        dialect = make_dialect(policy)
        if any(tool_names(owner) or owner.tools is not AgentEnv.tools for owner in owners):
            dialect.check_tools()
    except ValueError as error:
        raise ConfigError(f"policy.dialect=chat_template, policy.path={policy.path!r}: {error}") from None


def _check_environment(env_id: str, kwargs: Mapping[str, Any], level: int, key: str) -> None:
    owner = find_class(env_id)
    if level >= owner.levels:
        raise ConfigError(f"{key}.level={level} is out of range: {env_id} has levels 0 to {owner.levels - 1}")
    parameters = inspect.signature(owner).parameters
    free = {p.name for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name, parameter in parameters.items():
        if name not in free and name not in kwargs and parameter.default is parameter.empty:
            raise ConfigError(f"{key}.kwargs.{name} is missing: {env_id} needs it")
    for name in kwargs:
        if name not in parameters and not free:
            hint = nearest(f"{key}.kwargs.{name}", [f"{key}.kwargs.{known}" for known in parameters])
            raise ConfigError(
                f"unknown key '{key}.kwargs.{name}' for {env_id}.{hint} Available: {', '.join(parameters)}"
            )


def _check_images(env_id: str, policy: PolicyConfig, key: str) -> None:
    if find_class(env_id).images and not sees_images(policy):
        raise ConfigError(
            f"{key}.id={env_id} shows images, but a policy of kind {policy.kind!r} with dialect {policy.dialect!r} "
            "reads text only, and there is no policy with vision yet. Choose an environment of text: shoal env list"
        )


def _check_levels(config: TrainConfig, env_id: str) -> None:
    """Levels beside env.level that the environment would be asked for."""
    asked = {"evaluation.level": config.evaluation.level}
    if config.curriculum.sampler in ("uniform", "levels"):
        asked["curriculum.max_level"] = config.curriculum.max_level
    highest = find_class(env_id).levels - 1
    for key, level in asked.items():
        if level > highest:
            raise ConfigError(f"{key}={level} is out of range: {env_id} has levels 0 to {highest}")


def _check_timeouts(config: TrainConfig, env_id: str) -> None:
    """Every wait of a run is computed from its settings, so an environment that needs longer must be given it there."""
    for name, seconds in declared_timeouts(find_class(env_id)).items():
        limit_s = getattr(config.env, name)
        if seconds > limit_s:
            raise ConfigError(
                f"env.{name}={limit_s:g} is less than {name} = {seconds:g} that {env_id} declares: set "
                f"env.{name}={seconds:g} or more"
            )


def _check_preset(preset: str, overrides: Mapping[str, Any]) -> None:
    if preset not in PRESETS:
        near = nearest(preset, PRESETS, 0.4)
        raise ConfigError(f"policy.preset={preset!r} is unknown.{near} Available: {', '.join(PRESETS)}")
    try:
        PRESETS[preset].override(overrides)
    except ValueError as error:
        raise ConfigError(f"policy.overrides: {error}") from None
