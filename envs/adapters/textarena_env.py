"""A TextArena game as a conversation: `TicTacToe = from_textarena("TicTacToe-v0", opponent="random")`.

The policy plays one seat by writing moves; what the game and the other players say since is the reply. The other seats
are played by `opponent`. Reward: the game's own for the seat (-1 lost, 0 drawn or unfinished, 1 won; games for one
player give 0 to 1).
"""

import importlib
import inspect
import json
import random
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from envs.adapters.extra import load_extra
from envs.adapters.gymnasium_env import class_name
from envs.adapters.preset import preset
from envs.adapters.world import WorldEnv
from envs.errors import InfraFault, MalformedEnvironment
from envs.message import Message
from envs.task import Problem

Opponent = Callable[[str, random.Random], str]
"""A fixed policy: (what the seat is shown since its last move, chance) -> its move."""
MAX_OPPONENT_MOVES = 200
"""Moves of the other seats in a row; a game that goes on longer without the policy is broken."""
LOCK_TIMEOUT_S = 10.0
_BRACKETED = re.compile(r"\[[^\[\]\n]{1,24}\]")
_NUM_PLAYERS = (1, 2, 3, 4, 5, 6)
_global_chance = threading.Lock()
"""TextArena draws from the module `random`: each game swaps its own state in while it runs, one game at a time."""


def from_textarena(id: str, /, **arguments: Any) -> "type[TextArenaEnv]":
    """An environment class for a TextArena id; `arguments` are those of TextArenaEnv.

    opponent: "random" (one of the bracketed words it was shown), a list of moves (played in order, then again), a
    function (observation, rng) -> move, or "module:function".
    """
    return preset(TextArenaEnv, class_name(id), {"id": id, **arguments})


def random_move(observation: str, rng: random.Random) -> str:
    """One of the bracketed words of an observation, which is how TextArena's games show moves: "[4]", "[fold]"."""
    offered = sorted(set(_BRACKETED.findall(observation)))
    return rng.choice(offered) if offered else str(rng.randint(0, 9))


