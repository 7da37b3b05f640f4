"""Environments of TRL's `environment_factory`, both ways.

In: `Counter = from_trl(CounterEnv, prompt="Count to three.")`. CounterEnv has `reset(**row) -> str | None`, public
methods with types (the tools) and `get_reward() -> float`.

Out: `GRPOTrainer(environment_factory=trl_environment_factory("Calculator-v0"), ...)`. TRL never hands the last text to
the environment, so the answer is a tool too: `submit`. Rows of the dataset may carry `seed` and `level`; the members of
a group share a row and therefore the problem, so give every row a seed (`trl_rows`). Images go out as TRL's blocks.
"""

import importlib
import inspect
import io
import json
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

from envs.adapters.extra import load_extra
from envs.adapters.preset import preset
from envs.base import AgentEnv, call, say
from envs.errors import MalformedEnvironment
from envs.message import ContentPart, ImagePart, Message, TextPart, ToolSpec
from envs.registry import make_env
from envs.task import Problem
from envs.tool import Tool

Content = str | list[dict[str, Any]]
"""What TRL shows a policy: text; or blocks, {"type": "text", "text": str} and {"type": "image", "image": PIL's}."""
NOT_TOOLS = ("reset", "get_reward")
_TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}


def from_trl(factory: Callable[[], Any] | str, /, *, name: str = "", **arguments: Any) -> "type[TrlEnv]":
    """An environment class for a TRL environment class, or "module:Class"; `arguments` are those of TrlEnv."""
    name = name or (factory.rpartition(":")[2] if isinstance(factory, str) else getattr(factory, "__name__", "TrlEnv"))
    return preset(TrlEnv, name, {"factory": factory, **arguments})


class TrlEnv(AgentEnv):
    """A TRL environment. In YAML: id envs.adapters.trl_env:TrlEnv, kwargs.factory my_module:CounterEnv."""

    levels: ClassVar[int] = 10
    reward_range: ClassVar[tuple[float, float]] = (-1e9, 1e9)
    max_turns = 16

    def __init__(
        self,
        *,
        factory: Callable[[], Any] | str,
        prompt: str = "",
        row: Callable[[random.Random, int], Mapping[str, Any]] | None = None,
        max_turns: int | None = None,
    ) -> None:
        """`row` makes a dataset row from (rng, level); by default {"seed": ..., "level": ...}, as far as reset takes
        them. A row's "prompt" replaces `prompt`; what reset returns is appended."""
        super().__init__(max_turns=max_turns)
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = cast(Callable[[], Any], getattr(importlib.import_module(module), attribute))
        self._inner = factory()
        for method in NOT_TOOLS:
            if not callable(getattr(self._inner, method, None)):
                raise MalformedEnvironment(f"{type(self._inner).__name__} has no {method}()")
        self._prompt, self._row = prompt, row

    def task(self, rng: random.Random, level: int) -> Problem:
        row = self._default_row(rng, level) if self._row is None else dict(self._row(rng, level))
        shown = self._inner.reset(**row)
        if not isinstance(shown, str | None):
            raise MalformedEnvironment(
                f"{type(self._inner).__name__}.reset() returned {type(shown).__name__}, not text"
            )
        self._first_text = f"{row.get('prompt', self._prompt)}{shown or ''}"
        return Problem(prompt=self._first_text or "Use the tools.")

    def tools(self) -> dict[str, Tool]:
        names = [name for name, _ in inspect.getmembers(type(self._inner), inspect.isfunction)]
        offered = [name for name in names if name not in NOT_TOOLS and not name.startswith("_")]
        return {name: Tool.from_function(getattr(self._inner, name)) for name in offered}

    async def reward(self, answer: str) -> float:
        value = await self.run_author(self._inner.get_reward)
        return value

    def hidden_state(self) -> str:
        return json.dumps([type(self._inner).__qualname__, self.seed])

    def _default_row(self, rng: random.Random, level: int) -> dict[str, Any]:
        row = {"seed": rng.getrandbits(31), "level": level}
        parameters = inspect.signature(self._inner.reset).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return row if takes_all else {key: value for key, value in row.items() if key in parameters}


