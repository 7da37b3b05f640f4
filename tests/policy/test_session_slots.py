"""Slots hold what they are said to, and the least recently used state goes first."""

import numpy as np
import pytest
import torch

from policy.engine.session_slots import KeptState, SessionSlots

# --- slots ---


class TextCache:
    """A cache whose state is a string."""

    def __init__(self, num_slots: int) -> None:
        self.texts = ["stale"] * num_slots

    def reset(self, slot: int) -> None:
        self.texts[slot] = ""

    def copy(self, source: int, target: int) -> None:
        self.texts[target] = self.texts[source]


def ids_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.mark.parametrize(("num_slots", "max_running"), [(4, 4), (6, 4), (12, 4), (5, 1)])
def test_slots_always_hold_what_they_are_said_to(num_slots: int, max_running: int) -> None:
    """Random claims, turns, releases and drops; every state read back is the one that was kept."""
    rng = np.random.default_rng(num_slots)
    cache = TextCache(num_slots)
    slots = SessionSlots(cache, num_slots)
    running: list[tuple[str, str]] = []  # (session, text) of slot i
    num_reused = 0
    for _ in range(3000):
        action = rng.integers(0, 10)
        if action < 5 and len(running) < max_running:
            session = f"s{rng.integers(0, 8)}"
            text = f"{session}:" + "x" * int(rng.integers(0, 3))
            kept: KeptState | None = slots.find_prompt(ids_of(text).tobytes())
            if rng.integers(0, 2):
                longer = next((k for k in slots.kept_states if k.key == ("session", session)), None)
                kept = None if longer is None else slots.find_session(session, np.append(longer.token_ids, 65))
                text = text if kept is None else bytes(kept.token_ids.astype(np.uint8)).decode()
            num_reused += kept is not None
            slot = slots.claim(kept)
            assert slot == len(running)
            assert cache.texts[slot] == ("" if kept is None else text)
            cache.texts[slot] = text
            running.append((session, text))
            if kept is None and rng.integers(0, 2):
                slots.keep_prompt(slot, ids_of(text), torch.zeros(1))
        elif action < 9 and running:
            row = int(rng.integers(0, len(running)))
            session, text = running[row]
            text = cache.texts[row] = text + "y"
            keeps = session if rng.integers(0, 3) else None
            last = slots.release(row, session_id=keeps, token_ids=ids_of(text))
            assert last == len(running) - 1
            running[row] = running[-1]
            running.pop()
        elif action == 9:
            slots.drop_session(f"s{rng.integers(0, 8)}")
        assert cache.texts[: len(running)] == [text for _, text in running]
        used = list(range(len(running))) + [kept.slot for kept in slots.kept_states]
        assert len(set(used)) == len(used) <= num_slots
        for kept in slots.kept_states:
            assert cache.texts[kept.slot] == bytes(kept.token_ids.astype(np.uint8)).decode()
    assert num_reused > 20
    slots.drop_kept(sessions=True)
    assert slots.kept_states == []
    assert slots.num_sessions == 0


def test_the_least_recently_used_state_goes_first() -> None:
    slots = SessionSlots(TextCache(3), 3)
    for name in ("a", "b", "c", "d"):
        slots.release(slots.claim(), session_id=name, token_ids=ids_of(name))
    found = {name: slots.find_session(name, ids_of(name + "!")) is not None for name in ("a", "b", "c", "d")}
    assert found == {"a": False, "b": True, "c": True, "d": True}
