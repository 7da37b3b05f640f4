"""A conversation that an agent outside leads: every turn it asks for becomes part of a token row.

A request brings the whole history again. Where that history is one we sampled, unchanged, the recorded ids are used
as they are and only the new messages are rendered behind them. Where the client rewrote it (a summary, a dropped turn,
an edited answer, other tools) a new row begins with the history as given: its tokens were not sampled from it.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Any, Literal

from envs.message import Message, ToolSpec
from policy.engine.protocol import Completion, EngineError, UnsupportedRequest
from rollout.dialects.dialect import ParsedTurn
from rollout.play.episode import DeadlinePassed, Episode
from rollout.play.token_row import TokenRow
from rollout.serve.serving_wire import ApiError, ChatRequest, ServedTurn

MAX_ROWS = 64
"""Rows of one session: a client that rewrites its history at every turn is told so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionEnd:
    """How a session ended."""

    kind: Literal["reward", "answer", "abort", "lost", "deadline"]
    """"reward" brings one, "answer" a text for the environment to score; "abort" is the client's wish, "lost" a client
    that is gone."""
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    text: str = ""
    """The answer, or why it failed."""


@dataclass(kw_only=True, slots=True)
class Thread:
    """One token row and the history it stands for."""

    row: TokenRow
    """Its tokens and turns."""
    tools: str
    """The tools shown, canonical."""
    history: list[str] = field(default_factory=list)
    """The messages in the row, canonical, the last one sampled."""
    open: bool = True
    """Its last turn ended by itself, so that a reply can follow."""

    def continued_by(self, messages: Sequence[Message], history: list[str], tools: str) -> bool:
        known = len(self.history)
        return (
            self.open
            and self.tools == tools
            and known < len(history)
            and history[:known] == self.history
            and all(message.role != "assistant" for message in messages[known:])
        )


