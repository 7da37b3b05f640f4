"""An environment whose episode is also ended by something behind it: a game that is over, a server that says done."""

from typing import Any, Literal

from envs.base import AgentEnv, Observation
from envs.message import Message


class WorldEnv(AgentEnv):
    """Adds to AgentEnv that a tool or `on_message` may end the episode."""

    _world_end: Literal["terminated", "truncated"] | None = None

    def end_world(self, how: Literal["terminated", "truncated"] = "terminated") -> None:
        """The episode is over after the running step, whose replies the policy still gets."""
        self._world_end = how

    @property
    def world_ended(self) -> bool:
        return self._world_end is not None

    async def areset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        self._world_end = None
        return await super().areset(seed=seed, options=options)

    async def respond(self, message: Message) -> tuple[Observation, bool, bool]:
        replies, terminated, truncated = await super().respond(message)
        if self._world_end is None or terminated:
            return replies, terminated, truncated
        self._ended = True
        return replies, self._world_end == "terminated", self._world_end == "truncated"
