"""One pool as a real Ray actor: episodes, a kill, a restart, an end of its own."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envs.base import call, say
from envs.pool.pool_limits import PoolLimits
from envs.task import Task

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import ray

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def task(seed: int, env_id: str = "Calculator-v0") -> Task:
    return Task(task_id=f"t/{seed}", env_id=env_id, env_name="e", seed=seed)


def test_a_pool_actor_plays_episodes_and_works_again_after_it_was_killed(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    from envs.pool.actors import EnvPoolActor, PoolClient

    async def scenario() -> None:
        actor = ray.remote(EnvPoolActor).options(max_restarts=-1, num_cpus=1, max_concurrency=1000)
        pool: Any = actor.remote(30.0, 5.0, 5.0, str(tmp_path), "pool-0")
        await pool.stats.remote()  # it has started, which takes long on a busy machine
        host = PoolClient(pool, step_timeout_s=5.0, reward_timeout_s=5.0)
        opened = await asyncio.gather(*(host.open(str(i), task(i)) for i in range(200)))
        assert [o.failure for o in opened] == [None] * 200
        steps = await asyncio.gather(*(host.step(str(i), call("add", a=i, b=1)) for i in range(200)))
        assert [s.messages[0].text for s in steps] == [str(i + 1) for i in range(200)]
        assert host._mailboxes[0].num_messages < 60
        ray.kill(pool, no_restart=False)
        died = await asyncio.gather(*(host.step(str(i), say("1")) for i in range(200)))
        assert {o.failure.kind for o in died if o.failure} == {"infra"}
        for _ in range(100):
            reopened = await host.open("again", task(1))
            if reopened.failure is None:
                break
            await asyncio.sleep(0.2)
        assert reopened.failure is None
        assert reopened.problem_digest == opened[1].problem_digest
        broken = Task(task_id="b", env_id="tests.envs.small_envs:RaisesInTask", env_name="e", seed=1)
        failure = (await host.open("b", broken)).failure
        assert failure is not None
        assert "small_envs.py" in failure.traceback
        for what in ("panic", "interrupt", "exit"):  # B1: the mailbox answers, whatever an author throws
            throws = Task(
                task_id="c",
                env_id="tests.envs.thrown_envs:InlineThrower",
                env_name="e",
                seed=1,
                kwargs={"where": "tool", "what": what},
            )
            assert (await host.open("c", throws)).failure is None
            thrown = (await host.step("c", call("pull"))).failure
            assert thrown is not None and (thrown.kind, thrown.where) == ("env", "step")
            assert (await host.step("again", call("add", a=1, b=1))).failure is None
        await host.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 170))
    log = (tmp_path / "pool-0.log").read_text()
    assert "environment failed (env, reset): KeyError: 'missing shelf'" in log
    assert "this environment prints" in log


def test_a_pool_actor_past_its_limit_ends_itself_and_is_started_again_and_no_episode_fails(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    from envs.pool.actors import EnvPoolActor, PoolClient

    async def scenario() -> list[int]:
        actor = ray.remote(EnvPoolActor).options(max_restarts=-1, num_cpus=1, max_concurrency=1000)
        pool: Any = actor.remote(30.0, 5.0, 5.0, str(tmp_path), "pool-0", PoolLimits(recycle_episodes=3))
        await pool.stats.remote()  # it has started, which takes long on a busy machine
        host = PoolClient(pool, step_timeout_s=5.0, reward_timeout_s=5.0)
        pids: list[int] = []

        async def begin(key: str, env_id: str = "Calculator-v0") -> None:
            opened = await host.open(key, task(1, env_id))
            assert opened.failure is None, opened
            pids.append(int((await pool.stats.remote())["pid"]))

        async def adds(key: str) -> None:
            stepped = await host.step(key, call("add", a=1, b=2))
            assert stepped.failure is None, stepped
            assert stepped.messages[0].text == "3"

        await begin("long", "tests.envs.small_envs:LeavesAThread")
        for key in ("a", "b", "c"):
            await begin(key)
            await host.close(key)
        waiting = asyncio.create_task(begin("next"))
        await asyncio.sleep(1.0)
        assert not waiting.done()  # the limit is reached, but an episode is still open
        await adds("long")
        await host.close("long")
        await waiting
        await adds("next")
        await host.aclose()
        return pids

    *first, last = asyncio.run(asyncio.wait_for(scenario(), 170))
    assert len(first) == 4 and set(first) == {first[0]} and last != first[0]
    assert "recycling this pool: episodes" in (tmp_path / "pool-0.log").read_text()
