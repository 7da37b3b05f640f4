"""Tools: the schema from a signature, and a policy's arguments by that schema."""

import json
from typing import Literal

import pytest
from hypothesis import given as random_input
from hypothesis import settings
from hypothesis import strategies as st

from envs.errors import BadArguments, MalformedEnvironment
from envs.message import ImagePart, ToolSpec
from envs.tool import Tool, cut_middle, tool, tools_of_class
from envs.tool_result import as_content
from tests.envs.small_envs import Doubling, UntypedTool


def search(query: str, limit: int = 5, tags: list[str] | None = None, mode: Literal["any", "all"] = "any") -> str:
    """Search the shelf.

    Longer text that a policy need not read.
    """
    return query


def test_a_signature_becomes_a_schema_in_parameter_order_without_titles() -> None:
    spec = Tool.from_function(search).spec
    assert (spec.name, spec.description) == ("search", "Search the shelf.")
    assert list(spec.parameters["properties"]) == ["query", "limit", "tags", "mode"]
    assert spec.parameters["required"] == ["query"]
    assert spec.parameters["properties"]["limit"] == {"default": 5, "type": "integer"}
    assert "title" not in str(spec.parameters)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"query": "a", "limit": "7"}, {"query": "a", "limit": 7}),
        ({"query": "a", "limit": " 7 "}, {"query": "a", "limit": 7}),
        ({"query": "null"}, {"query": "null"}),
        ({"query": "75001"}, {"query": "75001"}),
        ({"query": 75001}, {"query": "75001"}),
        ({"query": "a", "tags": '["x","y"]'}, {"query": "a", "tags": ["x", "y"]}),
        ({"query": "a", "tags": "null"}, {"query": "a", "tags": None}),
        ({"query": "[1]", "limit": "3"}, {"query": "[1]", "limit": 3}),
    ],
)
def test_untyped_text_is_read_by_the_schema_and_text_stays_text(given: dict, expected: dict) -> None:
    parsed = Tool.from_function(search).parse(given)
    assert {name: parsed[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "missing query"),
        ({"query": "a", "limit": "seven"}, "limit must be integer"),
        ({"query": "a", "limit": "7.5"}, "limit must be integer"),
        ({"query": "a", "color": "red"}, "no argument color"),
        ({"query": "a", "mode": "some"}, 'mode must be one of "any", "all"'),
        ({"query": "a", "tags": "[" * 100_000}, "tags must be array or null"),
        ({"query": "a", "x" * 100_000: 1}, f"no argument {'x' * 32}"),
    ],
)
def test_wrong_arguments_give_short_stable_texts(given: dict, text: str) -> None:
    with pytest.raises(BadArguments, match=f"^{text}$"):
        Tool.from_function(search).parse(given)


def test_parameters_may_be_called_like_attributes_of_pydantic() -> None:
    def odd(json: str, copy: int, model_config: bool, title: str) -> str:
        return json

    found = Tool.from_function(odd)
    assert list(found.spec.parameters["properties"]) == ["json", "copy", "model_config", "title"]
    assert found.parse({"json": "j", "copy": "2", "model_config": "true", "title": "t"}) == {
        "json": "j",
        "copy": 2,
        "model_config": True,
        "title": "t",
    }


def test_a_parameter_without_a_usable_type_is_refused_by_name() -> None:
    with pytest.raises(MalformedEnvironment, match="tool look: parameter where has no type"):
        tools_of_class(UntypedTool)

    def rest(*words: str) -> str:
        return "".join(words)

    def opaque(thing: object, lock: "NotDefined") -> str:  # noqa: F821  # type: ignore[name-defined]
        return ""

    for function in (rest, opaque):
        with pytest.raises(MalformedEnvironment, match=f"tool {function.__name__}"):
            Tool.from_function(function)


def test_tools_of_a_class_come_in_order_of_definition() -> None:
    assert [t.spec.name for t in tools_of_class(Doubling)] == ["add", "fail", "nap", "hang", "shout", "odd"]


def test_results_are_text_as_it_is_and_compact_json_else() -> None:
    assert [as_content(v)[0] for v in ("a b", 385, None, [1, "é"], {"a": True})] == [
        "a b",
        "385",
        "null",
        '[1,"é"]',
        '{"a":true}',
    ]


