"""OpenAI's chat format and ours: a request body to messages, a sampled turn to an answer or a stream of chunks.

What would change the distribution that is sampled, and that Shoal does not do, is refused by name: a recorded logprob
must be that of the distribution the token really came from.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.message import Message, ToolCall, ToolResult, ToolSpec

MODEL = "shoal"
"""The one model that an endpoint serves, whatever its weights are."""
MAX_MESSAGES = 4096
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_p": (None, 1, 1.0),
    "n": (None, 1),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "stop": (None, []),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "parallel_tool_calls": (None, True),
}
"""Fields of which only these values are served."""
WITHOUT_EFFECT = ("user", "metadata", "store", "stream_options", "service_tier")
READ = (
    "model",
    "messages",
    "tools",
    "tool_choice",
    "temperature",
    "max_tokens",
    "max_completion_tokens",
    "stream",
    "seed",
    "logprobs",
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
    temperature: float | None
    """None = the session's."""
    max_tokens: int | None
    seed: int | None
    stream: bool
    include_usage: bool
    logprobs: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTurn:
    """A sampled turn as the client is told of it."""

    completion_id: str
    message: Message
    """Ill-formed calls are part of its text."""
    finish_reason: str
    """"stop" | "tool_calls" | "length"."""
    prompt_tokens: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    created_s: int


# --- requests -------------------------------------------------------------------------------------------------------


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
    if choice not in (None, "auto", "none"):
        raise ApiError(f"tool_choice {choice!r} is not served: 'auto' and 'none' are", param="tool_choice")
    options = body.get("stream_options") or {}
    return ChatRequest(
        messages=_read_messages(body.get("messages")),
        tools=() if choice == "none" else tools,
        temperature=_number(body, "temperature", 0.0, 2.0),
        max_tokens=_whole(body, "max_completion_tokens", 1) or _whole(body, "max_tokens", 1),
        seed=_whole(body, "seed", 0),
        stream=_flag(body, "stream"),
        include_usage=bool(isinstance(options, dict) and options.get("include_usage")),
        logprobs=_flag(body, "logprobs"),
    )


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name] or (isinstance(value, bool) and name != "parallel_tool_calls"):
                served = json.dumps(NEUTRAL[name][-1])
                raise ApiError(f"{name}={value!r} is not served: leave it out or send {served}", param=name)
        elif name not in READ and name not in WITHOUT_EFFECT and value is not None:
            raise ApiError(f"the field {name!r} is not served", param=name)


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


def _whole(body: Mapping[str, Any], name: str, low: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
        raise ApiError(f"{name}={value!r} must be a whole number from {low}", param=name)
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


# --- answers --------------------------------------------------------------------------------------------------------


def message_json(message: Message) -> dict[str, Any]:
    """A message as clients send and read it."""
    shown: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        shown["content"] = message.text or None
        shown["tool_calls"] = [_call_json(call) for call in message.tool_calls]
    if message.tool_result is not None:
        shown["tool_call_id"] = message.tool_result.call_id
    return shown


def tool_json(tool: ToolSpec) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def _call_json(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": call.call_id, "type": "function", "function": function}


def answer_json(turn: ServedTurn, *, logprobs: bool) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choice = {
        "index": 0,
        "message": message_json(turn.message),
        "finish_reason": turn.finish_reason,
        "logprobs": _logprobs(turn) if logprobs else None,
    }
    return _envelope(turn, "chat.completion") | {"choices": [choice], "usage": _usage(turn)}


def chunks(turn: ServedTurn, *, logprobs: bool, include_usage: bool) -> Iterator[dict[str, Any]]:
    """The same answer as deltas: the role, the text, each call's name and then its arguments, the finish reason."""

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _envelope(turn, "chat.completion.chunk") | {"choices": [choice]}

    first = chunk({"role": "assistant", "content": ""})
    if logprobs:
        first["choices"][0]["logprobs"] = _logprobs(turn)
    yield first
    for word in _words(turn.message.text):
        yield chunk({"content": word})
    for index, call in enumerate(turn.message.tool_calls):
        whole = _call_json(call)
        arguments = whole["function"]["arguments"]
        named = whole | {"index": index, "function": {"name": call.name, "arguments": ""}}
        yield chunk({"tool_calls": [named]})
        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
    yield chunk({}, turn.finish_reason)
    if include_usage:
        yield _envelope(turn, "chat.completion.chunk") | {"choices": [], "usage": _usage(turn)}


def _words(text: str) -> Sequence[str]:
    return [part for part in text.splitlines(keepends=True) if part]


def _envelope(turn: ServedTurn, kind: str) -> dict[str, Any]:
    return {
        "id": turn.completion_id,
        "object": kind,
        "created": turn.created_s,
        "model": MODEL,
        "system_fingerprint": f"policy-version-{turn.policy_version}",
    }


def _usage(turn: ServedTurn) -> dict[str, int]:
    sampled = len(turn.token_ids)
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": sampled,
        "total_tokens": turn.prompt_tokens + sampled,
    }


def _logprobs(turn: ServedTurn) -> dict[str, Any]:
    """Tokens are named by id: a text could stand for several."""
    rows = [
        {"token": f"token_id:{i}", "logprob": logprob, "bytes": None, "top_logprobs": []}
        for i, logprob in zip(turn.token_ids, turn.logprobs, strict=True)
    ]
    return {"content": rows, "refusal": None}
