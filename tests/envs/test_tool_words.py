"""What a policy is told of tools: descriptions, results, and what was wrong with an argument."""

import asyncio
import enum
import random
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import BaseModel, Field

from envs import tool as tool_module
from envs.base import AgentEnv, call
from envs.errors import BadArguments, MalformedEnvironment
from envs.tool import Tool, tool
from envs.tool_result import as_content


def google(a: int, b: str = "x") -> str:
    """Find a thing
    in two lines.
    Args:
        a: How many to find,
            at most ten.
        b (str): Its name.

    Returns:
        The thing.
    """
    return ""


def numpy_style(a: int, b: str = "x") -> str:
    """Find a thing in two lines.

    Parameters
    ----------
    a : int
        How many to find, at most ten.
    b : str
        Its name.
    """
    return ""


def sphinx(a: int, b: str = "x") -> str:
    """Find a thing in two lines.

    :param a: How many to find, at most ten.
    :param b: Its name.
    """
    return ""


@pytest.mark.parametrize("function", [google, numpy_style, sphinx])
def test_descriptions_of_parameters_arrive_and_no_block_is_part_of_the_tools_own(function: Any) -> None:  # faults C1
    spec = Tool.from_function(function).spec
    assert spec.description.rstrip(".") == "Find a thing in two lines"
    told = {name: schema["description"] for name, schema in spec.parameters["properties"].items()}
    assert told == {"a": "How many to find, at most ten.", "b": "Its name."}


class Color(enum.Enum):
    RED = "red"


class Model(BaseModel):
    x: int


@dataclass
class Point:
    x: int
    color: Color


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Model(x=1), '{"x":1}'),
        (Point(1, Color.RED), '{"x":1,"color":"red"}'),
        ([Color.RED], '["red"]'),
        (Color.RED, "red"),
        (np.float32(0.5), "0.5"),
        ({"a": np.array([1, 2])}, '{"a":[1,2]}'),
        ({"b", "a", "c"}, '["a","b","c"]'),
        (b"raw", "raw"),
        ({"a": "\ud800"}, '{"a":"?"}'),
        (({"b", "a"}, 1), '[["a","b"],1]'),
    ],
)
def test_results_are_compact_json_whatever_their_type(value: Any, text: str) -> None:  # faults C2
    assert as_content(value) == (text, ())


def test_an_object_without_a_json_form_is_refused_by_its_type() -> None:  # faults C2
    with pytest.raises(MalformedEnvironment, match=r"a tool returned a random\.Random, which has no JSON form"):
        as_content({"rng": random.Random()})


@pytest.mark.parametrize(
    ("hint", "given", "text"),
    [
        (Literal["a", "b"], "c", 'x must be one of "a", "b"'),
        (Annotated[int, Field(le=5)], 9, "x must be integer at most 5"),
        (Color, "blue", 'x must be one of "red"'),
        (int | bool, "v", "x must be integer or boolean"),
        (int, "v", "x must be integer"),
    ],
)
def test_a_wrong_argument_is_told_what_is_allowed(hint: Any, given: Any, text: str) -> None:  # faults C3
    def pick(x: Any) -> str:
        return ""

    pick.__annotations__["x"] = hint
    with pytest.raises(BadArguments, match=f"^{text}$"):
        Tool.from_function(pick).parse({"x": given})


class Revealing(AgentEnv):
    """Lists a second tool once the first was called."""

    is_open = False

    def task(self, rng: random.Random, level: int) -> str:
        return "?"

    def reward(self, answer: str) -> float:
        return 1.0

    @tool
    def open_door(self) -> str:
        """Open it."""
        self.is_open = True
        return "open"

    def tools(self) -> dict[str, Tool]:
        def enter() -> str:
            """Go in."""
            return "in"

        return {**super().tools()} | ({"enter": Tool.from_function(enter)} if self.is_open else {})


def test_a_tool_that_is_revealed_in_mid_episode_is_refused_by_name() -> None:  # faults C4
    async def scenario() -> None:
        env = Revealing()
        await env.areset(seed=1)
        with pytest.raises(MalformedEnvironment, match=r"lists \['enter'\] only after the reset"):
            await env.astep(call("open_door"))
        await env.aclose()

    asyncio.run(scenario())


def test_a_function_is_read_once_however_often_its_tool_is_made(monkeypatch: pytest.MonkeyPatch) -> None:  # faults C5
    read, num_reads = tool_module._read, []
    monkeypatch.setattr(tool_module, "_read", lambda *args: num_reads.append(1) or read(*args))

    class Box:
        def __init__(self, n: int) -> None:
            self.n = n

        def look(self, x: int) -> int:
            """Look."""
            return self.n + x

    tools = [Tool.from_function(Box(n).look) for n in range(5)]
    assert len(num_reads) == 1
    assert [made.function(**made.parse({"x": "1"})) for made in tools] == [1, 2, 3, 4, 5]
