"""What is known of every running request, one row per cache slot, in arrays so that a step needs no loop over requests.

Shapes: B running requests, R rows there can be, L most tokens of a conversation, S most stop tokens of a request,
M sparse layers, k experts per token.
"""

import asyncio
from dataclasses import dataclass

import numpy as np

from policy.engine.protocol import Completion, FinishReason, GenerationRequest
from policy.engine.sampling import Draw


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """One request inside an engine. All times are readings of the engine's clock."""

    request: GenerationRequest
    prompt_ids: np.ndarray
    """(n,) int32, the engine's own copy."""
    reply: asyncio.Future[Completion]
    arrived_s: float
    stream: int
    """Key of its random stream."""
    row: int | None = None
    """Row and slot while it runs, None while it waits."""
    keeps_session: bool = True
    """False once its session was closed."""
    cached_tokens: int = 0
    admitted_s: float = 0.0
    prefilled_s: float = 0.0

    @property
    def deadline_s(self) -> float:
        """When it must end."""
        return self.arrived_s + self.request.deadline_s

    def unstarted(self, reason: FinishReason, now: float) -> Completion:
        """The completion of a request that ended before its first token."""
        none = np.zeros(0, np.int32)
        return Completion(
            token_ids=none,
            logprobs=none.astype(np.float32),
            policy_versions=none,
            finish_reason=reason,
            queue_s=now - self.arrived_s,
        )


class RunningBatch:
    """Example: batch = RunningBatch(8, 256); batch.join(ticket) -> row 0; batch.record(0, draw, version=3);
    batch.completion(0, "stop", now) -> Completion; batch.remove(0)
    """

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        self.tickets: list[Ticket] = []
        self._token_ids = np.zeros((max_rows, max_tokens), np.int32)
        """(R, L) prompt and what was sampled."""
        self._logprobs = np.zeros((max_rows, max_tokens), np.float32)
        self._versions = np.zeros((max_rows, max_tokens), np.int32)
        self._routes: np.ndarray | None = None
        """(R, L, M, k) int16: the experts of each sampled token as an input, -1 until it is fed. Made on first use."""
        self._prompt_len = np.zeros(max_rows, np.int64)
        self._length = np.zeros(max_rows, np.int64)
        self._limit = np.zeros(max_rows, np.int64)
        """Tokens, prompt included, at which a request ends."""
        self._deadline = np.zeros(max_rows, np.float64)
        self._stop_ids = np.full((max_rows, 1), -1, np.int64)
        """(R, S), filled up with -1."""
        self._rows = np.arange(max_rows)

    @property
    def size(self) -> int:
        return len(self.tickets)

    def join(self, ticket: Ticket) -> int:
        row, request = self.size, ticket.request
        prompt_len, stops = len(ticket.prompt_ids), request.sampling.stop_token_ids
        self.tickets.append(ticket)
        ticket.row = row
        self._token_ids[row, :prompt_len] = ticket.prompt_ids
        self._prompt_len[row] = self._length[row] = prompt_len
        self._limit[row] = min(prompt_len + request.sampling.max_tokens, self._token_ids.shape[1])
        self._deadline[row] = ticket.deadline_s
        if len(stops) > self._stop_ids.shape[1]:
            widened = np.full((len(self._rows), len(stops)), -1, np.int64)
            widened[:, : self._stop_ids.shape[1]] = self._stop_ids
            self._stop_ids = widened
        self._stop_ids[row] = -1
        self._stop_ids[row, : len(stops)] = stops
        return row

    def num_sampled(self, first: int = 0) -> np.ndarray:
        """(B - first,) tokens sampled so far by the rows from `first` on."""
        return self._length[first : self.size] - self._prompt_len[first : self.size]

    def last_tokens(self) -> np.ndarray:
        """(B,) int64: the tokens to feed next."""
        return self._token_ids[self._rows[: self.size], self._length[: self.size] - 1].astype(np.int64)

    def fed_tokens(self, row: int) -> np.ndarray:
        """(n,) int32 view: all that the model's state holds, which is everything but the last sampled token."""
        length = self._length[row]
        return self._token_ids[row, : length - (length > self._prompt_len[row])]

    def record(self, first: int, draw: Draw, version: int) -> None:
        """Append a token to each of the rows from `first` on."""
        rows = self._rows[first : self.size]
        at = self._length[first : self.size]
        self._token_ids[rows, at] = draw.token_ids
        self._logprobs[rows, at] = draw.logprobs
        self._versions[rows, at] = version
        if self._routes is not None:
            self._routes[rows, at] = -1
        self._length[first : self.size] += 1

    def record_routes(self, routes: np.ndarray) -> None:
        """Note the experts (B, M, k) that the last tokens took as inputs."""
        if self._routes is None:
            self._routes = np.full((*self._token_ids.shape, *routes.shape[1:]), -1, np.int16)
        self._routes[self._rows[: self.size], self._length[: self.size] - 1] = routes

    def ended(self, first: int, draw: Draw) -> list[tuple[int, FinishReason]]:
        """Rows from `first` on that end with the token just recorded, lowest first."""
        stopped = (self._stop_ids[first : self.size] == draw.token_ids[:, None]).any(1)
        full = self._length[first : self.size] >= self._limit[first : self.size]
        return [(first + int(i), "stop" if stopped[i] else "length") for i in np.flatnonzero(stopped | full)]

    def overdue(self, now: float) -> list[int]:
        return np.flatnonzero(self._deadline[: self.size] <= now).tolist()

    def completion(self, row: int, reason: FinishReason, now: float) -> Completion:
        ticket = self.tickets[row]
        sampled = slice(self._prompt_len[row], self._length[row])
        return Completion(
            token_ids=self._token_ids[row, sampled].copy(),
            logprobs=self._logprobs[row, sampled].copy(),
            policy_versions=self._versions[row, sampled].copy(),
            finish_reason=reason,
            routed_experts=None if self._routes is None else self._routes[row, sampled].copy(),
            cached_tokens=ticket.cached_tokens,
            queue_s=ticket.admitted_s - ticket.arrived_s,
            prefill_s=ticket.prefilled_s - ticket.admitted_s,
            decode_s=now - ticket.prefilled_s,
        )

    def remove(self, row: int) -> None:
        """Take a row out; the last one is moved into its place."""
        self.tickets[row].row = None
        last = self.size - 1
        moved = self.tickets.pop()
        if row == last:
            return
        self.tickets[row] = moved
        moved.row = row
        length = self._length[last]
        for table in (self._token_ids, self._logprobs, self._versions, self._routes):
            if table is not None:
                table[row, :length] = table[last, :length]
        for column in (self._prompt_len, self._length, self._limit, self._deadline, self._stop_ids):
            column[row] = column[last]
