"""Loss, advantage and optimizer are chosen by a built-in name or by the import path of a user's own function."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def choose(what: str, name: str, builtin: Mapping[str, F]) -> F:
    """The function called `name`. Raises `ValueError` naming `what`, the value and what is allowed.

    Example: choose("loss", "clipped", LOSSES), choose("loss", "my_lab.losses:cispo", LOSSES)
    """
    if name in builtin:
        return builtin[name]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        near = get_close_matches(name, builtin, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}.{hint} Allowed: {', '.join(builtin)} or 'module:function'")
    try:
        function = import_module(module)
        for part in attribute.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"{what} {name!r} is a {type(function).__name__}, not a function")
    return function  # type: ignore[return-value]  # a user's own function: only its call can show its type
