"""Stand-ins for the environment's side of an episode, and a tokenizer folder's content, made from nothing."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from envs.message import Message, ToolResult, ToolSpec
from envs.outcome import EnvFailure, ResetOutcome, StepOutcome
from envs.task import Task

ADD = ToolSpec(
    name="add",
    description="Add two integers.",
    parameters={
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
        "required": ["a"],
    },
)
TASK = Task(task_id="train/fake/0", env_id="Fake-v0", env_name="fake", seed=0)

Before = Callable[[str, str], Awaitable[None]]


def tool_message(content: str, call_id: str = "0") -> Message:
    return Message.tool(ToolResult(call_id=call_id, name="add", content=content))


async def at_once(phase: str, key: str) -> None:
    """Nothing to wait for."""


class ScriptedHost:
    """An `EnvHost` that answers "r1", "r2" ... and ends with `reward` after `turns` steps.

    `failures` {"open" | "step" | "finish": a failure to return, or an exception to raise}; `before(phase, key)` is
    awaited first. Example: host.log -> [("open", "g/0@0.0"), ("step", "g/0@0.0"), ("close", "g/0@0.0")]
    """

    def __init__(
        self,
        *,
        turns: int = 1,
        max_turns: int = 8,
        reward: float | None = 1.0,
        truncated: bool = False,
        prompt: Sequence[Message] = (Message.user("q"),),
        failures: dict[str, EnvFailure | Exception] | None = None,
        before: Before = at_once,
    ) -> None:
        self._turns, self._max_turns, self._reward, self._truncated = turns, max_turns, reward, truncated
        self._prompt = tuple(prompt)
        self.failures = failures or {}
        self._before = before
        self.log: list[tuple[str, str]] = []
        self.seen: dict[str, list[Message]] = {}
        """Key -> assistant messages it was given."""

    async def _enter(self, phase: str, key: str) -> EnvFailure | None:
        self.log.append((phase, key))
        await self._before(phase, key)
        failure = self.failures.get(phase)
        if isinstance(failure, Exception):
            raise failure
        return failure

    async def open(self, key: str, task: Task) -> ResetOutcome:
        failure = await self._enter("open", key)
        self.seen[key] = []
        return ResetOutcome(
            messages=self._prompt,
            tools=(ADD,),
            max_turns=self._max_turns,
            problem_digest="d",
            meta={"level": 0},
            failure=failure,
        )

    async def step(self, key: str, message: Message) -> StepOutcome:
        failure = await self._enter("step", key)
        self.seen[key].append(message)
        step = len(self.seen[key])
        ended = step == self._turns
        return StepOutcome(
            messages=() if ended else (tool_message(f"r{step}"),),
            reward=self._reward if ended else None,
            reward_parts={"answer": 1.0} if ended else {},
            terminated=ended and not self._truncated,
            truncated=ended and self._truncated,
            meta={"num_tool_calls": step},
            failure=failure,
        )

    async def finish(self, key: str) -> StepOutcome:
        failure = await self._enter("finish", key)
        return StepOutcome(reward=self._reward, truncated=True, failure=failure)

    async def close(self, key: str) -> None:
        self.log.append(("close", key))

    async def digests(self, tasks: list[Task]) -> list[str]:
        return ["d" for _ in tasks]


async def forever(phase: str, key: str) -> None:
    await asyncio.Event().wait()


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

CHATML = (
    "{#- tools: not shown -#}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] %}"
    '{{- \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson }}'
    "{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def chatml_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE; role marks are special tokens, call and thought marks are added without being special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["user assistant tool name arguments <|im_end|> <tool_call> \n\n"] * 4, trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer
