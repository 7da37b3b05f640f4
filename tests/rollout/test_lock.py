"""The rollout lock: swaps and units never overlap, and nobody waits for ever."""

import asyncio
import random

import pytest

from rollout.play.swap_lock import RolloutLock


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_swap_waits_for_running_units_and_new_units_wait_for_the_swap() -> None:
    async def main() -> list[str]:
        lock, log = RolloutLock("turn"), []
        first_may_end, swap_may_end = asyncio.Event(), asyncio.Event()

        async def unit(name: str, may_end: asyncio.Event | None) -> None:
            async with lock.turn():
                log.append(f"{name} in")
                if may_end:
                    await may_end.wait()
                log.append(f"{name} out")

        async def swap() -> None:
            async with lock.swap():
                log.append("swap in")
                await swap_may_end.wait()
                log.append("swap out")

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(unit("a", first_may_end))
            await settle()
            tasks.create_task(swap())
            await settle()
            tasks.create_task(unit("b", None))
            await settle()
            assert log == ["a in"]  # b waits although only a unit is running: a swap waits
            first_may_end.set()
            await settle()
            assert log == ["a in", "a out", "swap in"]
            swap_may_end.set()
        return log

    assert asyncio.run(main()) == ["a in", "a out", "swap in", "swap out", "b in", "b out"]


@pytest.mark.parametrize("mode", ["none", "turn", "trajectory", "group"])
def test_only_units_of_the_lock_s_mode_hold_up_a_swap(mode: str) -> None:
    async def swaps_within(unit_name: str) -> bool:
        lock = RolloutLock(mode, timeout_s=0.01)
        unit = {"turn": lock.turn, "trajectory": lock.trajectory, "group": lock.group}[unit_name]
        async with unit():
            try:
                async with lock.swap():
                    return True
            except TimeoutError:
                return False

    for unit_name in ("turn", "trajectory", "group"):
        assert asyncio.run(swaps_within(unit_name)) == (unit_name != mode)


def test_the_turns_of_a_running_trajectory_pass_while_a_swap_waits_for_it() -> None:
    async def main() -> None:
        lock = RolloutLock("trajectory", timeout_s=1)
        swapped = asyncio.Event()

        async def swap() -> None:
            async with lock.swap():
                swapped.set()

        async with lock.trajectory():
            task = asyncio.create_task(swap())
            await settle()
            for _ in range(3):
                async with lock.turn():
                    await settle()
            assert not swapped.is_set()
        await task
        assert swapped.is_set()

    asyncio.run(main())


def test_a_swap_that_gives_up_lets_the_waiting_units_go_on() -> None:
    async def main() -> None:
        lock = RolloutLock("turn", timeout_s=0.02)
        passed = asyncio.Event()

        async def unit() -> None:
            async with lock.turn():
                passed.set()

        async with lock.turn():
            swap = asyncio.create_task(_swap(lock))
            await settle()
            lock.timeout_s = 5
            waiting = asyncio.create_task(unit())
            await settle()
            assert not passed.is_set()
            with pytest.raises(TimeoutError, match=r"a swap waited 0\.02 s; 1 units running"):
                await swap
            await waiting
        assert passed.is_set()

    asyncio.run(main())


async def _swap(lock: RolloutLock) -> None:
    async with lock.swap():
        pass


def test_cancelled_waiters_leave_no_trace() -> None:
    async def main() -> None:
        lock = RolloutLock("turn", timeout_s=1)
        async with lock.turn():
            swap = asyncio.create_task(_swap(lock))
            await settle()
            swap.cancel()
            await asyncio.gather(swap, return_exceptions=True)
            async with lock.turn():  # would wait for ever, had the swap not been forgotten
                pass
        await _swap(lock)

    asyncio.run(main())


def test_unknown_modes_and_timeouts_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown lock mode 'turns'; choose one of none, turn, trajectory, group"):
        RolloutLock("turns")
    with pytest.raises(ValueError, match="must be > 0"):
        RolloutLock("turn", timeout_s=0)


def test_a_thousand_seeded_interleavings_keep_swaps_alone_and_let_everybody_end() -> None:
    async def main(seed: int) -> None:
        rng = random.Random(seed)
        mode = rng.choice(["turn", "trajectory", "group"])
        lock = RolloutLock(mode, timeout_s=5)
        unit = {"turn": lock.turn, "trajectory": lock.trajectory, "group": lock.group}[mode]
        running, swapping = 0, 0

        async def pause() -> None:
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)

        async def one_unit() -> None:
            nonlocal running
            await pause()
            async with unit():
                running += 1
                try:
                    assert not swapping
                    await pause()
                    assert not swapping
                finally:
                    running -= 1

        async def one_swap() -> None:
            nonlocal swapping
            await pause()
            async with lock.swap():
                swapping += 1
                try:
                    assert swapping == 1 and not running
                    await pause()
                    assert swapping == 1 and not running
                finally:
                    swapping -= 1

        tasks = [asyncio.create_task(rng.choice([one_unit, one_unit, one_swap])()) for _ in range(8)]
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        victims = [task for task in tasks if rng.random() < 0.15 and task.cancel()]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        unexpected = [r for t, r in zip(tasks, results, strict=True) if r is not None and t not in victims]
        assert not unexpected, (seed, unexpected)

    for seed in range(1000):
        asyncio.run(main(seed))