class TextArenaEnv(WorldEnv):
    """A TextArena game. In YAML: id envs.adapters.textarena_env:TextArenaEnv, kwargs.id TicTacToe-v0."""

    levels: ClassVar[int] = 1
    reward_range: ClassVar[tuple[float, float]] = (-100.0, 100.0)
    max_turns = 100

    def __init__(
        self,
        *,
        id: str,
        opponent: Opponent | Sequence[str] | str = "random",
        seat: int | None = 0,
        num_players: int | None = None,
        max_turns: int | None = None,
    ) -> None:
        """`seat` None = drawn from the seed. `num_players` None = the fewest the game takes."""
        super().__init__(max_turns=max_turns)
        self._arena = load_extra("textarena", "textarena")
        if id not in self._arena.envs.registration.ENV_REGISTRY:
            raise MalformedEnvironment(f"textarena has no {id!r}")
        self._id, self._seat_wanted, self._players_wanted = id, seat, num_players
        self._move_of = _as_opponent(opponent)
        self._opponent_name = _name_of(opponent)

    def task(self, rng: random.Random, level: int) -> Problem:
        self._chance_state = random.Random(rng.getrandbits(64)).getstate()
        self._opponent_rng = random.Random(rng.getrandbits(64))
        self._heard: dict[int, str] = {}
        seed = rng.getrandbits(31)
        self._game, self._num_players = self._with_own_chance(lambda: self._started(seed))
        seats = range(self._num_players)
        self._seat = rng.choice(seats) if self._seat_wanted is None else self._seat_wanted
        if self._seat not in seats:
            raise ValueError(f"seat {self._seat} of {self._id} is not in 0..{self._num_players - 1}")
        return Problem(prompt=self._advance() or "The game ended before your first move.")

    async def on_message(self, text: str) -> str | Message | None:
        if self.world_ended:
            return None
        return await self.run_author(self._play, text)

    def reward(self, answer: str) -> dict[str, float]:
        """`outcome` of the seat. A game that a limit ended has no rewards yet and counts as drawn."""
        rewards, _ = self._with_own_chance(self._game.close)
        return {"outcome": float((rewards or {}).get(self._seat, 0.0))}

    def hidden_state(self) -> str:
        """The deal, who plays against the policy, and the seed: an opponent's moves are drawn from it too. Texts of
        games show less than their state."""
        state = getattr(self._game.state, "game_state", None)
        facts = [self._id, self._opponent_name, self._seat, state, self.seed]
        return json.dumps(facts, skipkeys=True, default=lambda value: type(value).__name__)

    # --- parts ---

    def _started(self, seed: int) -> tuple[Any, int]:
        """A fresh game and its number of players, without wrappers: they repeat the whole game at every turn."""
        error: Exception | None = None
        for num_players in (self._players_wanted,) if self._players_wanted else _NUM_PLAYERS:
            game = self._arena.make(self._id)
            while isinstance(game, self._arena.core.Wrapper):
                game = game.env
            try:
                game.reset(num_players=num_players, seed=seed)
                return game, num_players
            except Exception as raised:  # games say which number of players they take by raising
                error = error or raised
        assert error is not None
        raise error

    def _play(self, move: str) -> str:
        done, _ = self._with_own_chance(lambda: self._game.step(action=move))
        if done:
            self.end_world()
        return self._advance()

    def _advance(self) -> str:
        """Play the other seats until it is the policy's turn; returns what its seat was shown since its last move."""
        for _ in range(MAX_OPPONENT_MOVES):
            if self.world_ended:
                return "The game is over."
            player, shown = self._with_own_chance(self._game.get_observation)
            text = self._as_text(player, shown)
            if player == self._seat:
                return text
            move = self._move_of(text, self._opponent_rng)
            done, _ = self._with_own_chance(lambda move=move: self._game.step(action=move))
            if done:
                self.end_world()
        raise RuntimeError(f"{self._id}: {MAX_OPPONENT_MOVES} moves without a turn of seat {self._seat}")

    def _as_text(self, player: int, shown: Sequence[tuple[int, str, Any]]) -> str:
        roles = self._game.state.role_mapping or {}
        lines = []
        for speaker, text, kind in shown:
            if speaker == player and kind is self._arena.core.ObservationType.PLAYER_ACTION:
                continue  # its own words
            name = "" if speaker == self._arena.core.GAME_ID else f"{roles.get(speaker, f'Player {speaker}')}: "
            lines.append(f"{name}{text}")
        return "\n".join(lines).strip()

    def _with_own_chance(self, function: Callable[[], Any]) -> Any:
        if not _global_chance.acquire(timeout=LOCK_TIMEOUT_S):
            raise InfraFault(f"another TextArena game of this process has not answered for {LOCK_TIMEOUT_S:g} s")
        outside = random.getstate()
        random.setstate(self._chance_state)
        try:
            return function()
        finally:
            self._chance_state = random.getstate()
            random.setstate(outside)
            _global_chance.release()


def _as_opponent(opponent: Opponent | Sequence[str] | str) -> Opponent:
    if callable(opponent):
        return opponent
    if opponent == "random":
        return random_move
    if isinstance(opponent, str):
        module, _, name = opponent.partition(":")
        found = getattr(importlib.import_module(module), name, None) if name else None
        if not callable(found):
            raise ValueError(f"opponent={opponent!r} is neither 'random' nor a function 'module:name'")
        return cast(Opponent, found)
    return _Script(opponent)


def _name_of(opponent: Opponent | Sequence[str] | str) -> str:
    """The same in every process, as the repr of a function is not."""
    if isinstance(opponent, str):
        return opponent
    if not callable(opponent):
        return json.dumps(list(opponent))
    named = opponent if inspect.isroutine(opponent) else type(opponent)
    return f"{named.__module__}:{named.__qualname__}"


class _Script:
    """Plays given moves in order, then from the beginning again; the position is in the observation's chance."""

    def __init__(self, moves: Sequence[str]) -> None:
        if not moves:
            raise ValueError("a scripted opponent needs at least one move")
        self._moves = tuple(moves)
        self._turns: dict[random.Random, int] = {}

    def __call__(self, observation: str, rng: random.Random) -> str:
        turn = self._turns.get(rng, 0)
        self._turns = {rng: turn + 1}  # one episode at a time
        return self._moves[turn % len(self._moves)]
