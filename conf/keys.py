"""Names of settings: where a value stands, which key was meant, and the error of whatever a user typed wrong."""

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any


class ConfigError(ValueError):
    """Raised for whatever a user typed wrong in a config. The message is one line and names the key."""


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
