"""Any gymnasium environment as a conversation: `Taxi = from_gymnasium("Taxi-v4")`.

The policy calls `act`, whose argument follows the action space; the result is what the environment shows:
  text    its "ansi" picture and its observation, or the observation alone
  image   its "rgb_array" frame, and what of the observation is text (a mission): `from_gymnasium(id, observe="image")`
The reward is the sum of the environment's rewards. A message without a call is answered with a reminder, so that a
policy cannot escape from an environment whose rewards are negative.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import gymnasium
import numpy
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec, load_env_creator

from envs.adapters.extra import load_extra
from envs.adapters.preset import preset
from envs.adapters.world import WorldEnv
from envs.errors import MalformedEnvironment
from envs.message import ImagePart
from envs.task import Problem
from envs.tool import Tool

NAMES_OF_ACTIONS: Mapping[str, tuple[str, ...]] = {
    "Taxi": ("south", "north", "east", "west", "pickup", "dropoff"),
    "FrozenLake": ("left", "down", "right", "up"),
    "FrozenLake8x8": ("left", "down", "right", "up"),
    "CliffWalking": ("up", "right", "down", "left"),
    "CliffWalkingSlippery": ("up", "right", "down", "left"),
    "Blackjack": ("stick", "hit"),
}
"""By the name of an id without its version, for environments that do not name their actions themselves."""
BRACKETS_OF_COLOR = {"34": "()", "35": "<>"}
COLOR_LEGEND = "[ ] highlighted, ( ) blue, < > magenta, { } another color"
MAX_ACTIONS = 64
"""Largest number of discrete actions offered by name; above, the action is an integer."""
DEFAULT_MAX_TURNS = 200
_COLORED = re.compile(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m")
_DESCRIPTION_CHARS = 600


def from_gymnasium(id: str, /, *, observe: Literal["text", "image"] = "text", **arguments: Any) -> "type[GymnasiumEnv]":
    """An environment class for a gymnasium id, e.g. "Taxi-v4" or "minigrid:MiniGrid-Empty-5x5-v0".

    `arguments` are those of GymnasiumEnv. `from_gymnasium("FrozenLake-v1", kwargs={"is_slippery": False})`.
    """
    if observe not in ("text", "image"):
        raise ValueError(f"observe={observe!r} is neither 'text' nor 'image'")
    owner = GymnasiumImageEnv if observe == "image" else GymnasiumEnv
    levels = len(arguments.get("level_kwargs", ())) or 1
    return preset(owner, class_name(id), {"id": id, **arguments}, levels=levels)


def class_name(id: str) -> str:
    """A name for a class made from an id: "minigrid:MiniGrid-Empty-5x5-v0" -> "MiniGrid_Empty_5x5_v0"."""
    return re.sub(r"\W+", "_", id.rpartition(":")[2])


class GymnasiumEnv(WorldEnv):
    """A gymnasium environment. In YAML: id envs.adapters.gymnasium_env:GymnasiumEnv, kwargs.id Taxi-v4."""

    levels: ClassVar[int] = 10
    reward_range: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    wanted_mode: ClassVar[str] = "ansi"
    """The render mode that is observed."""
    env: gymnasium.Env[Any, Any] | None = None

    def __init__(
        self,
        *,
        id: str,
        kwargs: Mapping[str, Any] | None = None,
        level_kwargs: Sequence[Mapping[str, Any]] = (),
        action_names: Sequence[str] = (),
        reward_scale: float = 1.0,
        max_turns: int | None = None,
        latency_median_s: float | None = None,
        latency_sigma: float | None = None,
    ) -> None:
        """kwargs go to gymnasium.make; level_kwargs[i] as well at level i (empty = one level).

        `action_names` name the actions of a discrete space in order; `reward_scale` multiplies the return.
        """
        self._spec = _find_spec(id)
        limit = max_turns or (self._spec.max_episode_steps or DEFAULT_MAX_TURNS)
        super().__init__(max_turns=limit, latency_median_s=latency_median_s, latency_sigma=latency_sigma)
        vars(self)["levels"] = len(level_kwargs) or 1
        self._kwargs, self._level_kwargs = dict(kwargs or {}), [dict(each) for each in level_kwargs]
        self._reward_scale = reward_scale
        self._given_names = tuple(action_names)
        self._made_for: int | None = None

    def task(self, rng, level: int) -> Problem:
        if self.env is None or self._made_for != level:
            self._make(level)
        assert self.env is not None
        self._return = 0.0
        observation, _ = self.env.reset(seed=rng.getrandbits(31))
        text, images = self._show(observation)
        about = _about(self.env)
        colors = f"\nColors are shown as {COLOR_LEGEND}." if self._mode == "ansi" else ""
        prompt = f"{self._spec.name}. {about}\nCall act until the episode ends.{colors}\n{text}".rstrip()
        return Problem(prompt=prompt, images=images)

    def tools(self) -> dict[str, Tool]:
        return {"act": self._act_tool}

    def reward(self, answer: str) -> dict[str, float]:
        return {"return": self._reward_scale * self._return}

    async def on_message(self, text: str) -> str:
        return "call act"

    def hidden_state(self) -> str:
        """Settings that the first picture need not show, and the seed: where a lake slips is drawn from it too."""
        settings = [self._spec.id, self._kwargs, self._level_kwargs[self.level :][:1]]
        return json.dumps([*settings, self.seed], default=str)

    def close(self) -> None:
        if self.env is not None:
            self.env.close()
            self.env = None
        super().close()

    # --- parts ---

    def _make(self, level: int) -> None:
        if self.env is not None:
            self.env.close()
        kwargs = {**self._kwargs, **(self._level_kwargs[level] if self._level_kwargs else {})}
        entry_point = self._spec.entry_point
        creator = load_env_creator(entry_point) if isinstance(entry_point, str) else entry_point
        offered = getattr(creator, "metadata", {}).get("render_modes", [])
        self._mode = self.wanted_mode if self.wanted_mode in offered else None
        if self.images and self._mode is None:
            raise MalformedEnvironment(f"{self._spec.id} renders no rgb_array, only {offered}: observe it as text")
        self.env = gymnasium.make(self._spec, render_mode=self._mode, **kwargs)
        self._made_for = level
        self._names = self._given_names or _action_names(self.env, self._spec.name)
        self._act_tool = _act_tool(self.env.action_space, self._names, self._act)

    def _act(self, action: Any) -> Any:
        assert self.env is not None
        if self.world_ended:
            raise RuntimeError("the episode is over")
        observation, reward, terminated, truncated, _ = self.env.step(self._encoded(action))
        self._return += float(reward)
        if terminated or truncated:
            self.end_world("terminated" if terminated else "truncated")
        text, images = self._show(observation)
        text = f"reward {float(reward):g}{', the end' if self.world_ended else ''}\n{text}".rstrip()
        return [text, *images] if images else text

    def _encoded(self, action: Any) -> Any:
        assert self.env is not None
        space = self.env.action_space
        if isinstance(space, spaces.Discrete):
            number = self._names.index(action) + int(space.start) if self._names else int(action)
        elif isinstance(space, spaces.Box | spaces.MultiDiscrete | spaces.MultiBinary):
            number = numpy.asarray(action, dtype=space.dtype).reshape(cast(Any, space.shape))
        else:
            number = action
        if not space.contains(number):
            raise ValueError(f"{action} is not in {space}")
        return number

    def _show(self, observation: Any) -> tuple[str, tuple[ImagePart, ...]]:
        assert self.env is not None
        if self._mode == "rgb_array":
            texts = [v for v in observation.values() if isinstance(v, str)] if isinstance(observation, dict) else []
            return "\n".join(texts), (ImagePart(data=encode_png(self.env.render())),)
        shown = f"observation {json.dumps(_plain(observation))}"
        if self._mode == "ansi":
            return f"{_without_escapes(str(self.env.render())).rstrip()}\n{shown}", ()
        return shown, ()


class GymnasiumImageEnv(GymnasiumEnv):
    """A gymnasium environment seen through its frames. In YAML: id envs.adapters.gymnasium_env:GymnasiumImageEnv."""

    images: ClassVar[bool] = True
    wanted_mode: ClassVar[str] = "rgb_array"


def encode_png(frame: Any) -> bytes:
    """A PNG of a frame: array (height, width, 3) of uint8. The same frame always gives the same bytes."""
    image = load_extra("PIL.Image", "images")
    stream = io.BytesIO()
    image.fromarray(frame).save(stream, format="PNG")
    return stream.getvalue()


def _find_spec(id: str) -> EnvSpec:
    module = id.rpartition(":")[0]
    if module:
        load_extra(module, module.split(".")[0])
    try:
        return gymnasium.spec(id.rpartition(":")[2])
    except gymnasium.error.Error as error:
        hint = "Ids of other packages are 'package:Id'."
        raise MalformedEnvironment(f"gymnasium has no {id!r}: {error} {hint}") from None


def _action_names(env: gymnasium.Env[Any, Any], name: str) -> tuple[str, ...]:
    """Names of a discrete space's actions, in order; empty = by number."""
    space = env.action_space
    if not isinstance(space, spaces.Discrete) or space.n > MAX_ACTIONS:
        return ()
    own: Any = env.unwrapped
    if hasattr(own, "get_action_meanings"):  # Atari's way
        return tuple(str(meaning).lower() for meaning in own.get_action_meanings())
    if hasattr(getattr(own, "actions", None), "__members__"):  # MiniGrid's way: an enum
        names = tuple(own.actions.__members__)
    else:
        names = NAMES_OF_ACTIONS.get(name, ())
    return names if len(names) == space.n else tuple(str(i + int(space.start)) for i in range(int(space.n)))


