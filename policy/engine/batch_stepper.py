"""Continuous batching, one step at a time: requests join and leave the running batch between any two steps.

A step is: admit what waits and fits (one packed prefill of exact lengths, which gives each admitted request its first
token), then one decode of the whole batch. This class is synchronous and belongs to one thread;
`policy.engine.step_engine` runs it on its own thread and answers asyncio callers.

Invariants between two steps:
- running request i uses batch row i, sampling row i and cache slot i, for i in [0, B);
- the state in its slot holds all its tokens but the last sampled one, which the next decode feeds;
- no logits wait to be sampled from, so every token is stamped with the version of the weights that gave its logits.
  (Kept prompts do hold logits: they are dropped whenever weights change.)
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from conf.schema import EngineConfig
from policy.engine.protocol import CachePolicy, Completion, EngineError, EngineStats, FinishReason, Snapshot
from policy.engine.running_batch import RunningBatch, Ticket
from policy.engine.sampling import SamplingRows
from policy.engine.session_slots import KeptState, SessionSlots
from policy.model.checkpoint_io import load_numpy_tensors
from policy.model.model import PolicyModel
from policy.sync.snapshot import WeightSyncError
from policy.sync.weight_offer import OfferedSnapshot

PREFILL_TOKENS = 1024
"""Most tokens of one packed prefill (a longer prompt goes alone), so that running requests do not starve."""


@dataclass(kw_only=True, slots=True)
class _Pack:
    """Requests admitted together, N of them fed in one packed prefill."""

    feeds: list[np.ndarray] = field(default_factory=list)
    """N arrays: the tokens that are not in a state yet."""
    slots: list[int] = field(default_factory=list)
    """N slots they are fed to."""
    origins: list[int | torch.Tensor] = field(default_factory=list)
    """For each admitted request, in the order of its row, where its first logits come from: a feed, or (V,) kept."""
    leaders: dict[bytes, int] = field(default_factory=dict)
    """Prompt -> the feed that computes it; later requests with the same prompt copy its state."""
    fresh: list[int] = field(default_factory=list)
    """Feeds that are whole prompts."""
    num_tokens: int = 0


class BatchStepper:
    """Example: stepper.swap(snapshot, "recompute"); stepper.add(ticket); stepper.step(); stepper.finished -> []"""

    def __init__(self, model: PolicyModel, config: EngineConfig, *, clock: Callable[[], float]) -> None:
        self._model = model
        self._clock = clock
        self._max_running = config.max_running
        num_slots = max(config.max_running, config.max_sessions)
        self._cache = model.new_cache(num_slots, config.max_model_tokens)
        self._slots = SessionSlots(self._cache, num_slots)
        self._batch = RunningBatch(config.max_running, config.max_model_tokens)
        self._device = model.device
        self._sampling = SamplingRows(config.max_running, model.config.vocab_size, self._device)
        self._waiting: deque[Ticket] = deque()
        self._earliest_waiting_s = float("inf")
        """No waiting request is overdue before this time."""
        self._tickets: dict[str, Ticket] = {}
        self.policy_version = -1
        self.finished: list[tuple[Ticket, Completion | EngineError]] = []
        """What ended since the owner last emptied it."""
        self._sampled = self._prefilled = self._cached = self._steps = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._batch.size)

    def stats(self) -> EngineStats:
        return EngineStats(
            sampled_tokens=self._sampled,
            prefilled_tokens=self._prefilled,
            cached_tokens=self._cached,
            steps=self._steps,
            running=self._batch.size,
            waiting=len(self._waiting),
            sessions=self._slots.num_sessions,
            busy_s=self._busy_s,
        )

    def start(self) -> None:
        """The model was built by the caller."""

    def close(self) -> None:
        """Nothing outlives the object."""

    # --- commands, between two steps ---

    def add(self, ticket: Ticket) -> None:
        self._tickets[ticket.request.request_id] = ticket
        self._waiting.append(ticket)
        self._earliest_waiting_s = min(self._earliest_waiting_s, ticket.deadline_s)

    def abort(self, request_id: str) -> None:
        if ticket := self._tickets.get(request_id):
            self._end(ticket, "abort")

    def close_session(self, session_id: str) -> None:
        self._slots.drop_session(session_id)
        for ticket in self._tickets.values():
            if ticket.request.session_id == session_id:
                ticket.keeps_session = False

    def swap(self, snapshot: Snapshot, cache_policy: CachePolicy) -> None:
        """Serve other weights from the next step on. Raises `WeightSyncError`, all as before, if they do not fit."""
        if isinstance(snapshot, OfferedSnapshot):
            raise WeightSyncError(f"version {snapshot.version} is an offer; engine=local takes tensors alone")
        load_numpy_tensors(self._model, snapshot.tensors)
        self._model.refresh_decode_weights()
        self.policy_version = snapshot.version
        self._slots.drop_kept(sessions=cache_policy == "recompute")
        if cache_policy == "recompute":
            self._recompute_running()

    # --- one step ---

    def step(self) -> None:
        now = self._clock()
        self._expire(now)
        self._admit(now)
        if self._batch.size:
            self._decode()
        self._steps += 1
        self._busy_s += self._clock() - now

    def _expire(self, now: float) -> None:
        for row in reversed(self._batch.overdue(now)):
            self._end(self._batch.tickets[row], "deadline")
        if now >= self._earliest_waiting_s:
            for ticket in [ticket for ticket in self._waiting if ticket.deadline_s <= now]:
                self._end(ticket, "deadline")
            self._earliest_waiting_s = min((ticket.deadline_s for ticket in self._waiting), default=float("inf"))

    def _admit(self, now: float) -> None:
        pack, first = _Pack(), self._batch.size
        while self._waiting and self._batch.size < self._max_running and self._admit_next(pack):
            pass
        if not pack.origins:
            return
        logits = self._prefill(pack, first)
        prefilled_s = self._clock()
        for ticket in self._batch.tickets[first:]:
            ticket.admitted_s, ticket.prefilled_s = now, prefilled_s
        self._sample(first, logits)

    def _admit_next(self, pack: _Pack) -> bool:
        """Admit the first waiting request into `pack`; False where its prefill is too long to join the others."""
        ticket = self._waiting[0]
        prompt_ids = ticket.prompt_ids
        prompt_key = prompt_ids.tobytes()
        leader = pack.leaders.get(prompt_key)
        kept = self._find_kept(ticket, prompt_key) if leader is None else None
        num_known = len(prompt_ids) if leader is not None else 0 if kept is None else len(kept.token_ids)
        num_new = len(prompt_ids) - num_known
        if pack.feeds and pack.num_tokens + num_new > PREFILL_TOKENS:
            return False
        self._waiting.popleft()
        slot = self._slots.claim(kept)
        row = self._batch.join(ticket)
        assert slot == row
        self._sampling.put(row, ticket.request.sampling, ticket.stream)
        ticket.cached_tokens = num_known
        self._cached += num_known
        if leader is not None:
            pack.origins.append(leader)
        elif kept is not None and kept.logits is not None:
            pack.origins.append(kept.logits)
        else:
            if num_known == 0:
                pack.fresh.append(len(pack.feeds))
            pack.leaders[prompt_key] = len(pack.feeds)
            pack.origins.append(len(pack.feeds))
            pack.feeds.append(prompt_ids[num_known:])
            pack.slots.append(slot)
            pack.num_tokens += num_new
        return True

    def _find_kept(self, ticket: Ticket, prompt_key: bytes) -> KeptState | None:
        session_id = ticket.request.session_id
        kept = self._slots.find_session(session_id, ticket.prompt_ids) if session_id is not None else None
        return kept or self._slots.find_prompt(prompt_key)

    def _prefill(self, pack: _Pack, first: int) -> torch.Tensor:
        """Bring the rows from `first` on to the end of their prompts: (n, V) logits there."""
        logits = self._feed(pack.feeds, pack.slots)
        for feed in pack.fresh:
            self._slots.keep_prompt(pack.slots[feed], pack.feeds[feed], logits[feed])
        for row, origin in enumerate(pack.origins, first):
            if isinstance(origin, int) and pack.slots[origin] != row:
                self._cache.copy(pack.slots[origin], row)
        return torch.stack([logits[origin] if isinstance(origin, int) else origin for origin in pack.origins])

    def _feed(self, feeds: list[np.ndarray], slots: list[int]) -> list[torch.Tensor]:
        """Continue the states of N slots by N arrays of tokens, packed; N (V,) logits after each."""
        if not feeds:
            return []
        starts = torch.tensor([0, *(len(feed) for feed in feeds)], device=self._device).cumsum(0)
        token_ids = torch.from_numpy(np.concatenate(feeds)).to(self._device, torch.long)
        output = self._model(token_ids, starts, cache=self._cache, slots=slots, logits_at=starts[1:] - 1)
        self._prefilled += len(token_ids)
        return list(output.logits)

    def _decode(self) -> None:
        token_ids = torch.from_numpy(self._batch.last_tokens()).to(self._device)
        output = self._model.decode(token_ids, self._cache)
        if output.routed_experts is not None:
            self._batch.record_routes(output.routed_experts.cpu().numpy())
        self._sample(0, output.logits)

    def _sample(self, first: int, logits: torch.Tensor) -> None:
        """Give each row from `first` on its next token, and end those that are done with it."""
        draw = self._sampling.draw(logits, first, self._batch.num_sampled(first))
        self._batch.record(first, draw, self.policy_version)
        self._sampled += len(draw.token_ids)
        outcomes: dict[int, FinishReason | None] = dict(self._batch.ended(first, draw))
        finite = np.isfinite(draw.logprobs)
        if not finite.all():
            outcomes.update((first + int(row), None) for row in np.flatnonzero(~finite))
        for row in sorted(outcomes, reverse=True):  # from the top, because the last row moves into a gap
            self._end(self._batch.tickets[row], outcomes[row])

    def _recompute_running(self) -> None:
        """Compute the states of all running requests again, from the tokens they were fed so far."""
        rows = list(range(self._batch.size))
        while rows:
            feeds = [self._batch.fed_tokens(row) for row in rows]
            fits = int(np.searchsorted(np.cumsum([len(feed) for feed in feeds]), PREFILL_TOKENS, side="right"))
            count = max(1, fits)
            for row in rows[:count]:
                self._cache.reset(row)
            self._feed(feeds[:count], rows[:count])
            rows = rows[count:]

    # --- leaving ---

    def _end(self, ticket: Ticket, reason: FinishReason | None) -> None:
        """Answer a waiting or running request; None = its logits were not finite, so its state is of no use."""
        now, row = self._clock(), ticket.row
        del self._tickets[ticket.request.request_id]
        if row is None:
            self._waiting.remove(ticket)
            assert reason is not None
            self.finished.append((ticket, ticket.unstarted(reason, now)))
            return
        if reason is None:
            message = f"logits of policy version {self.policy_version} are not finite"
            self.finished.append((ticket, EngineError(f"{ticket.request.request_id}: {message}")))
        else:
            self.finished.append((ticket, self._batch.completion(row, reason, now)))
        keeps = ticket.keeps_session and reason is not None
        last = self._slots.release(
            row,
            session_id=ticket.request.session_id if keeps else None,
            token_ids=self._batch.fed_tokens(row),
        )
        self._batch.remove(row)
        if row != last:
            self._sampling.move(last, row)
