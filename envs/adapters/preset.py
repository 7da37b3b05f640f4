"""An adapter's class with some of its arguments filled in, so that one line makes an environment with an id."""

import inspect
import sys
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from envs.base import AgentEnv

Env = TypeVar("Env", bound=AgentEnv)


def preset(owner: type[Env], name: str, arguments: Mapping[str, Any], *, levels: int | None = None) -> type[Env]:
    """A subclass of `owner` whose constructor takes `arguments` where the caller gives nothing else.

    It belongs to the module that called `from_x(...)`: `MyTaxi = from_gymnasium("Taxi-v4")` in my_envs.py is the
    environment "my_envs:MyTaxi". Raises TypeError for an argument that `owner` does not have.
    """
    signature = inspect.signature(owner)
    signature.bind_partial(**arguments)

    def __init__(self: Env, **kwargs: Any) -> None:
        owner.__init__(self, **{**arguments, **kwargs})

    parameters = [
        parameter.replace(default=arguments.get(parameter.name, parameter.default))
        for parameter in signature.parameters.values()
    ]
    members: dict[str, Any] = {
        "__init__": __init__,
        "__module__": sys._getframe(2).f_globals.get("__name__", owner.__module__),
        "__doc__": owner.__doc__,
        "__signature__": signature.replace(parameters=parameters),  # a wrong argument is told the right ones
    }
    if levels is not None:
        members["levels"] = levels
    return cast(type[Env], type(name, (owner,), members))
