"""The staleness bound and its slots."""

import random

import pytest

from rollout.schedule.staleness import SlotGate, StalenessBound, StalenessViolation


def gate_of(max_staleness: int, groups_per_step: int, publish_every: int = 1) -> SlotGate:
    bound = StalenessBound(max_staleness=max_staleness, groups_per_step=groups_per_step)
    return SlotGate(bound, publish_every=publish_every)


def simulate_fifo(
    max_staleness: int, groups_per_step: int, publish_every: int, *, free_at_consumption: bool = False, steps: int = 40
) -> tuple[int, int]:
    """(worst staleness, steps done) of sampling that fills every free slot at once and a learner that takes the oldest
    groups; `free_at_consumption` is the rule that does not work."""
    bound = StalenessBound(max_staleness=max_staleness, groups_per_step=groups_per_step)
    gate = SlotGate(bound)  # not told publish_every: the simulation may break its rule
    waiting: list[tuple[str, int]] = []
    alive, served, worst, admitted = 0, 0, 0, 0
    for step in range(steps):
        while alive < bound.slots if free_at_consumption else gate.acquire():
            waiting.append((f"g{admitted}", served))
            admitted, alive = admitted + 1, alive + 1
        if len(waiting) < groups_per_step:
            return worst, step
        for group_id, version in waiting[:groups_per_step]:
            worst = max(worst, step - version)
            alive -= 1
            if not free_at_consumption:
                gate.consumed(group_id, step)
        del waiting[:groups_per_step]
        if (step + 1) % publish_every == 0:
            served = step + 1
            gate.published(served)
    return worst, steps


@pytest.mark.parametrize("groups_per_step", [1, 3])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
def test_worst_staleness_is_the_bound_for_every_allowed_push_interval(max_staleness: int, groups_per_step: int) -> None:
    for publish_every in range(1, max_staleness + 2):
        assert simulate_fifo(max_staleness, groups_per_step, publish_every) == (max_staleness, 40)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
def test_a_push_interval_over_the_bound_deadlocks_after_all_slots_are_consumed(max_staleness: int) -> None:
    assert simulate_fifo(max_staleness, 2, max_staleness + 2)[1] == max_staleness + 1
    with pytest.raises(ValueError, match=f"publish_every must be 1 to max_staleness \\+ 1 = {max_staleness + 1}"):
        gate_of(max_staleness, 2, publish_every=max_staleness + 2)


@pytest.mark.parametrize("publish_every", [1, 2, 3])
def test_freeing_slots_at_consumption_would_break_the_bound(publish_every: int) -> None:
    worst, steps = simulate_fifo(2, 3, publish_every, free_at_consumption=True)
    assert (worst, steps) == (2 + publish_every - 1, 40)


def test_slots_are_steps_in_flight_times_groups() -> None:
    assert StalenessBound(max_staleness=2, groups_per_step=4).slots == 12
    assert StalenessBound(max_staleness=0, groups_per_step=4).slots == 4


def test_data_older_than_the_bound_raises_with_its_numbers() -> None:
    bound = StalenessBound(max_staleness=2, groups_per_step=4)
    bound.check(learner_version=7, sampled_version=5)
    with pytest.raises(StalenessViolation, match=r"staleness 3 .* 2: sampled at version 4, trained at version 7"):
        bound.check(learner_version=7, sampled_version=4)


def test_impossible_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="max_staleness must be >= 0, got -1"):
        StalenessBound(max_staleness=-1, groups_per_step=4)
    with pytest.raises(ValueError, match="groups_per_step must be >= 1, got 0"):
        StalenessBound(max_staleness=1, groups_per_step=0)
    with pytest.raises(ValueError, match="got 0"):
        gate_of(1, 1, publish_every=0)


def test_a_slot_comes_back_only_when_a_newer_version_is_served() -> None:
    gate = gate_of(1, 1)
    assert [gate.acquire() for _ in range(3)] == [True, True, False]
    gate.consumed("a", 3)
    assert gate.free == 0
    assert gate.published(3) == 0  # made before the group was trained on
    assert gate.published(4) == 1
    assert gate.acquire() and not gate.acquire()


def test_one_publication_frees_all_older_steps() -> None:
    gate = gate_of(2, 1)
    while gate.acquire():
        pass
    for version, group_id in enumerate("abc"):
        gate.consumed(group_id, version)
    assert gate.published(2) == 2
    assert (gate.held, gate.free) == (1, 2)


def test_a_dropped_group_gives_its_slot_back_at_once() -> None:
    gate = gate_of(0, 1)
    assert gate.acquire() and not gate.acquire()
    gate.dropped("a")
    assert gate.acquire()


def test_a_slot_is_never_given_back_twice() -> None:
    gate = gate_of(1, 1)
    gate.acquire()
    gate.consumed("a", 0)
    for give_back in (lambda: gate.consumed("a", 0), lambda: gate.dropped("a"), lambda: gate.dropped("b")):
        with pytest.raises(ValueError, match="holds no slot"):
            give_back()
    assert gate.held == 1


def test_versions_only_grow() -> None:
    gate = gate_of(1, 1)
    gate.acquire()
    gate.published(5)
    with pytest.raises(ValueError, match="version 4 published after version 5"):
        gate.published(4)
    with pytest.raises(ValueError, match="trained at version 4, but 5 is served"):
        gate.consumed("a", 4)


def test_restored_groups_may_overfill_the_slots_and_block_admission_until_worked_off() -> None:
    gate = gate_of(0, 2)
    gate.restore(5)
    assert gate.free == 0 and not gate.acquire()
    for version, groups in enumerate(["ab", "cd"]):
        for group_id in groups:
            gate.consumed(group_id, version)
        gate.published(version + 1)
    assert gate.free == 1  # one restored group is left


def test_random_drops_and_push_times_keep_the_bound() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        max_staleness, per_step = rng.randint(0, 3), rng.randint(1, 3)
        gate = gate_of(max_staleness, per_step)
        waiting: list[tuple[str, int]] = []
        version = admitted = 0
        for _ in range(200):
            event = rng.choice(["admit", "drop", "step", "publish"])
            if event == "admit" and gate.acquire():
                waiting.append((f"g{admitted}", gate.version))
                admitted += 1
            elif event == "drop" and waiting and rng.random() < 0.3:
                gate.dropped(waiting.pop(rng.randrange(len(waiting)))[0])
            elif event == "step" and len(waiting) >= per_step:
                for group_id, sampled in waiting[:per_step]:
                    gate.bound.check(learner_version=version, sampled_version=sampled)
                    gate.consumed(group_id, version)
                del waiting[:per_step]
                version += 1
            elif event == "publish":
                gate.published(version)
        assert version >= 3
