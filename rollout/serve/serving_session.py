"""A conversation that an agent outside leads: every turn it asks for becomes part of a token row.

A request brings the whole history again. Where that history is one we sampled, unchanged, the recorded ids are used
as they are and only the new messages are rendered behind them. Where the client rewrote it (a summary, a dropped turn,
an edited answer, other tools) a new row begins with the history as given: its tokens were not sampled from it.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, takewhile
from typing import Any, Literal

import numpy as np

from envs.message import Message, ToolSpec
from policy.engine.protocol import Completion, Engine, EngineError, GenerationRequest, SamplingSpec, UnsupportedRequest
from rollout.dialects.dialect import ParsedTurn, Renderer
from rollout.play.episode import EpisodeSettings
from rollout.play.swap_lock import RolloutLock
from rollout.record.token_record import TokenRecord
from rollout.record.trajectory import Turn
from rollout.serve.serving_wire import ApiError, ChatRequest, ServedTurn

ENGINE_GRACE_S = 30.0
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
class Row:
    """One token row and the history it stands for."""

    tools: str
    """The tools shown, canonical."""
    temperature: float
    prompt: tuple[Message, ...]
    record: TokenRecord = field(default_factory=TokenRecord)
    history: list[str] = field(default_factory=list)
    """The messages in the row, canonical, the last one sampled."""
    turns: list[Turn] = field(default_factory=list)
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
    """Example: turn = await session.complete(chat); session.finish(SessionEnd(kind="reward", reward=1.0)); then
    session.rows[-1].record.token_ids."""

    def __init__(
        self,
        session_id: str,
        *,
        engine: Engine,
        renderer: Renderer,
        settings: EpisodeSettings,
        lock: RolloutLock,
        fixed_temperature: bool,
        seeds: Callable[[int], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`fixed_temperature`: requests may not ask for another one than that of `settings` (training).
        `seeds`: number of the turn -> sampling seed."""
        self.session_id = session_id
        self.rows: list[Row] = []
        self.ended: asyncio.Future[SessionEnd] = asyncio.get_running_loop().create_future()
        self.holder = ""
        """Who took it."""
        self.env_messages: tuple[Message, ...] = ()
        self.env_tools: tuple[ToolSpec, ...] = ()
        """What the environment of its task shows; empty without one."""
        self.facts: dict[str, Any] = {}
        """What the client is told of its task."""
        self._engine = engine
        self._renderer = renderer
        self._settings = settings
        self._lock = lock
        self._fixed_temperature = fixed_temperature
        self._seeds = seeds
        self._clock = clock
        self._started = clock()
        self._num_turns = 0
        self._one_at_a_time = asyncio.Lock()

    @property
    def engine_name(self) -> str:
        """Kind of engine that samples."""
        return self._engine.capabilities.name

    @property
    def left_s(self) -> float:
        """Seconds to its deadline."""
        return self._settings.deadline_s - (self._clock() - self._started)

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

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
            row, given = self._row_of(chat)
            limit = self._settings.max_model_tokens - len(row.record) - len(given)
            if limit < 1:
                raise ApiError(
                    f"the conversation has {len(row.record) + len(given)} tokens; it must stay below "
                    f"{self._settings.max_model_tokens} (engine.max_model_tokens)",
                    param="messages",
                )
            most = min(limit, self._settings.max_turn_tokens, chat.max_tokens or limit)
            return await self._sample(row, given, chat, most)

    def _row_of(self, chat: ChatRequest) -> tuple[Row, list[int]]:
        """The row that this history continues, or a new one; and the ids to add before sampling."""
        temperature = self._temperature(chat)
        # not sorted: the order of a tool's parameters is part of the prompt
        tools = json.dumps(
            [[t.name, t.description, t.parameters] for t in chat.tools], ensure_ascii=False
        )  # order counts
        history = [canonical(message) for message in chat.messages]
        fitting = [row for row in self.rows if row.continued_by(chat.messages, history, tools)]
        row = max(fitting, key=lambda row: len(row.history), default=None)
        try:
            if row is not None and row.temperature == temperature:
                return row, self._renderer.reply(chat.messages[len(row.history) :], chat.tools)
            given = self._renderer.prompt(chat.messages, chat.tools)
        except ValueError as error:  # a renderer's own words about what it cannot write
            raise ApiError(f"these messages cannot be rendered: {error}", param="messages") from None
        if len(self.rows) >= MAX_ROWS:
            raise ApiError(f"the session has {MAX_ROWS} token rows already: the history was rewritten too often")
        return Row(tools=tools, temperature=temperature, prompt=chat.messages), given

    def _temperature(self, chat: ChatRequest) -> float:
        ours = self._settings.temperature
        if chat.temperature is None or chat.temperature == ours:
            return ours
        if self._fixed_temperature:
            raise ApiError(
                f"temperature={chat.temperature:g} is not served: this run trains at {ours:g} (rollout.temperature)",
                param="temperature",
            )
        return chat.temperature

    async def _sample(self, row: Row, given: list[int], chat: ChatRequest, most: int) -> ServedTurn:
        turn, self._num_turns = self._num_turns, self._num_turns + 1
        prompt_ids = np.concatenate([row.record.token_ids, np.array(given, np.int32)])
        async with self._lock.turn():
            if (left_s := self.left_s) <= 0:
                raise ApiError(f"the deadline of session {self.session_id!r} has passed", code=409)
            request = GenerationRequest(
                request_id=f"{self.session_id}/{turn}",
                prompt_ids=prompt_ids,
                sampling=SamplingSpec(
                    temperature=row.temperature,
                    max_tokens=most,
                    stop_token_ids=self._renderer.stop_token_ids,
                    banned_token_ids=self._renderer.banned_token_ids,
                    seed=self._seed(chat, turn),
                ),
                session_id=self.session_id if self._engine.capabilities.sessions else None,
                deadline_s=left_s,
            )
            asked = self._clock()
            completion = await self._generate(request)
            sample_s = self._clock() - asked
        if completion.finish_reason in ("abort", "deadline") or self.ended.done():
            raise ApiError(f"session {self.session_id!r} ended while it sampled", code=409)
        row.record.append_given(given)  # only now: a request that failed leaves no trace
        row.record.append_sampled(completion)
        ids = completion.token_ids.tolist()
        message = self._told(self._renderer.parse(ids, chat.tools), ids, turn, chat.tools)
        start = len(row.record) - len(ids)
        self._take(row, chat, message, start, completion.finish_reason, sample_s)
        return ServedTurn(
            completion_id=f"chatcmpl-{self.session_id}-{turn}",
            message=message,
            finish_reason="tool_calls" if message.tool_calls and row.open else completion.finish_reason,
            prompt_tokens=start,
            token_ids=tuple(ids),
            logprobs=tuple(map(float, completion.logprobs)),
            policy_version=int(completion.policy_versions[-1]),
            created_s=int(time.time()),
        )

    async def _generate(self, request: GenerationRequest) -> Completion:
        try:
            return await asyncio.wait_for(self._engine.generate(request), request.deadline_s + ENGINE_GRACE_S)
        except UnsupportedRequest as error:
            raise ApiError(str(error)) from None
        except (EngineError, TimeoutError) as error:  # no fault of the client: the session ends, the group retries it
            if not self.ended.done():
                self.finish(SessionEnd(kind="lost", text=f"engine: {type(error).__name__}: {error}"))
            raise ApiError(f"the engine failed: {error}", code=503) from None

    def _seed(self, chat: ChatRequest, turn: int) -> int | None:
        if not self._engine.capabilities.per_request_seed:
            if chat.seed is not None:
                raise ApiError("this engine takes no seed of a request", param="seed")
            return None
        return self._seeds(turn) if chat.seed is None else chat.seed

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

    def _take(self, row: Row, chat: ChatRequest, message: Message, start: int, finish: str, sample_s: float) -> None:
        if row.turns:
            reply = chat.messages[len(row.history) :]
            row.turns[-1] = replace(row.turns[-1], reply=reply)
        else:
            self.rows.append(row)
        status = "ok" if message.tool_calls else "none"
        row.turns.append(
            Turn(
                start=start,
                end=len(row.record),
                message=message,
                finish_reason=finish,
                parse_status=status,
                sample_s=sample_s,
            )
        )
        row.history = [canonical(m) for m in (*chat.messages, message)]
        row.open = finish == "stop"


def canonical(message: Message) -> str:
    """Equal for messages that say the same, however a client spells them."""
    calls = [[call.call_id, call.name, call.arguments] for call in message.tool_calls]
    result = message.tool_result.call_id if message.tool_result else None
    return json.dumps([message.role, message.text, calls, result], sort_keys=True)
