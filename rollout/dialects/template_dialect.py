"""Any transformers tokenizer with its own chat template.

The template renders the first prompt. Later deltas are cut from a short conversation of its own: an assistant turn that
holds a sentinel, then the new messages; what the template writes after the sentinel's turn is the delta. History is
never rendered again, so a template that rewrites it (dropping earlier reasoning) cannot change a token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from envs.message import Message, ToolSpec
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.call_grammar import parse_turn
from rollout.dialects.control_text import SENTINEL, ControlText
from rollout.dialects.parsed_turn import ParsedTurn, text_of
from rollout.dialects.qwen_dialect import banned_ids, tool_json

QUERY = {"role": "user", "content": "?"}


class TemplateDialect:
    """Example (ChatML): reply([tool(5)]) -> ids of "\\n<|im_start|>tool\\n5<|im_end|>\\n<|im_start|>assistant\\n"."""

    accepts_images = False

    def __init__(self, tokenizer: HfTokenizer, *, end_ids: Sequence[int]) -> None:
        """Raises `ValueError` for a tokenizer without a template, or one that does not end turns with `end_ids`."""
        if not tokenizer.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; choose another policy.dialect")
        self.tokenizer = tokenizer
        self.stop_token_ids: tuple[int, ...] = tuple(end_ids)
        self.banned_token_ids: tuple[int, ...] = banned_ids(tokenizer, self.stop_token_ids)
        self.vocab_size = tokenizer.vocab_size
        self._control = ControlText(tokenizer)
        self.reply([Message.user("?")], [])  # refuse an unusable template now, not in the middle of an episode

    @staticmethod
    def load(folder: str | Path) -> "TemplateDialect":
        tokenizer = HfTokenizer.load(folder)
        return TemplateDialect(tokenizer, end_ids=tokenizer.end_ids(folder))

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        return self._control.encode(self._render(self._plain(messages), tools, header=True))

    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        # templates want results to follow calls, one for each; a name is shown by all of them, content is not
        calls = [
            {"id": m.tool_result.call_id, "type": "function", "function": {"name": SENTINEL, "arguments": {}}}
            for m in messages
            if m.tool_result is not None
        ]
        spoken = {"role": "assistant", "content": "" if calls else SENTINEL}
        conversation = [QUERY, spoken | ({"tool_calls": calls} if calls else {}), *self._plain(messages)]
        _, found, tail = self._render(conversation, tools, header=True).rpartition(SENTINEL)
        if not found:
            raise ValueError("this chat template does not show assistant turns; choose another policy.dialect")
        return self._after_turn(self._control.encode(tail))[1]

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        header = self._render([QUERY], tools, header=True)
        whole = self._render([QUERY, *self._plain([message])], tools, header=False)
        if not whole.startswith(header):
            raise ValueError("this chat template opens a finished assistant turn in another way than a new one")
        return self._after_turn(self._control.encode(whole.removeprefix(header)))[0]

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        call = {"id": "0", "type": "function", "function": {"name": SENTINEL, "arguments": {}}}
        spoken = {"role": "assistant", "content": "", "tool_calls": [call]}
        header = self._render([QUERY], tools, header=True)
        whole = self._render([QUERY, spoken], tools, header=False)
        before, found, _ = whole.removeprefix(header).partition(SENTINEL)
        if not (found and before and whole.startswith(header)):
            raise ValueError("this chat template does not begin a call with marks and the tool's name")
        return self._control.encode(before + self._control.hide(name))

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        return parse_turn(self.tokenizer, token_ids, stop_token_ids=self.stop_token_ids)

    def _after_turn(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Split behind the first stop token: (end of the turn, what follows it)."""
        end = next((n for n, i in enumerate(ids) if i in self.stop_token_ids), None)
        if end is None:
            raise ValueError(
                f"this chat template ends assistant turns with none of the stop tokens {self.stop_token_ids}"
            )
        return ids[: end + 1], ids[end + 1 :]

    def _render(self, conversation: list[dict[str, Any]], tools: Sequence[ToolSpec], *, header: bool) -> str:
        try:
            rendered = self.tokenizer.hf.apply_chat_template(
                conversation,
                tools=[self._control.hide_json(tool_json(tool)) for tool in tools] or None,
                add_generation_prompt=header,
                tokenize=False,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [self._control.hide_json(plain(message)) for message in messages]


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates read it."""
    shown: dict[str, Any] = {"role": message.role, "content": text_of(message, "chat_template")}
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.tool_result is not None:
        shown |= {"name": message.tool_result.name, "tool_call_id": message.tool_result.call_id}
    return shown
