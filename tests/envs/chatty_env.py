"""The demo's environment, for runs whose logs must have something in them."""

import random

from envs.base import Problem
from envs.library.calculator import Calculator


class Chatty(Calculator):
    """Prints each problem."""

    def task(self, rng: random.Random, level: int) -> Problem:
        problem = super().task(rng, level)
        print(f"problem {problem.prompt}", flush=True)
        return problem
