"""A set of reasoning-gym as an environment without tools: `Sudoku = from_reasoning_gym("sudoku")`.

A task is one generated question, the answer is the policy's text, and the set's own scorer gives the reward. A level
is a level of the set's curriculum; a set without a curriculum has one level.
"""

import json
import logging
import random
from collections.abc import Mapping
from typing import Any, ClassVar

from envs.adapters.extra import load_extra
from envs.adapters.preset import preset
from envs.base import AgentEnv, Oracle, say
from envs.errors import MalformedEnvironment
from envs.task import Problem

logger = logging.getLogger(__name__)

EXACT = frozenset({"game_of_life_halting"})
"""Sets whose scorer gives 1.0 to any text: their answer is compared instead (seen in reasoning-gym 0.1.25)."""
_ANSWERS_IN_METADATA = ("possible_answer", "example_answer", "example_correct_answer")
"""Where sets with more than one right answer keep one of them."""


def from_reasoning_gym(name: str, /, **arguments: Any) -> "type[ReasoningGymEnv]":
    """An environment class for a set, e.g. "sudoku"; `config` are settings of the set.

    `from_reasoning_gym("chain_sum", config={"max_terms": 3})`.
    """
    return preset(ReasoningGymEnv, name, {"name": name, **arguments})


class ReasoningGymEnv(AgentEnv):
    """A reasoning-gym set. In YAML: id envs.adapters.reasoning_gym_env:ReasoningGymEnv, kwargs.name sudoku."""

    levels: ClassVar[int] = 10
    max_turns = 1

    def __init__(self, *, name: str, config: Mapping[str, Any] | None = None) -> None:
        """`config` overrides what the curriculum sets for a level."""
        super().__init__()
        package = load_extra("reasoning_gym", "reasoning-gym")
        factory = load_extra("reasoning_gym.factory", "reasoning-gym")
        if name not in factory.DATASETS:
            raise MalformedEnvironment(f"reasoning-gym has no {name!r}; it has: {', '.join(sorted(factory.DATASETS))}")
        self._name, self._config = name, dict(config or {})
        self._create = package.create_dataset
        self._curriculum = factory.create_curriculum(name) if factory.has_curriculum(name) else None
        if self._curriculum is None:
            vars(self)["levels"] = 1

    def task(self, rng: random.Random, level: int) -> Problem:
        config = {**self._config_of_level(level), **self._config, "size": 1, "seed": rng.getrandbits(31)}
        self._dataset = self._create(self._name, **config)
        self._entry = self._dataset[0]
        return Problem(prompt=str(self._entry["question"]), system="Reply with the answer alone.")

    def reward(self, answer: str) -> float:
        if self._name in EXACT:
            return float(answer.strip() == str(self._entry["answer"]).strip())
        try:
            return float(self._dataset.score_answer(answer, self._entry))
        except Exception:  # some scorers raise on what is no answer at all: that is worth nothing
            logger.debug("%s: the scorer raised on %.80r", self._name, answer, exc_info=True)
            if answer == self._known_answer():
                raise  # it cannot even score its own answer
            return 0.0

    def oracle(self) -> Oracle:
        """Gives the set's own answer. Raises NotImplementedError for a set that keeps none."""
        answer = self._known_answer()
        if answer is None:
            raise NotImplementedError(f"{self._name} keeps no answer")
        yield say(answer)

    def hidden_state(self) -> str:
        return self._name

    # --- parts ---

    def _config_of_level(self, level: int) -> dict[str, Any]:
        """Level 0 is a set's own default; at level n every attribute of its curriculum is at its n-th level or last."""
        if self._curriculum is None or level == 0:
            return {}
        self._curriculum.set_global_level(level)
        made = self._curriculum.generate_configuration()
        return {name: getattr(made, name) for name in made.__dataclass_fields__}

    def _known_answer(self) -> str | None:
        metadata = self._entry.get("metadata", {})
        if "scramble_moves" in metadata:  # a cube: its own example does not solve larger ones
            moves = reversed(metadata["scramble_moves"].split())
            return " ".join(move[:-1] if move.endswith("'") else f"{move}'" for move in moves)
        kept = [self._entry.get("answer"), *(metadata.get(key) for key in _ANSWERS_IN_METADATA)]
        known = next((answer for answer in kept if answer is not None), None)
        return known if known is None or isinstance(known, str) else json.dumps(known)
