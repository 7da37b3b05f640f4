"""Whole conversations made by an environment's own oracle: solvability checks and warm starts."""

import random
from dataclasses import dataclass, field
from typing import Any

from envs.base import AgentEnv
from envs.message import Message, ToolSpec
from envs.worker_thread import run_sync


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One finished episode of an oracle."""

    messages: tuple[Message, ...]
    """The whole conversation; learn on the assistant messages only."""
    tools: tuple[ToolSpec, ...]
    reward: float
    meta: dict[str, Any] = field(default_factory=dict)
    """The environment's facts at the end of the episode."""


async def ademonstrate(env: AgentEnv, seed: int, level: int, rng: random.Random | None = None) -> Demonstration:
    """Play (seed, level) with `noisy_oracle(rng)`, or with `oracle()` where rng is None.

    Raises RuntimeError where the oracle stops before the episode ends.
    """
    opening, info = await env.areset(seed=seed, options={"level": level})
    messages = list(opening)
    policy = env.oracle() if rng is None else env.noisy_oracle(rng)
    try:
        action = next(policy)
        while True:
            replies, reward, terminated, truncated, step_info = await env.astep(action)
            messages += [action, *replies]
            if terminated or truncated:
                break
            action = policy.send(replies)
    except StopIteration:
        raise RuntimeError(
            f"the oracle of {type(env).__name__} stopped before it answered ({seed=}, {level=})"
        ) from None
    finally:
        policy.close()
    return Demonstration(messages=tuple(messages), tools=info["tools"], reward=reward, meta=step_info["meta"])


def demonstrate(env: AgentEnv, seed: int, level: int, rng: random.Random | None = None) -> Demonstration:
    """As `ademonstrate`, from synchronous code."""
    deadline_s = env.reset_timeout_s + env.max_turns * env.step_timeout_s + env.reward_timeout_s
    return run_sync(ademonstrate(env, seed, level, rng), deadline_s)
