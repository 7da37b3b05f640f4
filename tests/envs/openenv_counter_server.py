"""A real OpenEnv server, run by another virtual environment's interpreter: count to a target drawn from the seed."""

import random
import sys

import uvicorn
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Count(Action):
    by: int


class Seen(Observation):
    total: int
    target: int


class Counter(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, episode_id=None, **kwargs):
        self.total, self.target = 0, random.Random(seed).randint(5, 20)
        return Seen(total=0, target=self.target)

    def step(self, action, timeout_s=None, **kwargs):
        if action.by == 0:
            raise ValueError("count by something")
        self.total += action.by
        done = self.total >= self.target
        return Seen(
            total=self.total, target=self.target, done=done, reward=float(self.total == self.target) if done else 0.0
        )

    @property
    def state(self):
        return self._state


if __name__ == "__main__":
    app = create_fastapi_app(Counter, Count, Seen, max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