def trl_environment_factory(env_id: str, /, *, level: int = 0, **kwargs: Any) -> type:
    """A class for TRL's `environment_factory`: the environment's tools and `submit` as methods, its reward.

    `level` is used where a row names none; `kwargs` go to the environment's constructor. The tools are those of
    (seed 0, level). Raises what making the environment raises, and MalformedEnvironment for a tool TRL cannot take.
    """
    env = make_env(env_id, **kwargs)
    try:
        _, info = env.reset(seed=0, options={"level": level})
    finally:
        env.close()
    members: dict[str, Any] = {"_env_id": env_id, "_level": level, "_kwargs": kwargs, "__doc__": type(env).__doc__}
    for spec in info["tools"]:
        if spec.name in (*NOT_TOOLS, "submit") or spec.name.startswith("_"):
            raise MalformedEnvironment(f"{env_id}: TRL has its own meaning for a method {spec.name!r}")
        members[spec.name] = _method(spec)
    return type(type(env).__name__, (_Exported,), members)


def trl_rows(count: int, *, seed: int, level: int = 0) -> list[dict[str, Any]]:
    """Rows of a TRL dataset: an empty prompt, to which the problem is appended, and a seed each."""
    rng = random.Random(f"trl/{seed}")
    prompt = [{"role": "user", "content": ""}]
    return [{"prompt": prompt, "seed": rng.getrandbits(31), "level": level} for _ in range(count)]


class _Exported:
    """What TRL drives. One instance plays one episode after the other."""

    _env_id: ClassVar[str]
    _level: ClassVar[int]
    _kwargs: ClassVar[dict[str, Any]]

    def __init__(self) -> None:
        self._env = make_env(self._env_id, **self._kwargs)
        self._reward: float | None = None

    def reset(self, seed: int | None = None, level: int | None = None, **row: Any) -> Content:
        """Start an episode; returns the problem."""
        self._reward = None
        opening, _ = self._env.reset(seed=seed, options={"level": self._level if level is None else level})
        return _content(opening)

    def submit(self, answer: str) -> str:
        """Give the final answer.

        Args:
            answer: The answer.
        """
        return cast(str, self._stepped(say(str(answer))))  # images, too: a type here is what a model reads in a schema

    def get_reward(self) -> float:
        """The reward; an episode without `submit` is scored as it stands."""
        if self._reward is None:
            from envs.worker_thread import run_sync

            self._reward = sum(run_sync(self._env.score(), self._env.reward_timeout_s).values())
        return self._reward

    def _stepped(self, message: Message) -> Content:
        if self._reward is not None:
            return "error: the episode is over"
        replies, reward, terminated, truncated, _ = self._env.step(message)
        if terminated or truncated:
            self._reward = reward
        return _content(replies) or "done"


def _content(messages: tuple[Message, ...]) -> Content:
    """Text where there is no image. Raises MissingExtra where there is one and no Pillow."""
    parts = [part for message in messages for part in message.content if part != TextPart(text="")]
    if not any(isinstance(part, ImagePart) for part in parts):
        return "\n".join(message.text for message in messages)
    return [_block(part) for part in parts]


def _block(part: ContentPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    return {"type": "image", "image": load_extra("PIL.Image", "images").open(io.BytesIO(part.data))}


def _method(spec: ToolSpec) -> Callable[..., Content]:
    """A method whose signature and docstring TRL turns back into the tool's schema."""
    properties = spec.parameters.get("properties", {})
    required = spec.parameters.get("required", [])

    def method(self: _Exported, **arguments: Any) -> Content:
        return self._stepped(call(spec.name, **arguments))

    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for name, schema in sorted(properties.items(), key=lambda item: item[0] not in required):
        default = inspect.Parameter.empty if name in required else schema.get("default")
        kind: Any = _TYPES.get(str(schema.get("type")), str)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=kind)
        )
    lines = [f"    {name}: {schema.get('description', name)}" for name, schema in properties.items()]
    method.__name__ = spec.name
    method.__doc__ = "\n".join([spec.description or spec.name, *(["", "Args:", *lines] if lines else [])])
    cast(Any, method).__signature__ = inspect.Signature(parameters, return_annotation=str)
    method.__annotations__ = {p.name: p.annotation for p in parameters[1:]} | {"return": str}
    return method
