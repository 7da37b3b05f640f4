"""Keeps control text that stands inside a message apart from the control tokens a template writes around it.

hide -> render -> encode: every control text inside a message ("<|im_end|>" in a tool result) is replaced by a
placeholder of private-use characters, the conversation is rendered as one string, that string is split at the control
tokens the template wrote, and the runs between them are encoded as text with the hidden text back in place. Ordinary
conversations get exactly the ids that encoding the whole string would give.
"""

import re
from typing import Any

from policy.model.tokenizer import HfTokenizer

OPEN, CLOSE, SENTINEL = "\ue000", "\ue001", "\ue002"
"""Around the number of a hidden text; and a mark for a dialect that cuts a rendered string."""


class ControlText:
    """Example: hide("a<|im_end|>b") -> "a\\ue0004\\ue001b"; encode("<|im_start|>user\\n" + that) -> one control token,
    then text."""

    def __init__(self, tokenizer: HfTokenizer) -> None:
        self._tokenizer = tokenizer
        self._secrets = [OPEN, CLOSE, SENTINEL, *tokenizer.control_ids]
        self._secret = re.compile("|".join(map(re.escape, sorted(self._secrets, key=len, reverse=True))))
        self._number = {text: n for n, text in enumerate(self._secrets)}
        self._placeholder = re.compile(f"{OPEN}(\\d+){CLOSE}")
        written = (
            # some tokens swallow the white space beside them
            r"\s*" * token.lstrip + f"({re.escape(text)})" + r"\s*" * token.rstrip
            for text, token in sorted(tokenizer.added_tokens.items(), key=lambda item: -len(item[0]))
        )
        self._written = re.compile("|".join(written) or r"(?!)")

    def hide(self, text: str) -> str:
        return self._secret.sub(lambda match: f"{OPEN}{self._number[match.group()]}{CLOSE}", text)

    def hide_json(self, value: Any) -> Any:
        """`hide` on every string of a JSON value, keys included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {self.hide_json(key): self.hide_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide_json(item) for item in value]
        return value

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered string. Control tokens come only from what was not hidden."""
        ids: list[int] = []
        start = 0
        for match in self._written.finditer(rendered):
            ids += self._encode_text(rendered[start : match.start()])
            ids.append(self._tokenizer.control_ids[match.group(match.lastindex or 0)])
            start = match.end()
        return ids + self._encode_text(rendered[start:])

    def _encode_text(self, text: str) -> list[int]:
        shown = self._placeholder.sub(lambda match: self._secrets[int(match.group(1))], text)
        return self._tokenizer.encode(shown) if shown else []