class ServedSession:
    """The agent's side of one episode.

    Example: turn = await session.complete(chat); session.finish(SessionEnd(kind="reward", reward=1.0)); then
    episode.rows[-1].record.token_ids.
    """

    def __init__(self, episode: Episode) -> None:
        self.session_id = episode.context.key.replace("/", ".")
        """Stands in addresses."""
        self.ended: asyncio.Future[SessionEnd] = asyncio.get_running_loop().create_future()
        """How it ended, or the exception of an engine that failed."""
        self.holder = ""
        """Who took it."""
        self.env_messages: tuple[Message, ...] = episode.shown.messages
        self.env_tools: tuple[ToolSpec, ...] = episode.shown.tools
        """What the environment of its task shows; empty without one."""
        task = episode.context.task
        self.facts: dict[str, Any] = {
            "task_id": task.task_id,
            "env_id": task.env_id,
            "env_name": task.env_name,
            "seed": task.seed,
            "level": task.level,
        }
        """What the client is told of its task."""
        self._episode = episode
        self._settings = episode.context.settings
        self._renderer = episode.context.renderer
        self._threads: list[Thread] = []
        self._num_turns = 0
        self._one_at_a_time = asyncio.Lock()

    @property
    def left_s(self) -> float:
        """Seconds to its deadline."""
        return self._episode.left_s()

    def finish(self, end: SessionEnd) -> None:
        """End it; the first end counts. Raises `ApiError` for a second one by the client."""
        if self.ended.done():
            raise ApiError(f"session {self.session_id!r} has ended", code=409)
        self.ended.set_result(end)

    async def complete(self, chat: ChatRequest) -> ServedTurn:
        """Sample the turn that follows `chat.messages`. Raises `ApiError`."""
        async with self._one_at_a_time:
            if self.ended.done():
                raise ApiError(f"session {self.session_id!r} has ended", code=409)
            thread, given = self._thread_of(chat)
            num_tokens = len(thread.row.record) + len(given)
            if num_tokens >= self._settings.max_model_tokens:
                raise ApiError(
                    f"the conversation has {num_tokens} tokens; it must stay below "
                    f"{self._settings.max_model_tokens} (engine.max_model_tokens)",
                    param="messages",
                )
            return await self._take_turn(thread, given, chat)

    def _thread_of(self, chat: ChatRequest) -> tuple[Thread, list[int]]:
        """The thread that this history continues, or a new one; and the ids to add before sampling."""
        temperature = self._temperature(chat)
        # not sorted: the order of a tool's parameters is part of the prompt
        tools = json.dumps(
            [[t.name, t.description, t.parameters] for t in chat.tools], ensure_ascii=False
        )  # order counts
        history = [canonical(message) for message in chat.messages]
        fitting = [thread for thread in self._threads if thread.continued_by(chat.messages, history, tools)]
        thread = max(fitting, key=lambda thread: len(thread.history), default=None)
        try:
            if thread is not None and thread.row.temperature == temperature:
                return thread, self._renderer.reply(chat.messages[len(thread.history) :], chat.tools)
            given = self._renderer.prompt(chat.messages, chat.tools)
        except ValueError as error:  # a renderer's own words about what it cannot write
            raise ApiError(f"these messages cannot be rendered: {error}", param="messages") from None
        if len(self._threads) >= MAX_ROWS:
            raise ApiError(f"the session has {MAX_ROWS} token rows already: the history was rewritten too often")
        return Thread(row=TokenRow(temperature=temperature, prompt=chat.messages), tools=tools), given

    def _temperature(self, chat: ChatRequest) -> float:
        ours = self._settings.temperature
        if chat.temperature is None or chat.temperature == ours:
            return ours
        if not self._settings.other_temperatures:
            raise ApiError(
                f"temperature={chat.temperature:g} is not served: this run trains at {ours:g} (rollout.temperature)",
                param="temperature",
            )
        return chat.temperature

    async def _take_turn(self, thread: Thread, given: list[int], chat: ChatRequest) -> ServedTurn:
        number, self._num_turns = self._num_turns, self._num_turns + 1
        row = thread.row
        completion, sample_s = await self._sample(row, number, given, chat)
        if completion.finish_reason in ("abort", "deadline") or self.ended.done():
            raise ApiError(f"session {self.session_id!r} ended while it sampled", code=409)
        if row.turns:
            row.reply(chat.messages[len(thread.history) :])
        else:
            self._threads.append(thread)
            self._episode.begin_row(row)
        row.record.append_given(given)  # only now: a request that failed leaves no trace
        ids = completion.token_ids.tolist()
        message = self._told(self._renderer.parse(ids, chat.tools), ids, number, chat.tools)
        row.take(completion, message, parse_status="ok" if message.tool_calls else "none", sample_s=sample_s)
        thread.history = [canonical(m) for m in (*chat.messages, message)]
        thread.open = completion.finish_reason == "stop"
        return ServedTurn(
            completion_id=f"chatcmpl-{self.session_id}-{number}",
            message=message,
            finish_reason="tool_calls" if message.tool_calls and thread.open else completion.finish_reason,
            prompt_tokens=row.turns[-1].start,
            token_ids=tuple(ids),
            logprobs=tuple(map(float, completion.logprobs)),
            policy_version=int(completion.policy_versions[-1]),
            created_s=int(time.time()),
        )

    async def _sample(
        self, row: TokenRow, number: int, given: list[int], chat: ChatRequest
    ) -> tuple[Completion, float]:
        if chat.seed is not None and not self._episode.context.engine.capabilities.per_request_seed:
            raise ApiError("this engine takes no seed of a request", param="seed")
        try:
            return await self._episode.sample(row, number, given, max_tokens=chat.max_tokens, seed=chat.seed)
        except DeadlinePassed:
            raise ApiError(f"the deadline of session {self.session_id!r} has passed", code=409) from None
        except UnsupportedRequest as error:
            raise ApiError(str(error)) from None
        except (EngineError, TimeoutError) as error:  # no fault of the client: the session ends, the group retries it
            if not self.ended.done():
                self.ended.set_exception(error)
            raise ApiError(f"the engine failed: {error}", code=503) from None

    def _told(self, parsed: ParsedTurn, ids: list[int], turn: int, tools: Sequence[ToolSpec]) -> Message:
        """The message as the client reads it: calls get ids of their own, ill-formed ones become text."""
        message = parsed.message
        if parsed.status == "malformed" or (message.tool_calls and not tools):
            return Message.assistant(self._plain_text(ids))
        calls = [replace(call, call_id=f"call_{turn}_{n}") for n, call in enumerate(message.tool_calls)]
        return Message.assistant(message.text, calls)

    def _plain_text(self, ids: list[int]) -> str:
        """Ids up to the stop token, control tokens spelled out."""
        names = {i: name for name, i in self._renderer.tokenizer.control_ids.items()}
        runs = groupby(takewhile(lambda i: i not in self._renderer.stop_token_ids, ids), key=names.get)
        return "".join(name * len(list(run)) if name else self._renderer.tokenizer.decode(run) for name, run in runs)


def canonical(message: Message) -> str:
    """Equal for messages that say the same, however a client spells them."""
    calls = [[call.call_id, call.name, call.arguments] for call in message.tool_calls]
    result = message.tool_result.call_id if message.tool_result else None
    return json.dumps([message.role, message.text, calls, result], sort_keys=True)
