"""From an environment's id to the environment, in any process.

Ids: a built-in one; one that an installed package offers in the entry-point group `shoal.envs`; "module:Id-v0" (the
module calls gymnasium.register); "module:Class". Nothing is registered at import, so a fresh worker process finds
exactly what the driver found.
"""

import difflib
import functools
import hashlib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import gymnasium

from envs.base import AgentEnv
from envs.declared import reserved_names
from envs.errors import AuthorExit, MalformedEnvironment, UnknownEnvironment, described, error_text
from envs.forked_children import ForkedChildren
from envs.tool import tool_names, tools_of_class
from envs.worker_thread import as_exception

BUILT_IN: Mapping[str, str] = {
    "Calculator-v0": "envs.library.calculator:Calculator",
    "ToolGate-v0": "envs.library.tool_gate:ToolGate",
    "ShopDB-v0": "envs.library.shop_db:ShopDB",
    "Bank-v0": "envs.library.bank:Bank",
    "ShellBox-v0": "envs.library.shell_box:ShellBox",
    "HelpDesk-v0": "envs.library.help_desk:HelpDesk",
    "WorldSearch-v0": "envs.library.world_search:WorldSearch",
    "ApiDesk-v0": "envs.library.api_desk:ApiDesk",
    "GridQuest-v0": "envs.library.grid_quest:GridQuest",
    "PyCode-v0": "envs.library.py_code:PyCode",
    "DataLab-v0": "envs.library.data_lab:DataLab",
    "ChartQA-v0": "envs.library.chart_qa:ChartQA",
    "ClickUI-v0": "envs.library.click_ui:ClickUI",
}
ENTRY_POINT_GROUP = "shoal.envs"


def make_env(env_id: str, /, **kwargs: Any) -> AgentEnv:
    """Make an environment; kwargs go to its constructor.

    Raises UnknownEnvironment or MalformedEnvironment, whose text says what to do; the author's constructor may raise.
    """
    return construct(env_id, find_class(env_id), kwargs)


def list_envs() -> list[str]:
    """Ids that work without naming a module: built-in ones and those of installed packages."""
    return sorted(_offered())


def find_class(env_id: str) -> type[AgentEnv]:
    """Import an environment's class and check it."""
    owner = _load(env_id)
    check_class(env_id, owner)
    return owner


