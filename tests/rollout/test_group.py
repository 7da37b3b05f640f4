"""Groups: members together, lost ones played again, the group's lock."""

import asyncio
from typing import Any

import pytest

from envs.outcome import EnvFailure
from policy.engine.protocol import EngineError, GenerationRequest
from policy.sync.snapshot import PolicySnapshot
from rollout.dialects.tiny_dialect import TinyDialect
from rollout.play.context import EpisodeContext, EpisodeSettings
from rollout.play.group import run_group
from rollout.play.swap_lock import RolloutLock
from rollout.record.trajectory import StopReason, TrajectoryGroup
from tests.fakes import ScriptedEngine
from tests.rollout.fakes_episode import TASK, ScriptedHost, forever

TINY = TinyDialect()
END = TINY.tokenizer.special_id("<end>")
SETTINGS = EpisodeSettings(
    temperature=1.0, max_turn_tokens=16, max_turns=0, max_model_tokens=64, deadline_s=10.0, seed=1
)


async def loaded_engine() -> ScriptedEngine:
    engine = ScriptedEngine(lambda prompt_ids, rng: [97 + int(rng.integers(26)), END])
    await engine.load_weights(PolicySnapshot.create(0, {}))
    return engine


async def play(host: ScriptedHost, engine: ScriptedEngine | None = None, **changes: Any) -> TrajectoryGroup:
    arguments: dict[str, Any] = {"settings": SETTINGS, "lock": RolloutLock("turn"), "group_size": 4} | changes
    engine = engine or await loaded_engine()
    group = {name: arguments.pop(name) for name in ("group_size", "max_retries") if name in arguments}
    context = EpisodeContext(task=TASK, group_id="g", host=host, engine=engine, dialect=TINY, attempt=7, **arguments)
    return await run_group(context, **group)


def test_members_run_together_and_come_back_in_order_with_their_own_samples() -> None:
    arrived = 0
    all_here = asyncio.Event()

    async def meet(phase: str, key: str) -> None:
        nonlocal arrived
        if phase == "step":
            arrived += 1
            if arrived == 4:
                all_here.set()
            await asyncio.wait_for(all_here.wait(), 5)  # passes only if all four are in their step at once

    host = ScriptedHost(before=meet)
    group = asyncio.run(play(host))
    assert [row.trajectory_id for row in group.trajectories] == ["g/0", "g/1", "g/2", "g/3"]
    assert group.rewards == [1.0] * 4 and group.attempt == 7
    assert {key for _, key in host.log} == {f"g/{member}@7.0" for member in range(4)}
    assert len({row.token_ids[-2] for row in group.trajectories}) > 1
    again = asyncio.run(play(ScriptedHost()))
    assert [row.token_ids.tolist() for row in again.trajectories] == [
        row.token_ids.tolist() for row in group.trajectories
    ]


def test_a_member_lost_by_the_machinery_is_played_again_under_a_fresh_key_with_the_same_samples() -> None:
    async def lose(phase: str, key: str) -> None:
        if phase == "step" and key in ("g/1@7.0", "g/1@7.1"):
            raise OSError("the pool died")

    host = ScriptedHost(before=lose)
    group = asyncio.run(play(host))
    assert group.rewards == [1.0] * 4
    assert [key for phase, key in host.log if phase == "open" and "/1@" in key] == ["g/1@7.0", "g/1@7.1", "g/1@7.2"]
    whole = asyncio.run(play(ScriptedHost()))
    assert group.trajectories[1].token_ids.tolist() == whole.trajectories[1].token_ids.tolist()


def test_retries_are_bounded_and_an_environment_s_own_error_is_not_retried() -> None:
    class DeadEngine(ScriptedEngine):
        async def generate(self, request: GenerationRequest) -> Any:
            raise EngineError("gone")

    host = ScriptedHost()
    group = asyncio.run(play(host, DeadEngine(lambda prompt_ids, rng: [END]), max_retries=1))
    assert [row.stop_reason for row in group.trajectories] == [StopReason.INFRA_ERROR] * 4
    assert group.rewards == [None] * 4
    assert sum(phase == "open" for phase, _ in host.log) == 8

    host = ScriptedHost(failures={"step": EnvFailure(kind="env", where="step", message="x")})
    group = asyncio.run(play(host))
    assert [row.stop_reason for row in group.trajectories] == [StopReason.ENV_ERROR] * 4
    assert sum(phase == "open" for phase, _ in host.log) == 4


def test_in_group_mode_a_swap_waits_for_the_whole_group() -> None:
    async def main() -> TrajectoryGroup:
        lock, engine = RolloutLock("group", timeout_s=5), await loaded_engine()
        swaps: list[asyncio.Task[None]] = []

        async def swap() -> None:
            async with lock.swap():
                await engine.load_weights(PolicySnapshot.create(1, {}))

        async def ask(phase: str, key: str) -> None:
            if not swaps:
                swaps.append(asyncio.create_task(swap()))
            for _ in range(20):
                await asyncio.sleep(0)

        group = await play(ScriptedHost(turns=3, before=ask), engine, lock=lock)
        await swaps[0]
        assert engine.policy_version == 1
        return group

    group = asyncio.run(main())
    assert {row.max_policy_version for row in group.trajectories} == {0}


def test_a_cancelled_group_closes_every_member() -> None:
    host = ScriptedHost(before=forever)

    async def main() -> None:
        task = asyncio.create_task(play(host))
        for _ in range(10):
            await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert sorted(key for phase, key in host.log if phase == "close") == [f"g/{m}@7.0" for m in range(4)]
