"""From words on the command line to a checked `TrainConfig`, or one `ConfigError` that says what to type instead.

Hydra composes the YAML groups and knows nothing of the schema; the dataclasses are then built here, strictly. Unknown
keys, wrong types, values out of range, settings without effect and impossible combinations stop before anything starts.
Precedence, low to high: conf/schema.py, YAML groups, train.yaml, experiment, command line.

Example: load_config(["env=tool_gate", "rollout.max_staleness=0"]).rollout.max_staleness -> 0
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, is_dataclass
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.checks import ENV_ID, check_config
from conf.keys import ConfigError, leaf_keys, nearest
from conf.machine import check_machine
from conf.schema import TrainConfig

CONF_FOLDER = Path(__file__).parent
GROUPS = ("env", "curriculum", "policy", "engine", "rollout", "learner", "cluster", "monitor", "experiment")
REPLACED = {"monitor.tensorboard": "monitor.trackers=[tensorboard]"}
"""Key that is no more -> what is written instead, where no likeness of names tells it."""
CODE_KEY = re.compile(r"(^|\.)_(target|args|partial|recursive|convert)_$")


def load_config(
    argv: Sequence[str],
    *,
    config_name: str = "train",
    search_paths: Sequence[str | Path] = (),
    ignored: Sequence[str] = (),
) -> TrainConfig:
    """Compose, build and check.

    `argv` holds hydra overrides ("env=shop_db", "steps=200", "env.mix.shop_db.weight=2"); "env=module:Id-v0" stands for
    env=custom with that id. `search_paths` are folders of the user with more YAML in the same groups. A leading "+" or
    "++" is allowed and changes nothing: the schema decides which keys exist. `ignored` are beginnings of words that
    mean nothing to the command at hand ("sft.", "steps="); giving one is an error.
    """
    folders = [CONF_FOLDER, *(Path(path) for path in search_paths)]
    for folder in folders[1:]:
        if not folder.is_dir():
            raise ConfigError(f"config folder {str(folder)!r} does not exist")
    overrides = _parse(argv)
    for override in overrides:
        if f"{override.key_or_group}=".startswith(tuple(ignored)):
            raise ConfigError(f"{override.input_line!r} has no effect on this command")
    words = [word for override in overrides for word in _hydra_words(override, folders)]
    if len(folders) > 1:
        words.append("hydra.searchpath=[" + ",".join(f"'file://{folder.absolute()}'" for folder in folders[1:]) + "]")
    config = _checked(_compose(config_name, words))
    check_machine(config)
    return config


def read_config(text: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config a run left behind, as `resolved_yaml` wrote it, with single keys changed ("steps=200").

    Whole groups cannot be chosen again: the run already has its environment and its model.
    """
    try:
        tree: Any = OmegaConf.create(text)
        for override in _parse(overrides):
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line!r} lists several values; one run has one")
            key = str(override.key_or_group)
            if key in GROUPS:
                raise ConfigError(
                    f"{key}={override.value()} chooses a group again: change single keys of the run instead"
                )
            _check_key(key)
            OmegaConf.update(tree, key, override.value(), force_add=True)
        return _checked(_container(tree))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_one_line(error)) from None


def resolved_yaml(config: TrainConfig) -> str:
    """Every setting with its value, in the order of the schema; `read_config` reads it back unchanged."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def expand_sweep(argv: Sequence[str]) -> list[list[str]]:
    """Every combination of the listed values.

    Example: expand_sweep(["env=shop_db", "seed=1,2"]) -> [["env=shop_db", "seed=1"], ["env=shop_db", "seed=2"]]
    """
    choices: list[list[str]] = []
    for override in _parse(argv):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    return [list(combination) for combination in product(*choices)]


def options_of(group: str, folders: Sequence[Path] = (CONF_FOLDER,)) -> list[str]:
    """Names of a group's YAML files, in all config folders."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


# --- the command line -----------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str]) -> list[Override]:
    parser, overrides = OverridesParser.create(), []
    for word in argv:
        if not re.match(r"[~+]{0,2}[^=\s]+=", word):
            raise ConfigError(f"{word!r} is not key=value")
        try:
            overrides.append(parser.parse_override(word))
        except HydraException as error:
            raise ConfigError(f"{word!r} cannot be read: {str(error).splitlines()[0]}") from None
    return overrides


