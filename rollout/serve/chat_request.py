"""A request in OpenAI's chat format, read and checked.

What would change the distribution that is sampled, and that Shoal does not do, is refused by name: a recorded logprob
must be that of the distribution the token really came from. What only changes what the client is told (`stop`,
`parallel_tool_calls`) is done there: the record keeps every sampled token.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from envs.message import Message, ToolCall, ToolResult, ToolSpec

MODEL = "shoal"
"""The one model that an endpoint serves, whatever its weights are."""
MAX_MESSAGES = 4096
MAX_CHOICES = 8
MAX_STOPS = 4
FULL_DISTRIBUTION = "tokens are sampled from the whole distribution, so that their recorded logprobs are true"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "top_p": ((None, 1, 1.0), f"{FULL_DISTRIBUTION}; leave it out or send 1"),
    "top_k": ((None, 0, -1), f"{FULL_DISTRIBUTION}; leave it out"),
    "min_p": ((None, 0, 0.0), f"{FULL_DISTRIBUTION}; leave it out or send 0"),
    "frequency_penalty": ((None, 0, 0.0), f"{FULL_DISTRIBUTION}; leave it out or send 0"),
    "presence_penalty": ((None, 0, 0.0), f"{FULL_DISTRIBUTION}; leave it out or send 0"),
    "logit_bias": ((None, {}), f"{FULL_DISTRIBUTION}; leave it out or send {{}}"),
    "response_format": (
        (None, {"type": "text"}),
        "no engine here forces tokens into a grammar; ask for JSON in a message, or offer a tool and require it with "
        "tool_choice",
    ),
}
"""Fields of which only these values are served, and why."""
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "stream_options",
    "service_tier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "verbosity",
)
"""Fields that change nothing here, whatever their value."""
READ = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stop",
    "stream",
    "seed",
    "logprobs",
    "top_logprobs",
)


class ApiError(Exception):
    """Refuses a request. `code` is the HTTP status, `param` names the field."""

    def __init__(self, message: str, *, code: int = 400, param: str | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.kind = kind or ("invalid_request_error" if code < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": None}}


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatRequest:
    """One POST of /v1/chat/completions, checked."""

    messages: tuple[Message, ...]
    tools: tuple[ToolSpec, ...]
    """Those shown to the policy: none where tool_choice is "none"."""
    must_call: str | None
    """The turn must begin a call: of this tool, "" = of any. None = as the policy likes."""
    one_call: bool
    """The client is told of the first call alone."""
    temperature: float | None
    """None = the session's."""
    max_tokens: int | None
    seed: int | None
    choices: int
    """How many turns to sample, each on its own; those after the first begin token rows."""
    stop: tuple[str, ...]
    """The client is told the text up to the first of these."""
    stream: bool
    include_usage: bool
    logprobs: bool
    top_logprobs: bool
    """The list of alternatives names the sampled token: the engine knows no other's logprob."""


def read_chat(body: Any) -> ChatRequest:
    """Raises `ApiError` naming the field that is wrong or not served."""
    if not isinstance(body, dict):
        raise ApiError("the body must be a JSON object")
    _refuse_unserved(body)
    if body.get("model") != MODEL:
        raise ApiError(
            f"there is no model {body.get('model')!r}; this endpoint serves {MODEL!r}", code=404, param="model"
        )
    tools = _read_tools(body.get("tools"))
    choice = body.get("tool_choice")
    options = body.get("stream_options") or {}
    return ChatRequest(
        messages=_read_messages(body.get("messages")),
        tools=() if choice == "none" else tools,
        must_call=_must_call(choice, tools),
        one_call=body.get("parallel_tool_calls") is not None and not _flag(body, "parallel_tool_calls"),
        temperature=_number(body, "temperature", 0.0, 2.0),
        max_tokens=_whole(body, "max_completion_tokens", 1) or _whole(body, "max_tokens", 1),
        seed=_whole(body, "seed", 0),
        choices=_whole(body, "n", 1, MAX_CHOICES) or 1,
        stop=_read_stop(body.get("stop")),
        stream=_flag(body, "stream"),
        include_usage=bool(isinstance(options, dict) and options.get("include_usage")),
        logprobs=_flag(body, "logprobs"),
        top_logprobs=bool(_whole(body, "top_logprobs", 0, 20)),
    )


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            served, why = NEUTRAL[name]
            if value not in served or isinstance(value, bool):
                raise ApiError(f"{name}={value!r} is not served: {why}", param=name)
        elif name not in READ and name not in WITHOUT_EFFECT and value is not None:
            raise ApiError(f"the field {name!r} is not served", param=name)


