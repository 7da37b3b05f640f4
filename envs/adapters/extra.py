"""Packages that only some users have: imported on use; a missing one names the extra to install."""

import importlib
from types import ModuleType

from envs.errors import EnvError


class MissingExtra(EnvError, ImportError):
    """An adapter's package is not installed."""


def load_extra(module: str, extra: str) -> ModuleType:
    """Import `module`. Raises MissingExtra, which names the extra of Shoal that brings it.

    Example: minigrid = load_extra("minigrid", "minigrid")
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is installed, and something it needs itself is not
        raise MissingExtra(f"{module} is not installed: pip install 'shoal[{extra}]'") from None
