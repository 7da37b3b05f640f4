"""Any transformers tokenizer with its own chat template.

The template renders the first prompt. Later deltas are cut from a short conversation of its own: an assistant turn that
holds a sentinel, then the new messages; what the template writes after the sentinel's turn is the delta. History is
never rendered again, so a template that rewrites it (dropping earlier reasoning) cannot change a token.

A template that shows no tools gets them in the system message, and one that shows no calls gets them as text between
<tool_call> marks. Which conversations come back as they went in is found out when the dialect is made (round_trip.py).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from envs.message import Message, ToolCall, ToolSpec
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.call_grammar import CALL, END_CALL, END_THINK, THINK, parse_turn
from rollout.dialects.control_text import SENTINEL, ControlText
from rollout.dialects.parsed_turn import ParsedTurn, text_of
from rollout.dialects.qwen_dialect import banned_ids, tool_json
from rollout.dialects.round_trip import PROBE, text_problem, tool_problem

QUERY = {"role": "user", "content": "?"}
OWN_INSTRUCTIONS = """# Tools

You may call one or more of these functions:
<tools>{tools}
</tools>

A call is written like this:
{call}"""
"""Written into the system message where the template shows no tools."""
HIDES_TOOLS = "tools: not shown"
"""A template whose comment says so means to show none: its model was taught them by examples."""
EXAMPLE = ToolCall(name="function_name", arguments={"argument": "value"}, call_id="0")


class TemplateDialect:
    """Example (ChatML): reply([tool(5)]) -> ids of "\\n<|im_start|>tool\\n5<|im_end|>\\n<|im_start|>assistant\\n"."""

    accepts_images = False

    def __init__(self, tokenizer: HfTokenizer, *, end_ids: Sequence[int], thinking: bool = False) -> None:
        """`thinking` is given to the template as enable_thinking.

        Raises `ValueError` for a tokenizer without a template, one that does not end turns with `end_ids`, and one that
        does not give back what was said, with the text that differs.
        """
        if not tokenizer.hf.chat_template:
            raise ValueError("this tokenizer has no chat template; choose another policy.dialect")
        self.tokenizer = tokenizer
        self.stop_token_ids: tuple[int, ...] = tuple(end_ids)
        self.banned_token_ids: tuple[int, ...] = banned_ids(tokenizer, self.stop_token_ids)
        self.vocab_size = tokenizer.vocab_size
        self._thinking = thinking
        self._control = ControlText(tokenizer)
        header = self._render([QUERY], [], header=True)
        self._opens_thought = header.rstrip().endswith(THINK)
        shows_none = HIDES_TOOLS in str(tokenizer.hf.chat_template)
        self.own_tools = not shows_none and header == self._render([QUERY], [PROBE], header=True)
        """The template shows no tools, and does not say that it means so: they stand in the system message."""
        self._own_calls = False
        before = self._before_name()
        self._own_calls = before is not None and not before
        """The template shows no calls: they are written as text."""
        self._bare_calls = bool(before) and before.lstrip().startswith("{")
        if problem := text_problem(self):
            raise ValueError(f"this chat template cannot be trained with: {problem}; choose another policy.dialect")
        self._tool_problem = tool_problem(self, names_tools=not shows_none)

    @staticmethod
    def load(folder: str | Path, *, thinking: bool = False) -> "TemplateDialect":
        tokenizer = HfTokenizer.load(folder)
        return TemplateDialect(tokenizer, end_ids=tokenizer.end_ids(folder), thinking=thinking)

    def check_tools(self) -> None:
        """Raises `ValueError` where calls or results do not come back as they went in, with the text that differs."""
        if self._tool_problem:
            raise ValueError(f"this chat template cannot be trained with tools: {self._tool_problem}")

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        if tools and self.own_tools:
            messages = self._with_own_tools(messages, tools)
        return self._control.encode(self._render(self._plain(messages), tools, header=True))

    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        # Templates want results to follow calls, one for each. The sentinel is an argument: names come again in the
        # headers of results, and not all templates show the text of a turn that calls.
        results = [m.tool_result for m in messages if m.tool_result is not None]
        if results and not self._own_calls:
            calls = [ToolCall(name=r.name, call_id=r.call_id, arguments={"x": SENTINEL}) for r in results]
            spoken = plain(Message.assistant("", calls))  # not hidden: the sentinel is ours
        else:
            spoken = {"role": "assistant", "content": SENTINEL}
        conversation = [QUERY, spoken, *self._plain(messages)]
        _, found, tail = self._render(conversation, tools, header=True).rpartition(SENTINEL)
        if not found:
            raise ValueError("this chat template does not show assistant turns; choose another policy.dialect")
        return self._after_turn(self._control.encode(tail))[1]

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        header = self._render([QUERY], tools, header=True)
        whole = self._render([QUERY, *self._plain([message])], tools, header=False)
        thought = ""
        if self._opens_thought:  # a finished turn need not show the thought that a new one begins with
            header, thought = header.rstrip().removesuffix(THINK), f"\n{END_THINK}\n\n"
        if not whole.startswith(header):
            raise ValueError("this chat template opens a finished assistant turn in another way than a new one")
        said = whole.removeprefix(header)
        if thought and said.lstrip().startswith(THINK):
            said, thought = said.partition(THINK)[2], ""
        return self._after_turn(self._control.encode(thought + said))[0]

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        if self._opens_thought:
            raise ValueError("a thinking turn begins with its thought, not with a call")
        before = f'{CALL}\n{{"name": "' if self._own_calls else self._before_name()
        if not before or self._bare_calls:
            raise ValueError("this chat template does not begin a call with marks and the tool's name")
        return self._control.encode(before + self._control.hide(name))

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        return parse_turn(
            self.tokenizer,
            token_ids,
            stop_token_ids=self.stop_token_ids,
            starts_in_thought=self._opens_thought,
            bare_calls=self._bare_calls and bool(tools),
        )

    def _before_name(self) -> str | None:
        """What a turn that only calls writes before the tool's name; "" where it shows no call, None where it cannot be
        rendered."""
        try:
            header = self._render([QUERY], [PROBE], header=True)
            call = plain(Message.assistant("", [ToolCall(name=SENTINEL, call_id="0")]))
            whole = self._render([QUERY, call], [PROBE], header=False)
        except ValueError:
            return None
        before, found, _ = whole.removeprefix(header).partition(SENTINEL)
        return before if found and whole.startswith(header) else ""

    def _with_own_tools(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[Message]:
        lines = "".join(f"\n{json.dumps(tool_json(tool), ensure_ascii=False)}" for tool in tools)
        example = self.tokenizer.decode(self.completion(Message.assistant("", [EXAMPLE]), [])[:-1]).strip()
        header, rest = OWN_INSTRUCTIONS.format(tools=lines, call=example), list(messages)
        if rest and rest[0].role == "system":
            return [Message.system(f"{rest[0].text}\n\n{header}"), *rest[1:]]
        return [Message.system(header), *rest]

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
                enable_thinking=self._thinking,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        except (TypeError, KeyError, AttributeError) as error:  # a template that expects other data
            raise ValueError(f"the chat template fails on this conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _plain(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        return [self._shown(message) for message in messages]

    def _shown(self, message: Message) -> dict[str, Any]:
        """A message as chat templates read it, control text hidden."""
        shown: dict[str, Any] = plain(message)
        if self._own_calls and message.tool_calls:
            bodies = (
                json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in message.tool_calls
            )
            calls = (f"{CALL}\n{self._control.hide(body)}\n{END_CALL}" for body in bodies)
            hidden = self._control.hide(shown["content"])
            return {"role": "assistant", "content": "\n".join(filter(None, [hidden, *calls]))}
        return self._control.hide_json(shown)


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates read it."""
    shown: dict[str, Any] = {"role": message.role, "content": text_of(message, "chat_template")}
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call_id(c.call_id), "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    if message.tool_result is not None:
        shown |= {"name": message.tool_result.name, "tool_call_id": call_id(message.tool_result.call_id)}
    return shown


def call_id(ours: str) -> str:
    """An id that every family takes: nine letters and digits, as Mistral's templates demand."""
    return hashlib.sha256(ours.encode()).hexdigest()[:9]