def _act_tool(space: Any, names: tuple[str, ...], function: Any) -> Tool:
    if isinstance(space, spaces.Discrete):
        if names and len(names) != space.n:
            raise MalformedEnvironment(f"{len(names)} action names for {space}")
        wanted: Any = Literal[names] if names else int
    elif isinstance(space, spaces.Box):
        wanted = list[float]
    elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        wanted = list[int]
    elif isinstance(space, spaces.Text):
        wanted = str
    else:
        raise MalformedEnvironment(f"no tool for the action space {space}: wrap the environment with a simpler one")

    def act(action: Any) -> Any:
        return function(action)

    act.__annotations__ = {"action": wanted}
    act.__doc__ = "Take one action." if names else f"Take one action of {space}."
    return Tool.from_function(act)


def _about(env: gymnasium.Env[Any, Any]) -> str:
    """The first paragraph of an environment's documentation."""
    paragraphs = re.split(r"\n\s*\n", type(env.unwrapped).__doc__ or "")
    texts = [" ".join(p.split()) for p in paragraphs if p.strip() and not p.strip().startswith("#")]
    return texts[0][:_DESCRIPTION_CHARS] if texts else ""


def _plain(value: Any) -> Any:
    """Arrays and their scalars as JSON data, floats rounded to 4 places."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return round(value, 4) if isinstance(value, float) else value if isinstance(value, int) else str(value)


def _without_escapes(text: str) -> str:
    """Terminal colors as brackets: a policy reads text, and a lake's player is only a color."""

    def bracketed(match: re.Match[str]) -> str:
        codes = match[1].split(";")
        known = [BRACKETS_OF_COLOR[code] for code in codes if code in BRACKETS_OF_COLOR]
        pair = "[]" if any(len(code) == 2 and code[0] == "4" for code in codes) else (known or ["{}"])[0]
        return f"{pair[0]}{match[2]}{pair[1]}"

    while (inner := _COLORED.sub(bracketed, text)) != text:  # colors are nested
        text = inner
    return text
