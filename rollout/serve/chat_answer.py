"""A sampled turn as an answer in OpenAI's chat format, whole or as a stream of chunks."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from envs.message import Message, ToolCall, ToolSpec
from rollout.serve.chat_request import MODEL, ChatRequest


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


def answer_json(turns: Sequence[ServedTurn], chat: ChatRequest) -> dict[str, Any]:
    """The body of an answer that is not streamed: a choice for each turn."""
    choices = [
        {
            "index": index,
            "message": message_json(turn.message),
            "finish_reason": turn.finish_reason,
            "logprobs": _logprobs(turn, chat),
        }
        for index, turn in enumerate(turns)
    ]
    return _envelope(turns[0], "chat.completion") | {"choices": choices, "usage": _usage(turns)}


def chunks(turns: Sequence[ServedTurn], chat: ChatRequest) -> Iterator[dict[str, Any]]:
    """The same answer as deltas: the role, the text, each call's name and then its arguments, the finish reason."""
    for index, turn in enumerate(turns):
        for choice in _deltas(turn, chat):
            yield _envelope(turns[0], "chat.completion.chunk") | {"choices": [choice | {"index": index}]}
    if chat.include_usage:
        yield _envelope(turns[0], "chat.completion.chunk") | {"choices": [], "usage": _usage(turns)}


def _deltas(turn: ServedTurn, chat: ChatRequest) -> Iterator[dict[str, Any]]:
    def choice(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}

    yield choice({"role": "assistant", "content": ""}) | {"logprobs": _logprobs(turn, chat)}
    for word in _words(turn.message.text):
        yield choice({"content": word})
    for index, call in enumerate(turn.message.tool_calls):
        whole = _call_json(call)
        arguments = whole["function"]["arguments"]
        named = whole | {"index": index, "function": {"name": call.name, "arguments": ""}}
        yield choice({"tool_calls": [named]})
        yield choice({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
    yield choice({}, turn.finish_reason)


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


def _usage(turns: Sequence[ServedTurn]) -> dict[str, int]:
    prompt, sampled = turns[0].prompt_tokens, sum(len(turn.token_ids) for turn in turns)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprobs(turn: ServedTurn, chat: ChatRequest) -> dict[str, Any] | None:
    """Tokens are named by id: a text could stand for several."""
    if not chat.logprobs:
        return None
    rows: list[dict[str, Any]] = [
        {"token": f"token_id:{i}", "logprob": logprob, "bytes": None}
        for i, logprob in zip(turn.token_ids, turn.logprobs, strict=True)
    ]
    return {"content": [row | {"top_logprobs": [row] if chat.top_logprobs else []} for row in rows], "refusal": None}
