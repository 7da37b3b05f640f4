"""A typed Python function becomes a tool: its JSON schema, its argument check, its limits."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar, get_type_hints, overload

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic.errors import PydanticUserError

from envs import json_schema
from envs.errors import BadArguments, MalformedEnvironment
from envs.message import ToolSpec

_MARK = "shoal_tool_options"
_SHOWN_NAME_CHARS = 32
DEFAULT_COST = 1.0
"""Cost of a call of an ordinary tool, and of one that does not exist."""
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolOptions:
    """What `@tool(...)` says beside the signature."""

    cost: float = DEFAULT_COST
    """Added to `meta["tool_cost"]` by every call; the learner's rule `env.tool_cost` multiplies it."""
    timeout_s: float | None = None
    """Deadline of one call; None = the environment's `tool_timeout_s`."""
    inline: bool = False
    """Run a synchronous tool on the event loop (well under a millisecond) instead of the environment's thread."""

    def __post_init__(self) -> None:
        if not 0 <= self.cost < math.inf:
            raise ValueError(f"cost of a tool is {self.cost}, not a finite number >= 0")
        if self.timeout_s is not None and not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s of a tool is {self.timeout_s}, not a finite number > 0")


@overload
def tool(function: Function) -> Function: ...
@overload
def tool(
    *, cost: float = DEFAULT_COST, timeout_s: float | None = None, inline: bool = False
) -> Callable[[Function], Function]: ...
def tool(
    function: Any = None, *, cost: float = DEFAULT_COST, timeout_s: float | None = None, inline: bool = False
) -> Any:
    """Mark a method as a tool. Parameters need types. The docstring's first paragraph describes the tool; what it says
    of parameters, in Google's, numpy's or Sphinx's style, describes them.

    Example: `@tool` or `@tool(cost=0.5, timeout_s=2.0)` above `def add(self, a: int, b: int) -> int`.
    """
    options = ToolOptions(cost=cost, timeout_s=timeout_s, inline=inline)

    def mark(target: Function) -> Function:
        setattr(target, _MARK, options)
        return target

    return mark if function is None else mark(function)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A tool that can be called: `function(**parse(arguments))`."""

    spec: ToolSpec
    function: Callable[..., Any]
    """Synchronous or async; takes the parameters by keyword."""
    parse: Callable[[dict[str, Any]], dict[str, Any]]
    """Converts a policy's arguments by the schema, or raises BadArguments.

    Text is what untyped dialects send: "7" becomes 7 for an integer, "[1, 2]" a list for a list; a parameter that takes
    text keeps the text, also "null" and "75001".
    """
    options: ToolOptions = field(default_factory=ToolOptions)

    @staticmethod
    def from_schema(spec: ToolSpec, function: Callable[..., Any]) -> "Tool":
        """A tool whose schema was written elsewhere. Raises MalformedEnvironment where the schema is invalid."""
        return Tool(spec=spec, function=function, parse=json_schema.parser_of(spec.name, spec.parameters))

    @staticmethod
    def from_function(function: Callable[..., Any], *, is_method: bool = False) -> "Tool":
        """Read a signature, once for all functions that are made by the same code.

        Raises MalformedEnvironment for a parameter without a (usable) type.
        """
        plain: Any = getattr(function, "__func__", function)
        return replace(_read_once(plain, is_method or plain is not function), function=function)  # without its self


@dataclass(frozen=True, slots=True)
class _Signature:
    """What decides how a function is read: two closures of the same code differ in values alone."""

    code: Any
    defaults: Any
    keyword_defaults: Any
    annotations: Any
    text: tuple[str, str | None]
    options: Any
    is_method: bool

    @staticmethod
    def of(function: Any, is_method: bool) -> "_Signature":
        """Raises TypeError where a part has no hash, and for a callable that is no plain function."""
        if not inspect.isfunction(function):
            raise TypeError(f"{function!r} is no plain function")
        key = _Signature(
            function.__code__,
            function.__defaults__,
            tuple((function.__kwdefaults__ or {}).items()),
            tuple(function.__annotations__.items()),
            (function.__name__, function.__doc__),
            getattr(function, _MARK, None),
            is_method,
        )
        hash(key)
        return key


_READ: dict[_Signature, Tool] = {}
"""pydantic takes milliseconds for a model, and adapters list their tools at every reset."""
_MAX_READ = 4096


def _read_once(function: Callable[..., Any], is_method: bool) -> Tool:
    try:
        key = _Signature.of(function, is_method)
    except TypeError:
        return _read(function, is_method)
    found = _READ.get(key)  # environments share this between threads: another may clear it at any time
    if found is None:
        if len(_READ) >= _MAX_READ:
            _READ.clear()
        found = _READ[key] = _read(function, is_method)
    return found


def _read(function: Callable[..., Any], is_method: bool) -> Tool:
    """A tool of the function as it is, unbound."""
    name = function.__name__
    try:
        parameters = list(inspect.signature(function).parameters.values())[1 if is_method else 0 :]
        hints = get_type_hints(function, include_extras=True)
        model = _arguments_model(name, parameters, hints)
        schema = _without_titles(model.model_json_schema(by_alias=True))
    except (NameError, PydanticUserError) as error:
        raise MalformedEnvironment(f"tool {name}: a parameter's type cannot be used: {error}") from error
    description, described = _read_docstring(inspect.getdoc(function) or "")
    for parameter, text in described.items():
        if parameter in schema.setdefault("properties", {}):
            schema["properties"][parameter].setdefault("description", text)
    schema.setdefault("properties", {})
    schema.pop("description", None)
    return Tool(
        spec=ToolSpec(name=name, description=description or name, parameters=schema),
        function=function,
        parse=partial(_parse, model, tuple(parameter.name for parameter in parameters), schema),
        options=getattr(function, _MARK, ToolOptions()),
    )


@cache
def tools_of_class(owner: type) -> tuple[Tool, ...]:
    """Unbound tools of a class in order of definition, base classes first."""
    names = dict.fromkeys(name for base in reversed(owner.__mro__) for name in vars(base))
    methods = [inspect.getattr_static(owner, name) for name in names]
    return tuple(Tool.from_function(method, is_method=True) for method in methods if hasattr(method, _MARK))


def tool_names(owner: type) -> set[str]:
    """Names under which a class's `@tool` methods stand."""
    return {name for name in dir(owner) if hasattr(inspect.getattr_static(owner, name), _MARK)}


