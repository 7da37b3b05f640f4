"""A conversation that an agent outside leads: every turn it asks for becomes part of a token row.

A request brings the whole history again. Where that history is one we sampled, unchanged, the recorded ids are used
as they are and only the new messages are rendered behind them. Where the client rewrote it (a summary, a dropped turn,
an edited answer, other tools) a new row begins with the history as given: its tokens were not sampled from it.

A client's retry of a turn gets the answer that was sampled for it. An equal request sent on purpose is sampled again.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Any, Literal

from envs.message import Message, ToolSpec
from policy.engine.protocol import Completion, EngineError, UnsupportedRequest
from rollout.dialects.parsed_turn import ParsedTurn
from rollout.play.episode import DeadlinePassed, Episode
from rollout.play.token_row import TokenRow
from rollout.serve.chat_answer import ServedTurn
from rollout.serve.chat_request import ApiError, ChatRequest
from rollout.serve.history import canonical

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
    """The messages before its last turn, canonical."""
    told: tuple[str, ...] = ()
    """How the client may bring its last turn back, canonical: as told, or with the stop text put back."""
    open: bool = True
    """Its last turn ended by itself, so that a reply can follow."""

    @property
    def num_messages(self) -> int:
        return len(self.history) + 1

    def continued_by(self, messages: Sequence[Message], history: list[str], tools: str) -> bool:
        before = len(self.history)
        return (
            self.open
            and self.tools == tools
            and self.num_messages < len(history)
            and history[:before] == self.history
            and history[before] in self.told
            and all(message.role != "assistant" for message in messages[self.num_messages :])
        )


@dataclass(slots=True)
class Answer:
    """What one request is answered, kept for its retries."""

    turns: asyncio.Task[tuple[ServedTurn, ...]]
    """Sampled for it, or the `ApiError` that refuses it."""
    is_gone: Callable[[], Awaitable[bool]]
    """Whether the client has left, asked while the answer is on its way."""
    arrived: bool | None = None
    """Whether all of it was sent to a client that still listened; None while it is on its way."""

    @property
    def failed(self) -> bool:
        return self.turns.done() and (self.turns.cancelled() or self.turns.exception() is not None)

    async def broke(self) -> bool:
        return not self.arrived if self.arrived is not None else await self.is_gone()


class ServedSession:
    """The agent's side of one episode.

    Example: (turn,) = await session.complete(chat); session.finish(SessionEnd(kind="reward", reward=1.0)); then
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
        self._dialect = episode.context.dialect
        self._threads: list[Thread] = []
        self._answers: dict[str, list[Answer]] = {}
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

    async def answer(
        self, chat: ChatRequest, digest: str, *, is_retry: bool, is_gone: Callable[[], Awaitable[bool]]
    ) -> Answer:
        """The kept answer where this request is one sent again, else a new one. `digest` names the request's body;
        `is_retry`: the client says so. One whose first answer did not arrive is a retry too."""
        known = [answer for answer in self._answers.get(digest, []) if not answer.failed]
        broken = [answer for answer in known if await answer.broke()]
        if broken or (is_retry and known):
            answer = broken[0] if broken else known[-1]
            answer.arrived, answer.is_gone = None, is_gone
            return answer
        answer = Answer(asyncio.create_task(self.complete(chat)), is_gone)
        self._answers[digest] = [*known, answer]
        return answer

    def is_continued_by(self, chat: ChatRequest) -> bool:
        """Whether the request goes on from a turn of this session, or asks again for one it has answered."""
        if self.ended.done():
            return False
        tools, history = _tools_text(chat.tools), canonical(chat.messages)
        return any(
            thread.continued_by(chat.messages, history, tools) or (thread.tools == tools and thread.history == history)
            for thread in self._threads
        )

    async def complete(self, chat: ChatRequest) -> tuple[ServedTurn, ...]:
        """Sample the turns that may follow `chat.messages`, one for each choice. Raises `ApiError`."""
        async with self._one_at_a_time:
            return tuple([await self._choice(chat, index) for index in range(chat.choices)])

    async def _choice(self, chat: ChatRequest, index: int) -> ServedTurn:
        if self.ended.done():
            raise ApiError(f"session {self.session_id!r} has ended", code=409)
        thread, given = self._thread_of(chat)
        opening = self._opening(chat)
        num_tokens = len(thread.row.record) + len(given) + len(opening)
        if num_tokens >= self._settings.max_model_tokens:
            raise ApiError(
                f"the conversation has {num_tokens} tokens; it must stay below "
                f"{self._settings.max_model_tokens} (engine.max_model_tokens)",
                param="messages",
            )
        if index and chat.seed is not None:
            chat = replace(chat, seed=chat.seed + index)  # with one seed all choices would be the same
        return await self._take_turn(thread, given, opening, chat)

    def _opening(self, chat: ChatRequest) -> list[int]:
        """The given ids that make a turn begin with a call, where the client demands one."""
        if chat.must_call is None:
            return []
        try:
            return self._dialect.call_opening(chat.must_call, chat.tools)
        except ValueError as error:
            raise ApiError(f"tool_choice: {error}; 'auto' is served", param="tool_choice") from None

    def _thread_of(self, chat: ChatRequest) -> tuple[Thread, list[int]]:
        """The thread that this history continues, or a new one; and the ids to add before sampling."""
        temperature = self._temperature(chat)
        tools, history = _tools_text(chat.tools), canonical(chat.messages)
        fitting = [thread for thread in self._threads if thread.continued_by(chat.messages, history, tools)]
        thread = max(fitting, key=lambda thread: thread.num_messages, default=None)
        try:
            if thread is not None and thread.row.temperature == temperature:
                return thread, self._dialect.reply(chat.messages[thread.num_messages :], chat.tools)
            given = self._dialect.prompt(chat.messages, chat.tools)
        except ValueError as error:  # a dialect's own words about what it cannot write
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

    async def _take_turn(self, thread: Thread, given: list[int], opening: list[int], chat: ChatRequest) -> ServedTurn:
        number, self._num_turns = self._num_turns, self._num_turns + 1
        row, given = thread.row, given + opening
        completion, sample_s = await self._sample(row, number, given, chat)
        if completion.finish_reason in ("abort", "deadline") or self.ended.done():
            raise ApiError(f"session {self.session_id!r} ended while it sampled", code=409)
        if row.turns:
            row.reply(chat.messages[thread.num_messages :])
        else:
            self._threads.append(thread)
            self._episode.begin_row(row)
        row.record.append_given(given)  # only now: a request that failed leaves no trace
        ids = completion.token_ids.tolist()
        spoken = self._spoken([*opening, *ids], number, chat.tools)
        message, cut_at = as_told(spoken, chat)
        row.take(completion, message, parse_status="ok" if message.tool_calls else "none", sample_s=sample_s)
        thread.history = canonical(chat.messages)
        endings = [message, Message.assistant(message.text + cut_at)] if cut_at else [message]
        thread.told = tuple(canonical([*chat.messages, ending])[-1] for ending in endings)
        thread.open = completion.finish_reason == "stop"
        finish = "stop" if cut_at else completion.finish_reason
        return ServedTurn(
            completion_id=f"chatcmpl-{self.session_id}-{number}",
            message=message,
            finish_reason="tool_calls" if message.tool_calls and thread.open else finish,
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

    def _spoken(self, ids: list[int], turn: int, tools: Sequence[ToolSpec]) -> Message:
        """The ids of a turn as a message: calls get ids of their own, ill-formed ones become text."""
        parsed: ParsedTurn = self._dialect.parse(ids, tools)
        message = parsed.message
        if parsed.status == "malformed" or (message.tool_calls and not tools):
            return Message.assistant(self._plain_text(ids))
        calls = [replace(call, call_id=f"call_{turn}_{n}") for n, call in enumerate(message.tool_calls)]
        return Message.assistant(message.text, calls)

    def _plain_text(self, ids: list[int]) -> str:
        """Ids up to the stop token, control tokens spelled out."""
        names = {i: name for name, i in self._dialect.tokenizer.control_ids.items()}
        runs = groupby(takewhile(lambda i: i not in self._dialect.stop_token_ids, ids), key=names.get)
        return "".join(name * len(list(run)) if name else self._dialect.tokenizer.decode(run) for name, run in runs)


def _tools_text(tools: Sequence[ToolSpec]) -> str:
    """Not sorted: the order of a tool's parameters is part of the prompt."""
    return json.dumps([[tool.name, tool.description, tool.parameters] for tool in tools], ensure_ascii=False)


def as_told(message: Message, chat: ChatRequest) -> tuple[Message, str]:
    """(what the client is told of a turn, the stop text it was cut at or "").

    Behind a stop text nothing is told, no call either: to the client sampling ended there. With `one_call` it is told
    of the first call. The token row keeps the whole turn in every case.
    """
    found = [(message.text.find(stop), stop) for stop in chat.stop if stop in message.text]
    if found:
        at, stop = min(found)
        return Message.assistant(message.text[:at]), stop
    calls = message.tool_calls[:1] if chat.one_call else message.tool_calls
    return Message.assistant(message.text, calls), ""
