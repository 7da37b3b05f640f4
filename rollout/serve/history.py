"""When a history that a client brings is the one that was recorded: it says the same, however it is spelled."""

import json
from collections.abc import Sequence
from typing import Any

from envs.message import Message


def canonical(messages: Sequence[Message]) -> list[str]:
    """A text for each message, equal for messages that say the same in the same place.

    Clients rename call ids, so a call is known by its number in the conversation. They write arguments anew with other
    types ("2", 2 and 2.0 are one value, as are a JSON text and what it stands for), other order of names and other
    white space at the ends of texts.

    Example: canonical([assistant with call id "x" add(a="2")]) == canonical([assistant with call id "y" add(a=2.0)])
    """
    number_of: dict[str, int] = {}
    num_calls, texts = 0, []
    for message in messages:
        calls = []
        for call in message.tool_calls:
            number_of[call.call_id], num_calls = num_calls, num_calls + 1
            calls.append([call.name, _value(call.arguments)])
        result = message.tool_result
        answers = None if result is None else number_of.get(result.call_id, result.call_id)
        texts.append(json.dumps([message.role, message.text.strip(), calls, answers], sort_keys=True))
    return texts


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _value(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_value(part) for part in value]
    if isinstance(value, str):
        try:
            meant = json.loads(value)
        except (ValueError, RecursionError):
            return value.strip()
        return meant.strip() if isinstance(meant, str) else _value(meant)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
