"""What an author's task() and reward() returned, as an episode can use it."""

import hashlib
import json
import math
from dataclasses import replace
from typing import Any, cast

from envs.errors import BadReward, MalformedEnvironment
from envs.message import ImagePart, Message, TextPart
from envs.redaction import redacted
from envs.task import Problem

SHOWN_CHARS = 200
"""Of a value in an error's text."""


def fingerprint(part: TextPart | ImagePart) -> str:
    return part.text if isinstance(part, TextPart) else hashlib.sha256(part.data).hexdigest()


def opening_messages(owner: str, problem: Any) -> tuple[Message, ...]:
    """The conversation's start; raises MalformedEnvironment where task() returned something else."""
    if not isinstance(problem, Problem):
        raise MalformedEnvironment(f"{owner}.task() returned {type(problem).__name__}, not a Problem")
    try:
        json.dumps(problem.meta, allow_nan=False)  # it crosses processes and is stored
    except (TypeError, ValueError) as error:
        raise MalformedEnvironment(f"{owner}.task(): meta is not plain JSON data: {error}") from None
    system = (Message.system(problem.system),) if problem.system else ()
    if isinstance(problem.prompt, str):
        user = Message.user(problem.prompt)
        return (*system, replace(user, content=(*problem.images, *user.content)))
    messages = (*system, *problem.prompt)
    if not problem.prompt or not all(isinstance(message, Message) for message in messages):
        raise MalformedEnvironment(f"{owner}.task(): prompt is neither text nor a tuple of Messages")
    return messages


def finite(name: object, part: object) -> float:
    try:
        number = float(cast(float, part))
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(part, str | bytes) or not math.isfinite(number):
        raise BadReward(f"reward() returned {name} = {redacted(repr(part))[:SHOWN_CHARS]}, not a finite number")
    return number