def _must_call(choice: Any, tools: tuple[ToolSpec, ...]) -> str | None:
    """The tool that tool_choice demands, "" for any; None where it demands none."""
    if choice in (None, "auto", "none"):
        return None
    named = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = "" if choice == "required" else named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str):
        raise ApiError(
            f"tool_choice={choice!r} is not served: 'auto', 'none', 'required' and "
            "{'type': 'function', 'function': {'name': ...}} are",
            param="tool_choice",
        )
    if not tools or (name and name not in (tool.name for tool in tools)):
        raise ApiError(
            f"tool_choice demands {name or 'a tool'!r}; tools are {[t.name for t in tools]}", param="tool_choice"
        )
    return name


def _read_stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(f"stop={value!r} must be a text or a list of at most {MAX_STOPS} texts", param="stop")
    return tuple(stops)


def _read_messages(values: Any) -> tuple[Message, ...]:
    if not isinstance(values, list) or not 1 <= len(values) <= MAX_MESSAGES:
        raise ApiError(f"messages must be a list of 1 to {MAX_MESSAGES} messages", param="messages")
    names: dict[str, str] = {}  # of calls so far, by id: results carry only the id
    messages = []
    for n, value in enumerate(values):
        if not isinstance(value, dict):
            raise ApiError(f"messages[{n}] must be an object", param=f"messages[{n}]")
        messages.append(_read_message(value, n, names))
        names |= {call.call_id: call.name for call in messages[-1].tool_calls}
    return tuple(messages)


def _read_message(value: Mapping[str, Any], n: int, names: Mapping[str, str]) -> Message:
    role, where = value.get("role"), f"messages[{n}]"
    text = _text(value.get("content"), where)
    if role in ("system", "developer"):
        return Message.system(text)
    if role == "user":
        return Message.user(text)
    if role == "assistant":
        return Message.assistant(text, _read_calls(value.get("tool_calls"), where))
    if role == "tool":
        call_id = value.get("tool_call_id")
        if not isinstance(call_id, str) or call_id not in names:
            raise ApiError(f"{where}: tool_call_id {call_id!r} is no call of a message before it", param=where)
        return Message.tool(ToolResult(call_id=call_id, name=names[call_id], content=text))
    raise ApiError(f"{where}: role {role!r} is not system, developer, user, assistant or tool", param=where)


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise ApiError(f"{where}: content must be a text or a list of text parts", param=f"{where}.content")


def _read_calls(values: Any, where: str) -> list[ToolCall]:
    calls = []
    for n, value in enumerate(values or []):
        try:
            arguments = json.loads(value["function"]["arguments"] or "{}")
            call = ToolCall(name=str(value["function"]["name"]), arguments=arguments, call_id=str(value["id"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ApiError(f"{where}.tool_calls[{n}] is malformed: {error!r}", param=where) from None
        if not isinstance(call.arguments, dict):
            raise ApiError(f"{where}.tool_calls[{n}]: arguments must be a JSON object", param=where)
        calls.append(call)
    return calls


def _read_tools(values: Any) -> tuple[ToolSpec, ...]:
    if values is None:
        return ()
    if not isinstance(values, list):
        raise ApiError("tools must be a list", param="tools")
    tools = []
    for n, value in enumerate(values):
        function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ApiError(f"tools[{n}] must be {{'type': 'function', 'function': {{'name': ...}}}}", param="tools")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        description = str(function.get("description") or "")
        tools.append(ToolSpec(name=function["name"], description=description, parameters=parameters))
    return tuple(tools)


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ApiError(f"{name}={value!r} must be a number from {low:g} to {high:g}", param=name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, low: int, high: int = 2**63 - 1) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        allowed = f"from {low}" if high == 2**63 - 1 else f"from {low} to {high}"
        raise ApiError(f"{name}={value!r} must be a whole number {allowed}", param=name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise ApiError(f"{name}={value!r} must be true or false", param=name)
    return bool(value)


def read_reward(body: Any) -> tuple[float, dict[str, float]]:
    """(reward, parts) of {"reward": 1.0, "parts": {...}}. Raises `ApiError` unless they are finite numbers."""
    reward = body.get("reward")
    parts = body.get("parts") or {}
    if not isinstance(parts, dict):
        raise ApiError("parts must be an object of numbers", param="parts")
    for name, value in {"reward": reward, **parts}.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ApiError(f"{name}={value!r} must be a finite number", param=str(name))
    return float(reward), {str(name): float(part) for name, part in parts.items()}
