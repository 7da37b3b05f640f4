"""How many tool environments are alive at once on this machine, and what each takes.

    shoal bench envs [--json] [--live 100000] [--actors 8]

Pool actors host `--live` episodes of ShopDB-v0 (level 0: a SQLite database of its own with 24 rows), each half-way:
opened, one query made, none answered. They are opened in stages (1,000, 10,000, all); memory is the sum of the actors'
PSS. Then every episode takes two more steps, while in each actor some tool always blocks its thread: the loop's lag is
what all others feel of it.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: this file would be imported as `envs`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from conf.loading import load_config
from envs.base import AgentEnv, call
from envs.outcome import EnvHost
from envs.task import Task
from envs.tool import tool
from rl.cluster.ray_start import start_ray

RESULT = Path(__file__).parent / "results" / "envs.json"
STAGES = (1_000, 10_000)
IN_FLIGHT = 384
"""Calls of the driver under way at once."""
BLOCKED_S = 5.0
QUERIES = (
    "select count(id) from orders",
    "select max(amount) from orders join people on customer=name",
    "select sum(amount) from orders where item='cup'",
)


class Blocking(AgentEnv):
    """Its tool holds a thread for seconds."""

    tool_timeout_s = 30.0

    def task(self, rng: random.Random, level: int) -> str:
        return "block"

    @tool
    def block(self) -> str:
        """Sleep without giving way."""
        time.sleep(BLOCKED_S)
        return "done"

    def reward(self, answer: str) -> float:
        return 0.0


async def for_all(keys: range, work: Callable[[int], Awaitable[None]]) -> float:
    """Run `work` for every key, at most IN_FLIGHT at once; seconds."""
    waiting = iter(keys)

    async def take() -> None:
        for key in waiting:
            await work(key)

    started = time.monotonic()
    await asyncio.gather(*(take() for _ in range(IN_FLIGHT)))
    return time.monotonic() - started


def pss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def shop_task(seed: int) -> Task:
    return Task(task_id=f"bench/shop_db/{seed}", env_id="ShopDB-v0", env_name="shop_db", seed=seed, level=0)


async def begin(host: EnvHost, key: int) -> None:
    """Open an episode and bring it half-way."""
    outcome = await host.open(str(key), shop_task(key))
    if outcome.failure is not None:
        raise RuntimeError(f"episode {key} did not open: {outcome.failure}")
    await step(host, key, QUERIES[0])


async def step(host: EnvHost, key: int, query: str) -> None:
    outcome = await host.step(str(key), call("sql", query=query))
    reply = outcome.messages[0].tool_result if outcome.failure is None else None
    if reply is None or reply.error is not None or not reply.content:
        raise RuntimeError(f"episode {key} did not answer: {outcome}")


async def keep_blocking(host: EnvHost, actors: int, enough: asyncio.Event) -> list[str]:
    """Blocking calls in every actor (keys spread by hash, so more than actors) until `enough`; their answers."""
    answers: list[str] = []

    async def block(key: str) -> None:
        task = Task(task_id=key, env_id="benchmarks.envs:Blocking", env_name="blocking", seed=0)
        while not enough.is_set():
            await host.open(key, task)
            outcome = await host.step(key, call("block"))
            await host.close(key)
            answers.append(outcome.messages[0].text if outcome.failure is None else str(outcome.failure))

    await asyncio.gather(*(block(f"blocking-{i}") for i in range(4 * actors)))
    return answers


async def measure(live: int, actors: int) -> dict[str, Any]:
    config = load_config([f"cluster.num_cpus={actors + 1}", "monitor.wandb=disabled"])
    await asyncio.to_thread(start_ray, config, "bench-envs")
    import ray  # after start_ray, which sets what Ray reads when it is imported

    try:
        figures = await measure_pools(ray.remote, live, actors)
    finally:  # an error that reaches Ray's own hook first hangs in it
        await asyncio.to_thread(ray.shutdown)
    machine = describe_machine()
    return {"name": "envs", "ratios": {}, "figures": figures, "machine": machine, "paired": False}


async def measure_pools(remote: Any, live: int, actors: int) -> dict[str, Any]:
    from envs.pool.actors import EnvPoolActor, PoolClient

    environment = {"env_vars": {"PYTHONPATH": sys.path[0]}}
    pools = [
        remote(EnvPoolActor).options(num_cpus=1, max_concurrency=1000, runtime_env=environment).remote(30.0, 60.0, 60.0)
        for _ in range(actors)
    ]
    host = PoolClient(*pools, reset_timeout_s=30.0, step_timeout_s=60.0)

    async def stats() -> list[dict[str, float]]:
        return list(await asyncio.gather(*(pool.stats.remote() for pool in pools)))

    async def memory() -> float:
        await asyncio.sleep(1.0)
        return sum(pss_mib(int(pool["pid"])) for pool in await stats())

    async def close(key: int) -> None:
        await host.close(str(key))

    await for_all(range(live, live + 64), lambda key: begin(host, key))  # every process imports what it needs
    await for_all(range(live, live + 64), close)
    empty = await memory()
    stages: list[dict[str, float]] = []
    for target in [*(s for s in STAGES if s < live), live]:
        opened = int(stages[-1]["live"]) if stages else 0
        seconds = await for_all(range(opened, target), lambda key: begin(host, key))
        held = await memory()
        stages.append(
            {
                "live": target,
                "pss_mib": held,
                "kib_per_environment": (held - empty) * 1024 / target,
                "opened_per_second": (target - opened) / seconds,
            }
        )
        print(json.dumps(stages[-1]), file=sys.stderr, flush=True)
    enough = asyncio.Event()
    blocked = asyncio.create_task(keep_blocking(host, actors, enough))
    seconds = await for_all(range(live), lambda key: step(host, key, QUERIES[1]))
    seconds += await for_all(range(live), lambda key: step(host, key, QUERIES[2]))
    counts = await stats()
    enough.set()
    answers = await blocked
    held = await memory()
    await host.aclose()
    if set(answers) != {"done"} or sum(int(pool["open"]) for pool in counts) < live:
        raise RuntimeError(f"not all episodes lived to the end: {answers}, {counts}")
    return {
        "live": live,
        "actors": actors,
        "rows_per_environment": 24,
        "pss_mib_empty": empty,
        "pss_mib_after_two_steps": held,
        "environments_per_gib": live / (held / 1024),
        "steps_per_second": 2 * live / seconds,
        "loop_lag_p99_s_with_blocked_tools": max(pool["loop_lag_p99_s"] for pool in counts),
        "stages": stages,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--live", type=int, default=100_000)
    parser.add_argument("--actors", type=int, default=8)
    args = parser.parse_args()
    result = asyncio.run(measure(args.live, args.actors))
    if args.live >= 100_000:
        save_result(RESULT, result)
    if args.json:
        print(json.dumps(result))
    else:
        figures = result["figures"]
        print(f"{args.live} live environments: {figures['pss_mib_after_two_steps']:.0f} MiB, ", end="")
        print(f"{figures['environments_per_gib']:.0f} per GiB, {figures['steps_per_second']:.0f} steps/s, ", end="")
        print(f"loop lag p99 {1000 * figures['loop_lag_p99_s_with_blocked_tools']:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
