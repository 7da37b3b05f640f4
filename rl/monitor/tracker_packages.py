"""Trackers whose package is not installed: found before a run starts, for it would lose every line of theirs."""

from collections.abc import Callable
from importlib.util import find_spec

from conf.keys import ConfigError
from conf.schema import MonitorConfig

PACKAGES = {"tensorboard": "tensorboardX", "trackio": "trackio", "prometheus": "prometheus_client", "wandb": "wandb"}
"""Tracker -> the module that it writes with; the extra of Shoal that brings it has the tracker's name."""


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # somebody put None or a module without a spec into sys.modules
        return False


def check_trackers(monitor: MonitorConfig, *, is_installed: Callable[[str], bool] = _is_installed) -> None:
    """Raises `ConfigError`, naming the setting and the command that installs what is missing."""
    asked = {f"monitor.trackers=[{name}]": name for name in monitor.trackers}
    if monitor.prometheus_port:
        asked[f"monitor.prometheus_port={monitor.prometheus_port}"] = "prometheus"
    if monitor.wandb != "disabled":
        asked[f"monitor.wandb={monitor.wandb}"] = "wandb"
    for setting, tracker in asked.items():
        if not is_installed(PACKAGES[tracker]):
            extra = "wandb" if tracker == "wandb" else f"'shoal[{tracker}]'"
            raise ConfigError(f"{setting} needs {PACKAGES[tracker]}, which is not installed: pip install {extra}")
