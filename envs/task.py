"""A task names one problem instance; a problem is what an environment's author makes from it."""

from dataclasses import dataclass, field
from typing import Any

from envs.message import ImagePart, Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One problem instance, by name: (environment, seed, level) fix it, so every member of a group and every retry
    meets the same problem.

    Example: Task(task_id="train/calculator/17", env_id="Calculator-v0", seed=8123, level=2)
    """

    task_id: str
    """Unique within a run: "<split>/<env name>/<counter>"."""
    env_id: str
    """A registered id, or "module:Id-v0"."""
    env_name: str
    """Name of the entry in the mix; metrics are logged per name."""
    seed: int
    level: int = 0
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What `AgentEnv.task(rng, level)` returns. The right answer stays on the environment, never in here."""

    prompt: str | tuple[Message, ...]
    """The user's text, or whole messages."""
    system: str = ""
    """System text; empty = none."""
    images: tuple[ImagePart, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    """Facts for logs and metrics, never shown to the policy (e.g. {"needs_tool": False})."""
