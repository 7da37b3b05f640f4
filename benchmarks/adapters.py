"""Drives every environment that the adapted packages list, each by an oracle or a random policy to its end, twice.

    shoal bench adapters [--json] [--only gymnasium,minigrid,reasoning-gym,textarena] [--output FILE]

An id counts as driven where its episode ended, and a second one from the same seed showed the same and gave the same
reward. Failures are listed by id with their reason. Ids are driven in another process, which is killed where an id
hangs: some games never return.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import multiprocessing.connection
import random
import re
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import describe_machine
from benchmarks.stored_result import save_result
from envs.adapters.gymnasium_env import from_gymnasium
from envs.adapters.reasoning_gym_env import from_reasoning_gym
from envs.adapters.textarena_env import from_textarena, random_move
from envs.base import AgentEnv, Oracle, call, say

RESULT = Path(__file__).parent / "results" / "adapters.json"
SEED = 3
ID_TIMEOUT_S = 30.0
TOY_TEXT = "gymnasium.envs.toy_text."
"""Where gymnasium keeps its worlds of text."""
PACKAGES = {
    "gymnasium": "gymnasium",
    "minigrid": "minigrid",
    "reasoning-gym": "reasoning-gym",
    "textarena": "textarena",
}


def listed(source: str) -> list[str]:
    """Ids as the package itself lists them: of gymnasium those of toy text, of TextArena the plain "-v0" games."""
    if source == "gymnasium":
        return sorted(i for i, spec in gymnasium.registry.items() if str(spec.entry_point).startswith(TOY_TEXT))
    if source == "minigrid":
        importlib.import_module("minigrid")
        return sorted(f"minigrid:{name}" for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-")))
    if source == "reasoning-gym":
        return sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    names = importlib.import_module("textarena.envs.registration").ENV_REGISTRY
    return sorted(name for name in names if name.endswith("-v0"))


def made(source: str, name: str) -> AgentEnv:
    if source == "gymnasium":
        return from_gymnasium(name, max_turns=50)()
    if source == "minigrid":
        return from_gymnasium(name, observe="image", max_turns=20, kwargs={"tile_size": 8})()
    return from_reasoning_gym(name)() if source == "reasoning-gym" else from_textarena(name, max_turns=30)()


def random_policy(env: AgentEnv, prompt: str) -> Oracle:
    rng, shown = random.Random(SEED), prompt
    while True:
        tools = env.tool_specs()
        if tools:
            names = tools[0].parameters["properties"]["action"]["enum"]
            yield call("act", action=rng.choice(names))
        else:
            replies = yield say(random_move(shown, rng))
            shown = replies[0].text if replies else ""


def drive(source: str, name: str) -> tuple[str, list[Any], float]:
    """An episode to its end: (policy, everything shown, reward)."""
    env = made(source, name)
    try:
        opening, _ = env.reset(seed=SEED)
        shown: list[Any] = [part for message in opening for part in message.content]
        policy, kind = random_policy(env, opening[-1].text), "random"
        if source == "reasoning-gym":
            policy, kind = env.oracle(), "oracle"
        try:
            action = next(policy)
        except NotImplementedError:
            policy, kind = random_policy(env, opening[-1].text), "random"
            action = next(policy)
        while True:
            replies, reward, terminated, truncated, _ = env.step(action)
            shown += [part for message in replies for part in message.content]
            if terminated or truncated:
                return kind, shown, reward
            action = policy.send(replies)
    finally:
        env.close()


def judged(source: str, name: str) -> dict[str, Any]:
    """One row: driven or the reason why not."""
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            kind, shown, reward = drive(source, name)
            again = drive(source, name)
    except Exception as error:  # any package's own
        text = " ".join(re.sub(r"/\S*/site-packages/|\*", " ", str(error)).split())
        return {"id": name, "reason": f"{type(error).__name__}: {text[:160]}"}
    row: dict[str, Any] = {
        "id": name,
        "policy": kind,
        "reward": reward,
        "seconds": round(time.monotonic() - started, 3),
    }
    if again != (kind, shown, reward):
        row["reason"] = "a second episode from the same seed differs"
    if kind == "oracle" and reward < 1:
        row["reason"] = f"its own answer scores {reward:g}"
    return row


def serve_rows(source: str, names: list[str], pipe: Any) -> None:
    for name in names:
        pipe.send(judged(source, name))
    pipe.close()


def rows_of(source: str, names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows in order; a process that hangs is killed and the next one goes on behind the id that hung."""
    context = multiprocessing.get_context("spawn")
    while names:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=serve_rows, args=(source, names, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            while names and ours.poll(ID_TIMEOUT_S):
                row = ours.recv()
                names = names[1:]
                yield row
            reason = f"no end within {ID_TIMEOUT_S:g} s"
        except EOFError:
            reason = "its process died"
        if names:
            yield {"id": names[0], "reason": reason}
            names = names[1:]
        process.kill()
        process.join(10)


def measure(source: str, names: list[str] | None = None) -> dict[str, Any]:
    started = time.monotonic()
    names = listed(source) if names is None else names
    rows = list(rows_of(source, names))
    failed = {row["id"]: row["reason"] for row in rows if "reason" in row}
    return {
        "package": f"{PACKAGES[source]} {version(PACKAGES[source])}",
        "listed": len(names),
        "driven": len(rows) - len(failed),
        "by_oracle": sum(row.get("policy") == "oracle" and "reason" not in row for row in rows),
        "failures": failed,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the result as one JSON object, last line")
    parser.add_argument("--only", default=",".join(PACKAGES), help="comma-separated sources")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    result = {
        "name": "adapters",
        "machine": describe_machine(),
        "sources": {s: measure(s) for s in args.only.split(",")},
    }
    save_result(args.output, result)
    counts = {s: [r["listed"], r["driven"], r["seconds"]] for s, r in result["sources"].items()}
    print(json.dumps(result if args.json else counts))


if __name__ == "__main__":
    main()