def test_images_a_tool_returns_stay_images_beside_their_texts() -> None:
    image = ImagePart(data=b"png")
    assert as_content(image) == ("", (image,))
    assert as_content(["page 1", image, 7, image]) == ("page 1\n7", (image, image))


SCHEMA = {
    "type": "object",
    "properties": {
        "query": {"type": "string"},
        "limit": {"type": "integer"},
        "where": {"$ref": "#/$defs/Place"},
        "size": {"enum": ["1", "2"]},
    },
    "required": ["query"],
    "additionalProperties": False,
    "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}


def by_schema(schema: dict) -> Tool:
    return Tool.from_schema(ToolSpec(name="find", description="Find.", parameters=schema), lambda **given: given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"query": "75001", "limit": "7"}, {"query": "75001", "limit": 7}),
        ({"query": 75001}, {"query": "75001"}),
        ({"query": "null", "where": '{"x": 1.5}'}, {"query": "null", "where": {"x": 1.5}}),
        ({"query": "a", "size": 2}, {"query": "a", "size": "2"}),
    ],
)
def test_a_schema_written_elsewhere_converts_as_a_signature_does(given: dict, expected: dict) -> None:
    assert by_schema(SCHEMA).parse(given) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "missing query"),
        ({"query": "a", "limit": "seven"}, "limit must be integer"),
        ({"query": "a", "where": {"x": "far"}}, "bad where"),
        ({"query": "a", "where": "nowhere"}, "where must be object"),
        ({"query": "a", "color": "red"}, "no argument color"),
        ({"query": "a", "where": {"x": float("nan")}}, "arguments are no plain JSON"),
        ({"query": "\ud800"}, "arguments are no plain JSON"),
    ],
)
def test_what_does_not_fit_a_schema_gets_the_same_short_texts(given: dict, text: str) -> None:
    with pytest.raises(BadArguments, match=f"^{text}$"):
        by_schema(SCHEMA).parse(given)


def test_an_invalid_schema_is_refused_with_the_tools_name() -> None:
    with pytest.raises(MalformedEnvironment, match="tool find: invalid schema"):
        by_schema({"type": "objekt"})


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=5)


@settings(max_examples=200, deadline=None)
@random_input(st.dictionaries(st.sampled_from([*SCHEMA["properties"], "x", ""]), JSON))
def test_whatever_a_policy_sends_fits_the_schema_afterwards_or_is_refused(arguments: dict) -> None:
    try:
        parsed = by_schema(SCHEMA).parse(arguments)
    except BadArguments as error:
        assert len(str(error)) < 60
        return
    assert json.loads(json.dumps(parsed, allow_nan=False)) == parsed
    assert isinstance(parsed["query"], str) and isinstance(parsed.get("limit", 0), int | float)
    if isinstance(arguments["query"], str):
        assert parsed["query"] == arguments["query"]


@pytest.mark.parametrize("options", [{"cost": -1}, {"cost": float("nan")}, {"timeout_s": 0}, {"timeout_s": -2.0}])
def test_impossible_options_are_refused_with_value_and_range(options: dict) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"{name} of a tool is {value}, not a finite number >"):
        tool(**options)


@random_input(st.text(), st.integers(0, 30))
def test_a_long_text_keeps_head_and_tail_and_says_how_much_is_gone(text: str, max_chars: int) -> None:
    shown = cut_middle(text, max_chars)
    if len(text) <= max_chars:
        assert shown == text
        return
    mark = f" (truncated {len(text) - max_chars} chars) "
    assert len(shown) == max_chars + len(mark)
    head, tail = (max_chars + 1) // 2, max_chars // 2
    assert shown == text[:head] + mark + text[len(text) - tail :]


@settings(max_examples=200, deadline=None)
@random_input(st.dictionaries(st.sampled_from(["query", "limit", "tags", "mode", "", "x"]), st.text() | st.none()))
def test_no_arguments_raise_anything_but_bad_arguments(arguments: dict) -> None:
    try:
        parsed = Tool.from_function(search).parse(arguments)
    except BadArguments as error:
        assert len(str(error)) < 60
    else:
        assert isinstance(parsed["limit"], int)
        assert parsed["query"] == arguments["query"]
