"""Which slot of a model's cache holds what: running requests below, kept states above.

Slots [0, running) belong to the running requests, in the order of their batch rows, because a decode step advances the
first B slots. Every other slot is free or keeps a state that may be used again:

- a *session*: the state after the last turn of a conversation, moved into the next turn;
- a *prompt*: the state after a whole prompt together with what the model said there, copied into every later request
  with the same prompt (the members of a group).

Kept states are only ever a saving. The least recently used one goes when room is needed, and the request that would
have used it prefills its whole prompt instead.
"""

from bisect import insort
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

MAX_PROMPTS = 32
"""Most prompt states kept. They only take slots that are free."""


class SlotCache(Protocol):
    """What is asked of a model's cache."""

    def reset(self, slot: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...


@dataclass(kw_only=True, slots=True, eq=False)
class KeptState:
    """A state in a slot that no running request uses."""

    key: tuple[str, str | bytes]
    """("session", id) or ("prompt", bytes of the token ids)."""
    slot: int
    token_ids: np.ndarray
    """(L,) int32: all that was fed to reach this state."""
    logits: torch.Tensor | None = None
    """(V,) after the last token; prompts only."""


class SessionSlots:
    """Example: slots = SessionSlots(cache, 8); slots.claim() -> 0; slots.claim() -> 1;
    slots.release(0, session_id="a", token_ids=ids) keeps the state in slot 7, moves slot 1 to 0 and returns 1.
    """

    def __init__(self, cache: SlotCache, num_slots: int) -> None:
        self._cache = cache
        self.running = 0
        self._free = list(range(num_slots))
        """Sorted: kept states take the highest, out of the way of running requests."""
        self._kept: OrderedDict[tuple[str, str | bytes], KeptState] = OrderedDict()
        """Least recently used first."""
        self._num_prompts = 0

    @property
    def num_sessions(self) -> int:
        return len(self._kept) - self._num_prompts

    def find_session(self, session_id: str, prompt_ids: np.ndarray) -> KeptState | None:
        """The state of this session if it is that of a proper prefix of the prompt."""
        kept = self._kept.get(("session", session_id))
        if kept is None or len(kept.token_ids) >= len(prompt_ids):
            return None
        return kept if np.array_equal(kept.token_ids, prompt_ids[: len(kept.token_ids)]) else None

    def find_prompt(self, prompt_key: bytes) -> KeptState | None:
        return self._kept.get(("prompt", prompt_key))

    def claim(self, kept: KeptState | None = None) -> int:
        """Give the next running slot: with the kept state in it, or empty. A session is used up by this."""
        slot = self.running
        if kept is not None and kept.slot == slot:
            self._forget(kept)
        else:
            self._vacate(slot, kept)
            if kept is None:
                self._cache.reset(slot)
            else:
                self._cache.copy(kept.slot, slot)
                self._use(kept)
        self.running += 1
        return slot

    def release(self, slot: int, *, session_id: str | None, token_ids: np.ndarray) -> int:
        """Take a running slot back, keeping its state for `session_id` if given; `token_ids` are all it was fed.

        The last running slot, which is returned, is copied into its place.
        """
        last = self.running - 1
        self.running = last
        if session_id is not None:
            self.drop_session(session_id)
            target = slot if slot == last else self._take_free_slot()
            if target is not None:
                if target != slot:
                    self._cache.copy(slot, target)
                self._keep(KeptState(key=("session", session_id), slot=target, token_ids=token_ids.copy()))
                if target == last:
                    return last
        if slot != last:
            self._cache.copy(last, slot)
        insort(self._free, last)
        return last

    def keep_prompt(self, slot: int, prompt_ids: np.ndarray, logits: torch.Tensor) -> None:
        """Copy the state of a running slot that was just prefilled, if a slot is free or an older prompt can go."""
        key = ("prompt", prompt_ids.tobytes())
        if key in self._kept:
            return
        if not self._free or self._num_prompts == MAX_PROMPTS:
            oldest = next((kept for key, kept in self._kept.items() if key[0] == "prompt"), None)
            if oldest is None:
                return
            self._drop(oldest)
        target = self._free.pop()
        self._cache.copy(slot, target)
        # A clone, or the logits of the whole pack stay alive.
        self._keep(KeptState(key=key, slot=target, token_ids=prompt_ids, logits=logits.clone()))

    def drop_session(self, session_id: str) -> None:
        if kept := self._kept.get(("session", session_id)):
            self._drop(kept)

    def drop_kept(self, *, sessions: bool) -> None:
        """Forget all prompts, and all sessions if told."""
        for kept in list(self._kept.values()):
            if sessions or kept.key[0] == "prompt":
                self._drop(kept)

    def _keep(self, kept: KeptState) -> None:
        self._kept[kept.key] = kept
        self._num_prompts += kept.key[0] == "prompt"

    def _use(self, kept: KeptState) -> None:
        if kept.key[0] == "session":
            self._drop(kept)
        else:
            self._kept.move_to_end(kept.key)

    def _forget(self, kept: KeptState) -> None:
        del self._kept[kept.key]
        self._num_prompts -= kept.key[0] == "prompt"

    def _drop(self, kept: KeptState) -> None:
        self._forget(kept)
        insort(self._free, kept.slot)

    def _take_free_slot(self) -> int | None:
        if not self._free and self._kept:
            self._drop(next(iter(self._kept.values())))
        return self._free.pop() if self._free else None

    def _vacate(self, slot: int, wanted: KeptState | None) -> None:
        """Take the first slot above the running ones. A state kept there moves, or the least recently used one goes."""
        if self._free and self._free[0] == slot:
            self._free.pop(0)
            return
        occupant = next(kept for kept in self._kept.values() if kept.slot == slot)
        if self._free:
            target = self._free.pop()
        else:
            victim = next(kept for kept in self._kept.values() if kept is not wanted)
            self._forget(victim)
            if victim is occupant:
                return
            target = victim.slot
        self._cache.copy(slot, target)
        occupant.slot = target
