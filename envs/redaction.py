"""Secrets of environments: variables of this process's environment whose values no text may show.

    expose({"JUDGE_KEY": "sk-12345"})       # the variable is set from here on
    redacted("Bearer sk-12345")             # "Bearer [secret JUDGE_KEY]"

One set for each process, as it has one environment. A value is also found as JSON, a Python literal or a URL spells
it. In pieces, base64 or hashed it is not.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

T = TypeVar("T")


_hidden: tuple[re.Pattern[str], dict[str, str]] | None = None
"""What finds the values, and the name that each spelling of one belongs to."""


def expose(secrets: Mapping[str, str]) -> None:
    """Set environment variables of this process and hide their values; what was hidden before no longer is."""
    global _hidden
    os.environ.update(secrets)
    names = {spelling: name for name, value in secrets.items() for spelling in _spellings(value)}
    longest_first = sorted(names, key=len, reverse=True)  # or the beginning of a longer one would be taken out of it
    _hidden = (re.compile("|".join(map(re.escape, longest_first))), names) if names else None


def redacted(value: T) -> T:
    """`value` with the secrets replaced in all its texts: of a string, containers of JSON data, dataclasses.

    Bytes (images) stay as they are.
    """
    return value if _hidden is None else _redacted(value, *_hidden)


def _redacted(value: Any, pattern: re.Pattern[str], names: Mapping[str, str]) -> Any:
    def inside(item: Any) -> Any:
        return _redacted(item, pattern, names)

    if isinstance(value, str):
        return pattern.sub(lambda found: f"[secret {names[found[0]]}]", value)
    if isinstance(value, dict):
        return {inside(key): inside(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(inside, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: inside(getattr(value, item.name)) for item in fields(value)})
    return value


def _spellings(value: str) -> set[str]:
    plain = {value, value.strip()}
    as_json = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for text in plain for ascii_only in (True, False)}
    in_json = {json.dumps(text)[1:-1] for text in as_json}  # JSON as a text inside JSON
    as_python = {repr(text)[1:-1] for text in plain} | {repr(text.encode())[2:-1] for text in plain}
    in_urls = {spell(text, safe="") for text in plain for spell in (quote, quote_plus)}
    return plain | as_json | in_json | as_python | in_urls