def environment_facts(env_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a run's manifest says of its environments, by id: class, version, sha256 of the class's module."""
    facts: dict[str, dict[str, Any]] = {}
    for env_id in env_ids:
        owner = find_class(env_id)
        source = inspect.getsourcefile(owner)
        facts[env_id] = {
            "class": f"{owner.__module__}:{owner.__qualname__}",
            "version": owner.version,
            "sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else None,
        }
    return facts


def construct(env_id: str, owner: type[AgentEnv], kwargs: Mapping[str, Any]) -> AgentEnv:
    """Call the constructor, and give the instance a gymnasium spec whose entry point is text.

    Raises MalformedEnvironment, and what the constructor raises; AuthorExit for what is no Exception.
    """
    check_arguments(env_id, owner, kwargs)
    children = ForkedChildren()
    try:
        with children.watched():
            env = owner(**kwargs)
    except BaseException as error:
        children.end()
        raise as_exception(error)  # noqa: B904  # most often it is the same error
    env.adopt_children(children)
    gym_id = env_id.split(":")[-1]
    if gym_id not in gymnasium.registry and re.fullmatch(r"[\w.-]+-v\d+", gym_id):
        gymnasium.register(gym_id, entry_point=f"{owner.__module__}:{owner.__qualname__}")
    env.spec = gymnasium.registry.get(gym_id)
    return env


def check_arguments(env_id: str, owner: type[AgentEnv], kwargs: Mapping[str, Any]) -> None:
    """Raise MalformedEnvironment, saying which there are, unless the constructor takes these arguments."""
    try:
        inspect.signature(owner).bind(**kwargs)
    except TypeError as error:
        known = ", ".join(inspect.signature(owner).parameters)
        raise MalformedEnvironment(f"{env_id}: {error}; its arguments are: {known}") from None


def check_class(env_id: str, owner: object) -> None:
    """Raise MalformedEnvironment, saying what is missing, unless `owner` can be hosted."""
    if not (isinstance(owner, type) and issubclass(owner, AgentEnv)):
        raise MalformedEnvironment(f"{env_id}: {owner!r:.200} is not a subclass of envs.base.AgentEnv")
    name = f"{env_id}: {owner.__qualname__}"
    if inspect.isabstract(owner):
        raise MalformedEnvironment(f"{name} is abstract")
    for method, signature, count in (("task", "task(self, rng, level)", 3), ("reward", "reward(self, answer)", 2)):
        function = inspect.getattr_static(owner, method)
        if function is inspect.getattr_static(AgentEnv, method):
            raise MalformedEnvironment(f"{name} defines no {signature}")
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError:
            raise MalformedEnvironment(f"{name}.{method} must take {signature}") from None
    _check_tools(name, owner)


def _check_tools(name: str, owner: type[AgentEnv]) -> None:
    reserved = reserved_names()
    for taken in sorted(reserved & tool_names(owner)):
        raise MalformedEnvironment(
            f"{name}: a tool cannot be called {taken!r}, for that is an attribute of every environment; rename the "
            f"method, for example do_{taken.strip('_')}"
        )
    for tool in tools_of_class(owner):
        limit_s = tool.options.timeout_s or 0.0
        if limit_s > owner.step_timeout_s:
            raise MalformedEnvironment(
                f"{name}: tool {tool.spec.name} may take timeout_s = {limit_s:g} s, but a step ends after "
                f"step_timeout_s = {owner.step_timeout_s:g} s; set step_timeout_s = {limit_s:g} or more on the class"
            )
    if owner.tool_timeout_s != AgentEnv.tool_timeout_s and owner.tool_timeout_s > owner.step_timeout_s:
        raise MalformedEnvironment(
            f"{name}: a tool call may take tool_timeout_s = {owner.tool_timeout_s:g} s, but a step ends after "
            f"step_timeout_s = {owner.step_timeout_s:g} s; set step_timeout_s = {owner.tool_timeout_s:g} or more"
        )


@functools.cache  # reads the metadata of every installed package: 10 ms and more
def _offered() -> Mapping[str, str]:
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}
    return {**installed, **BUILT_IN}


def _load(env_id: str) -> Any:
    offered = _offered()
    if env_id in offered:
        return _attribute(env_id, *offered[env_id].split(":", 1))
    module, _, name = env_id.rpartition(":")
    if module and _import(env_id, module) and name not in gymnasium.registry:
        return _attribute(env_id, module, name)
    if name not in gymnasium.registry:
        near = difflib.get_close_matches(env_id, offered, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownEnvironment(
            f"no environment {env_id!r}{hint} Known: {', '.join(sorted(offered))}, or 'module:Class'."
        )
    entry_point = gymnasium.registry[name].entry_point
    if isinstance(entry_point, str):
        return _attribute(env_id, *entry_point.split(":", 1))
    return entry_point


def _attribute(env_id: str, module: str, name: str) -> Any:
    target = _import(env_id, module)
    try:
        for part in name.split("."):
            target = inspect.getattr_static(target, part)
    except AttributeError:
        near = difflib.get_close_matches(name, dir(target), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownEnvironment(f"no environment {env_id!r}: module {module} has no {name!r}{hint}") from None
    return target


def _import(env_id: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not (module == missing or module.startswith(f"{missing}.")):
            raise MalformedEnvironment(f"{env_id}: importing {module} failed: {error}") from error
        if os.getcwd() not in sys.path:  # console scripts do not look into the working directory
            sys.path.append(os.getcwd())
            importlib.invalidate_caches()
            return _import(env_id, module)
        raise UnknownEnvironment(f"no environment {env_id!r}: there is no module {missing!r}") from None
    except BaseException as error:  # the author's module may raise anything
        raised = as_exception(error)
        text = error_text(raised) if isinstance(raised, AuthorExit) else described(raised)
        raise MalformedEnvironment(f"{env_id}: importing {module} raised {text}") from error