def _hydra_words(override: Override, folders: Sequence[Path]) -> list[str]:
    """One override of the user as hydra shall read it, after the key and a group's option were checked."""
    key, text = str(override.key_or_group), str(override.input_line).split("=", 1)[1]
    if override.is_sweep_override():
        raise ConfigError(f"{override.input_line!r} lists several values: add -m to run each of them")
    if override.is_delete():
        raise ConfigError(f"{override.input_line!r}: keys cannot be deleted, only set")
    if key == "env" and ENV_ID.fullmatch(text):
        return ["env=custom", f"++env.id='{text}'", f"++env.name={_short_name(text)}"]
    if key in GROUPS:
        options = options_of(key, folders)
        if text != "null" and text not in options:
            raise ConfigError(f"unknown {key} {text!r}.{nearest(text, options, 0.4)} Available: {', '.join(options)}")
        return [f"{key}={text}"]
    _check_key(key)
    return [f"++{key}={text}"]  # hydra's own check of keys knows only the YAML, which holds but what differs


def _short_name(env_id: str) -> str:
    """Example: _short_name("my_envs.games:TicTacToe-v2") -> "tic_tac_toe" """
    name = env_id.rsplit(":", 1)[-1].rsplit("-v", 1)[0].replace("-", "_")
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _check_key(key: str) -> None:
    """Raise unless the schema has the key, or it lies inside a mapping whose keys are free."""
    _refuse_code(key)
    kind: Any = TrainConfig
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        if kind is Any:
            return
        if not is_dataclass(kind) or part not in get_type_hints(kind):
            raise ConfigError(_unknown_key(key, ".".join(parts[:depth])))
        kind = get_type_hints(kind)[part]


def _unknown_key(key: str, section: str) -> str:
    if key in REPLACED:
        return f"unknown key {key!r}. Write {REPLACED[key]} instead"
    known = [*leaf_keys(TrainConfig()), *GROUPS]
    if section.startswith("env.mix."):
        known = [f"{section}.{name}" for name in ("id", "weight", "level", "kwargs")]
    return f"unknown key {key!r}.{nearest(key, known)}"


# --- composing and building -----------------------------------------------------------------------------------------


def _compose(config_name: str, words: Sequence[str]) -> dict[str, Any]:
    try:
        with initialize_config_module("conf", version_base="1.3"):
            composed = compose(config_name, overrides=list(words))
        for key, value in _walk(OmegaConf.to_container(composed)):
            if value == "???":  # merged below, it would let the default through
                raise ConfigError(f"{key} is missing: a config asks for it and nothing gives it")
        # over the defaults, so that ${steps} finds what no YAML sets
        return _container(OmegaConf.merge(OmegaConf.create(asdict(TrainConfig())), composed))
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        raise ConfigError(_one_line(error)) from None


def _container(tree: Any) -> dict[str, Any]:
    container = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    if not isinstance(container, dict):
        raise ConfigError("a config is a mapping of keys to values")
    return {str(key): value for key, value in container.items()}


def _checked(tree: dict[str, Any]) -> TrainConfig:
    for key, _ in _walk(tree):
        _refuse_code(key)
    config = _build(TrainConfig, tree, "")
    check_config(config)
    return config


def _build(kind: Any, value: Any, key: str) -> Any:
    """`value` as `kind`, or `ConfigError` naming `key`. Kinds: dataclass, dict[str, kind],
    tuple[kind, ...], int, float, bool, str."""
    if is_dataclass(kind):
        return _build_section(kind, value, key)
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key}={value!r} must be a mapping, such as {{name: value}}")
        return {str(name): _build(get_args(kind)[1], item, f"{key}.{name}") for name, item in value.items()}
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):  # not shown: it may be a secret where its name was wanted
            raise ConfigError(f"{key} must be a list, such as [A, B]")
        return tuple(_build(get_args(kind)[0], item, f"{key}.{i}") for i, item in enumerate(value))
    if kind is Any:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
        return float(value)
    if kind is str and isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}[kind]
    raise ConfigError(f"{key}={value!r} must be {expected}")


def _build_section(kind: Any, value: Any, key: str) -> Any:
    prefix = f"{key}." if key else ""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key}={value!r} is a section: set its keys, such as {prefix}{fields(kind)[0].name}")
    kinds = get_type_hints(kind)
    for name in value:
        if str(name) not in kinds:
            raise ConfigError(_unknown_key(f"{prefix}{name}", key))
    for item in fields(kind):
        if item.name not in value and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{prefix}{item.name} is missing")
    return kind(**{name: _build(kinds[name], item, f"{prefix}{name}") for name, item in value.items()})


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, sections and list items included."""
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield f"{prefix}{name}", value
        yield from _walk(value, f"{prefix}{name}.")


def _refuse_code(key: str) -> None:
    """Raise at "_target_" and its like, in free mappings too: configs name no code for hydra to run."""
    if CODE_KEY.search(key):
        raise ConfigError(f"{key!r} is refused: configs hold values, never code to run")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