def refuse_new_tools(owner: str, shown: Mapping[str, Tool], listed: Mapping[str, Tool]) -> None:
    """Raise MalformedEnvironment where tools are listed that the policy was not shown: a prompt only grows at its end,
    so tools are shown once, at the reset."""
    if new := [name for name in listed if name not in shown]:
        raise MalformedEnvironment(
            f"{owner}.tools() lists {new} only after the reset, and a policy is shown its tools once: list "
            "them at the reset, and let a call before its time answer that it is too early"
        )


def bind_tools(owner: object) -> dict[str, Tool]:
    """Tools of an instance by name."""
    return {t.spec.name: replace(t, function=getattr(owner, t.spec.name)) for t in tools_of_class(type(owner))}


def cut_middle(text: str, max_chars: int) -> str:
    """At most `max_chars` of a text, its head and its tail, with a visible mark between them.

    Example: cut_middle("abcdefgh", 4) -> "ab (truncated 4 chars) gh"
    """
    cut = len(text) - max_chars
    if cut <= 0:
        return text
    head, tail = text[: (max_chars + 1) // 2], text[len(text) - max_chars // 2 :]
    return f"{head} (truncated {cut} chars) {tail}"


def _arguments_model(name: str, parameters: list[inspect.Parameter], hints: dict[str, Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for index, parameter in enumerate(parameters):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise MalformedEnvironment(f"tool {name}: {parameter} is no named parameter")
        if parameter.name not in hints:
            raise MalformedEnvironment(f"tool {name}: parameter {parameter.name} has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        # Own field names: a parameter may be called like an attribute of BaseModel ("json", "copy").
        fields[f"arg{index}"] = (hints[parameter.name], Field(default, alias=parameter.name))
    config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, arbitrary_types_allowed=False)
    return create_model(name, __config__=config, **fields)


def _parse(
    model: type[BaseModel], names: tuple[str, ...], schema: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    try:
        parsed = model.model_validate(arguments)
    except ValidationError as error:
        try:
            parsed = model.model_validate(_read_json_where_wrong(arguments, error))
        except ValidationError:
            raise BadArguments(_complaint(error, schema)) from None
    return {name: getattr(parsed, f"arg{index}") for index, name in enumerate(names)}


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """(description, {parameter: its description}): Google's, numpy's and Sphinx's styles are told apart.

    Example: "Add.\\n\\nArgs:\\n    a: the first" -> ("Add.", {"a": "the first"})
    """
    read = docstring_parser.parse(text)
    paragraph = read.short_description or ""
    if read.long_description and not read.blank_after_short_description:
        paragraph += " " + read.long_description.split("\n\n")[0]
    return " ".join(paragraph.split()), {
        entry.arg_name: " ".join(entry.description.split()) for entry in read.params if entry.description
    }


def _complaint(error: ValidationError, schema: dict[str, Any]) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(first["loc"][0])[:_SHOWN_NAME_CHARS] if first["loc"] else "arguments"
    if first["type"] == "missing":
        return f"missing {name}"
    if first["type"] == "extra_forbidden":
        return f"no argument {name}"
    property_ = schema["properties"].get(name, {})
    wanted = json_schema.wanted(property_, schema.get("$defs", {}))
    is_whole = len(first["loc"]) == 1 or "anyOf" in property_  # of a union pydantic names the member that it tried
    return f"{name} must be {wanted}" if wanted and is_whole else f"bad {name}"


def _read_json_where_wrong(arguments: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    wrong = {str(item["loc"][0]) for item in error.errors(include_url=False) if item["loc"]}
    return {name: json_schema.read_json(value) if name in wrong else value for name, value in arguments.items()}


def _without_titles(schema: Any) -> Any:
    """pydantic titles every field; a policy pays for them in tokens. A property may be called "title": keep it."""
    if isinstance(schema, list):
        return [_without_titles(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _without_titles(value) for key, value in schema.items() if key != "title" or isinstance(value, dict)}
