"""Qwen3.5's own dialect: ChatML turns, tools as JSON lines in the system message, calls as XML.

Token for token what the model's chat template writes, with two differences that training needs: history only grows
(the template drops earlier reasoning at a new user turn), and text inside messages cannot become a control token.
Each image becomes one placeholder; a model's vision processor knows how many tokens it stands for.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from envs.message import ImagePart, Message, ToolSpec
from policy.model.tokenizer import HfTokenizer
from rollout.dialects.call_grammar import CALL, MARKS, parse_turn, xml_call
from rollout.dialects.control_text import ControlText
from rollout.dialects.parsed_turn import ParsedTurn, text_of

# The wording is the model's: it was trained on it, so it must not be changed.
CALL_INSTRUCTIONS = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within \
<tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT after
- If there is no function call available, answer the question like normal with your current knowledge and do not tell \
the user about function calls
</IMPORTANT>"""

RESULT_MARKS = ("<tool_response>", "</tool_response>")
IMAGE_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


class QwenDialect:
    """Example: reply([tool(5)]) -> ids of
    "\\n<|im_start|>user\\n<tool_response>\\n5\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n" + a thought."""

    def __init__(
        self,
        tokenizer: HfTokenizer,
        *,
        end_ids: Sequence[int] = (),
        thinking: bool = False,
        accepts_images: bool = False,
    ) -> None:
        """`end_ids` end a turn beside <|im_end|>; `thinking` leaves the thought of each turn to the policy.

        Raises `ValueError` where a control token is missing, those of images only if it `accepts_images`.
        """
        self.tokenizer = tokenizer
        tokenizer.special_id("<|im_start|>")
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([tokenizer.special_id("<|im_end|>"), *end_ids]))
        self.banned_token_ids: tuple[int, ...] = banned_ids(tokenizer, self.stop_token_ids)
        self.vocab_size = tokenizer.vocab_size
        self.accepts_images = accepts_images
        for mark in IMAGE_MARKS if accepts_images else ():
            tokenizer.special_id(mark)
        self._thinking = thinking
        self._header = "<|im_start|>assistant\n" + ("<think>\n" if thinking else EMPTY_THOUGHT)
        self._control = ControlText(tokenizer)

    @staticmethod
    def load(folder: str | Path, *, accepts_images: bool = False, thinking: bool = False) -> "QwenDialect":
        tokenizer = HfTokenizer.load(folder)
        ends = tokenizer.end_ids(folder)
        return QwenDialect(tokenizer, end_ids=ends, thinking=thinking, accepts_images=accepts_images)

    def prompt(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        opening = ""
        if tools:
            system, messages = _leading_system(messages)
            header = self._tools_header(tools) + (f"\n\n{self._text(system)}" if system and self._text(system) else "")
            opening = f"<|im_start|>system\n{header}<|im_end|>\n"
        return self._control.encode(opening + self._turns(messages) + self._header)

    def reply(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> list[int]:
        return self._control.encode("\n" + self._turns(messages) + self._header)

    def completion(self, message: Message, tools: Sequence[ToolSpec]) -> list[int]:
        thought = EMPTY_THOUGHT.removeprefix("<think>\n") if self._thinking else ""
        return self._control.encode(f"{thought}{self._spoken(message)}<|im_end|>")

    def check_tools(self) -> None:
        """Calls and results come back by construction; tests draw them."""

    def call_opening(self, name: str, tools: Sequence[ToolSpec]) -> list[int]:
        if self._thinking:
            raise ValueError("a thinking turn begins with its thought, not with a call")
        return self._control.encode(f"{CALL}\n<function={self._control.hide(name)}" + (">\n" if name else ""))

    def parse(self, token_ids: Sequence[int], tools: Sequence[ToolSpec]) -> ParsedTurn:
        return parse_turn(
            self.tokenizer, token_ids, stop_token_ids=self.stop_token_ids, starts_in_thought=self._thinking
        )

    def _text(self, message: Message) -> str:
        if not self.accepts_images:
            return self._control.hide(text_of(message, "qwen3_5").strip())
        if message.role == "system" and any(isinstance(part, ImagePart) for part in message.content):
            raise ValueError("dialect 'qwen3_5' shows no image in a system message: put it into a user message")
        parts = [
            "".join(IMAGE_MARKS) if isinstance(part, ImagePart) else self._control.hide(part.text)
            for part in message.content
        ]
        return "".join(parts).strip()

    def _tools_header(self, tools: Sequence[ToolSpec]) -> str:
        lines = "".join(f"\n{self._control.hide(json.dumps(tool_json(tool), ensure_ascii=False))}" for tool in tools)
        return f"# Tools\n\nYou have access to the following functions:\n\n<tools>{lines}\n</tools>{CALL_INSTRUCTIONS}"

    def _spoken(self, message: Message) -> str:
        """What an assistant message says after its thought."""
        calls = "\n".join(
            xml_call(self._control.hide(call.name), self._control.hide_json(call.arguments))
            for call in message.tool_calls
        )
        text = self._text(message)
        return f"{text}\n\n{calls}" if text and calls else text + calls

    def _turns(self, messages: Sequence[Message]) -> str:
        last_query = max((n for n, message in enumerate(messages) if message.role == "user"), default=-1)
        return "".join(self._each_turn(messages, last_query))

    def _each_turn(self, messages: Sequence[Message], last_query: int) -> Iterator[str]:
        for is_tool, run in groupby(enumerate(messages), key=lambda item: item[1].role == "tool"):
            if is_tool:  # all results of a turn share one user turn
                results = "".join(f"\n<tool_response>\n{self._text(m)}\n</tool_response>" for _, m in run)
                yield f"<|im_start|>user{results}<|im_end|>\n"
                continue
            for n, message in run:
                spoken = self._spoken(message) if message.role == "assistant" else self._text(message)
                thought = EMPTY_THOUGHT if message.role == "assistant" and n > last_query else ""
                yield f"<|im_start|>{message.role}\n{thought}{spoken}<|im_end|>\n"


def _leading_system(messages: Sequence[Message]) -> tuple[Message | None, Sequence[Message]]:
    if messages and messages[0].role == "system":
        return messages[0], messages[1:]
    return None, messages


def tool_json(tool: ToolSpec) -> dict[str, object]:
    """A tool as chat templates list it."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def banned_ids(tokenizer: HfTokenizer, stop_token_ids: Sequence[int]) -> tuple[int, ...]:
    """Special tokens, "<|...|>" and result marks, but not those that end a turn or mark a thought or a call."""
    return tuple(
        i
        for text, i in tokenizer.control_ids.items()
        if (tokenizer.added_tokens[text].special or text.startswith("<|") or text in RESULT_MARKS)
        and text not in MARKS
        and i not in stop_token_ids
    )
