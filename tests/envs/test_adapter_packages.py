"""Adapters to packages that run in our own process, each against the real package."""

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from envs.adapters.extra import MissingExtra, load_extra
from envs.adapters.gymnasium_env import GymnasiumEnv, GymnasiumImageEnv, from_gymnasium
from envs.adapters.reasoning_gym_env import ReasoningGymEnv, from_reasoning_gym
from envs.adapters.textarena_env import from_textarena, random_move
from envs.adapters.trl_env import from_trl, trl_environment_factory, trl_rows
from envs.base import AgentEnv, call
from envs.check.demonstration import demonstrate
from envs.errors import MalformedEnvironment
from envs.message import ImagePart
from envs.pool.pool import EnvPool
from envs.registry import make_env
from envs.tasks.curriculum import TaskEntry
from envs.tasks.task_source import held_out_tasks
from rl.cli.main import main
from rollout.record.recorder import TrajectoryReader
from tests.docs.documentation import DOCS, blocks, commands, shoal_words

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
Taxi = from_gymnasium("Taxi-v4")
ADAPTER = "envs.adapters.{}_env:{}Env"


def stubborn_move(shown: str, rng: random.Random) -> str:
    """A fixed opponent, by chance of its own."""
    return random_move(shown, random.Random(0))


Noughts = from_textarena("TicTacToe-v0", opponent=stubborn_move)


class CounterEnv:
    """A TRL environment: count up to a target."""

    def reset(self, seed: int = 0, **row: Any) -> str:
        self.total, self.target = 0, random.Random(seed).randint(3, 9)
        return f"count to {self.target}"

    def increment(self, step: int) -> str:
        """Count on.

        Args:
            step: By how much.
        """
        self.total += step
        return str(self.total)

    def get_reward(self) -> float:
        return float(self.total == self.target)


def play(env: AgentEnv, seed: int, *, by_tool: bool) -> tuple[list[Any], float]:
    """An episode by a random policy to its end: (everything shown, reward)."""
    opening, info = env.reset(seed=seed)
    rng, shown = random.Random(seed), [part for message in opening for part in message.content]
    while True:
        if by_tool:
            names = info["tools"][0].parameters["properties"]["action"]["enum"]
            action = call("act", action=rng.choice(names))
        else:
            action = random_move(getattr(shown[-1], "text", ""), rng)
        replies, reward, terminated, truncated, _ = env.step(action)
        shown += [part for message in replies for part in message.content]
        if terminated or truncated:
            return shown, reward


@pytest.mark.parametrize("id", ["Taxi-v4", "FrozenLake-v1", "CliffWalking-v1"])
def test_a_text_world_is_played_to_its_end_and_replayed_from_its_seed(id: str) -> None:
    owner = from_gymnasium(id, max_turns=40)
    first = play(owner(), 7, by_tool=True)
    assert play(owner(), 7, by_tool=True) == first
    assert len(first[0]) > 3


def test_colors_become_brackets_so_that_the_player_on_the_lake_is_seen() -> None:
    opening, _ = from_gymnasium("FrozenLake-v1")().reset(seed=0)
    assert "[S]FFF\nFHFH" in opening[0].text and "\x1b" not in opening[0].text


def test_a_solved_lake_scores_one_and_levels_choose_settings() -> None:
    lake = from_gymnasium("FrozenLake-v1", kwargs={"is_slippery": False}, level_kwargs=[{}, {"map_name": "8x8"}])
    assert lake.levels == 2
    env = lake()
    env.reset(seed=0, options={"level": 0})
    for action in ("down", "down", "right", "right", "down", "right"):
        replies, reward, terminated, _, _ = env.step(call("act", action=action))
    assert (reward, terminated) == (1.0, True)
    assert replies[0].text.startswith("reward 1, the end")
    big, _ = env.reset(seed=0, options={"level": 1})
    assert "[S]FFFFFFF" in big[0].text
    with pytest.raises(ValueError, match="level 2"):
        env.reset(seed=0, options={"level": 2})


def test_a_mistaken_action_and_plain_text_are_answered_and_do_not_end_the_episode() -> None:
    env = Taxi()
    env.reset(seed=0)
    for action in (call("act", action="fly"), "I give up"):
        replies, _, terminated, truncated, _ = env.step(action)
        assert replies and not terminated and not truncated


def test_minigrid_is_seen_as_images() -> None:
    pytest.importorskip("minigrid", reason="extra 'minigrid'")
    owner = from_gymnasium("minigrid:MiniGrid-Empty-5x5-v0", observe="image", kwargs={"tile_size": 8}, max_turns=12)
    assert issubclass(owner, GymnasiumImageEnv) and owner.images
    first = play(owner(), 3, by_tool=True)
    assert play(owner(), 3, by_tool=True) == first
    frames = [part for part in first[0] if isinstance(part, ImagePart)]
    assert len(frames) >= 2 and all(frame.data.startswith(b"\x89PNG") for frame in frames)
    assert len({frame.data for frame in frames}) > 1  # something moved


def test_a_set_is_solved_by_its_own_answer_at_several_levels_and_not_by_garbage() -> None:
    pytest.importorskip("reasoning_gym", reason="extra 'reasoning-gym'")
    for name in ("chain_sum", "spell_backward", "graph_color", "game_of_life_halting"):
        env = from_reasoning_gym(name)()
        for level in (0, 3):
            assert demonstrate(env, seed=4, level=level).reward == 1.0, name
            opening, _ = env.reset(seed=4, options={"level": level})
            assert env.step("forty-two and a half")[1] < 0.3
            assert env.reset(seed=4, options={"level": level})[0] == opening


def test_a_scorer_that_raises_on_nonsense_gives_nothing() -> None:
    pytest.importorskip("reasoning_gym", reason="extra 'reasoning-gym'")
    env = make_env("envs.adapters.reasoning_gym_env:ReasoningGymEnv", name="prime_factorization")
    assert isinstance(env, ReasoningGymEnv)
    env.reset(seed=1)
    assert env.step("two × banana")[1] == 0.0


def test_an_unknown_name_is_told() -> None:
    with pytest.raises(MalformedEnvironment, match="gymnasium has no 'Taxi-v999'"):
        from_gymnasium("Taxi-v999")()
    pytest.importorskip("reasoning_gym", reason="extra 'reasoning-gym'")
    with pytest.raises(MalformedEnvironment, match="reasoning-gym has no 'sudokku'"):
        from_reasoning_gym("sudokku")()
    pytest.importorskip("textarena", reason="extra 'textarena'")
    with pytest.raises(MalformedEnvironment, match="textarena has no 'TicTac-v0'"):
        from_textarena("TicTac-v0")()


def test_games_are_played_against_random_scripted_and_fixed_opponents() -> None:
    pytest.importorskip("textarena", reason="extra 'textarena'")
    opponents: list[Any] = ["random", ["[0]", "[1]", "[2]"], lambda shown, rng: random_move(shown, rng)]
    for opponent in opponents:
        owner = from_textarena("TicTacToe-v0", opponent=opponent)
        first = play(owner(), 5, by_tool=False)
        assert play(owner(), 5, by_tool=False) == first
    losing = from_textarena("TicTacToe-v0", opponent=["[0]", "[3]", "[4]"])()
    losing.reset(seed=0)
    for move in ("[8]", "[7]"):
        losing.step(move)
    _, reward, terminated, _, _ = losing.step("[6]")  # the row 6, 7, 8
    assert (reward, terminated) == (1.0, True)


def test_a_problem_has_the_same_digest_in_a_new_process_though_its_opponent_is_a_function() -> None:
    pytest.importorskip("textarena", reason="extra 'textarena'")
    code = f"from {__name__} import Noughts; print(Noughts().reset(seed=3)[1]['problem_digest'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split()[-1] == Noughts().reset(seed=3)[1]["problem_digest"]
    others = [from_textarena("TicTacToe-v0", opponent=opponent)() for opponent in ("random", random_move, ["[0]"])]
    assert len({env.reset(seed=3)[1]["problem_digest"] for env in (*others, Noughts())}) == 4


@pytest.mark.parametrize(
    ("package", "id"),
    [
        ("Gymnasium", "FrozenLake-v1"),
        ("TextArena", "TicTacToe-v0"),
        *(pytest.param("Gymnasium", id, marks=pytest.mark.sweep) for id in ("Taxi-v4", "CliffWalking-v1")),
    ],
)
def test_a_world_has_as_many_held_out_problems_as_a_training_asks_for(package: str, id: str) -> None:
    """Chance after the opening comes from the seed, too: problems of one opening are told apart by it."""
    pytest.importorskip(package.lower(), reason=f"extra '{package.lower()}'")
    env_id = ADAPTER.format(package.lower(), package)
    entry = TaskEntry(name="world", env_id=env_id, weight=1.0, level=0, kwargs={"id": id})
    found = asyncio.run(held_out_tasks((entry,), EnvPool(), count=1000, seed=0))
    assert len(found) == 1000


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("name", "module"), [("FrozenLake-v1", "gymnasium"), ("chain_sum", "reasoning_gym")])
def test_a_training_that_the_documentation_shows_runs(name: str, module: str, tmp_path: Path) -> None:
    pytest.importorskip(module)
    shown = [command for block in blocks(DOCS / "adapters.md") for command in commands(block) if name in command]
    (words,) = [shoal_words(command) for command in shown if command.startswith("shoal train")]
    assert main([*words, "cluster=inprocess", "experiment=smoke", f"run.root={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "latest" / "summary.json").read_text())
    assert summary["n"] == 8 and summary["held_out_overlap"] == 0
    with TrajectoryReader(tmp_path / "latest" / "trajectories.db") as reader:
        rows = reader.list(limit=1000)
    assert len(rows) >= 24 + 8 and all(row["error"] is None and row["num_sampled_tokens"] > 0 for row in rows)


def test_games_do_not_touch_the_chance_of_others() -> None:
    pytest.importorskip("textarena", reason="extra 'textarena'")
    random.seed(1)
    before = random.getstate()
    play(from_textarena("Poker-v0", max_turns=2)(), 1, by_tool=False)
    assert random.getstate() == before


def test_a_trl_environment_becomes_one_of_ours() -> None:
    env = from_trl(CounterEnv)()
    opening, info = env.reset(seed=3)
    assert [spec.name for spec in info["tools"]] == ["increment"]
    target = int(opening[0].text.removeprefix("count to "))
    replies, *_ = env.step(call("increment", step=str(target)))
    assert replies[0].text == str(target)
    assert env.step("done")[1] == 1.0
    again, _ = env.reset(seed=3)
    assert again[0].text == opening[0].text


def test_an_environment_becomes_a_trl_factory() -> None:
    made = trl_environment_factory("Calculator-v0")
    env: Any = made()
    assert made.__name__ == "Calculator"
    row = trl_rows(1, seed=0)[0]
    text = env.reset(**row)
    assert env.reset(**row) == text
    left, right = (int(n) for n in text.rstrip("=?").replace("-", "+").replace("*", "+").split("+"))
    tool = env.add if "+" in text else env.sub if "-" in text else env.mul
    assert env.submit(tool(a=left, b=right)) == "done"
    assert env.get_reward() == 1.0


def test_images_reach_trl_as_its_blocks() -> None:
    pytest.importorskip("PIL", reason="extra 'images'")
    env: Any = trl_environment_factory("ChartQA-v0")()
    opening, zoomed = env.reset(seed=0), env.zoom(x=10, y=10)
    assert [block["type"] for block in opening] == ["image", "text"] and opening[1]["text"]
    assert [block["type"] for block in zoomed] == ["image"]
    assert opening[0]["image"].size == zoomed[0]["image"].size and opening[0]["image"] != zoomed[0]["image"]
    assert env.submit("no idea") == "done"
    pytest.importorskip("trl", reason="extra 'trl'")
    from trl.data_utils import prepare_multimodal_messages

    messages = [{"role": "user", "content": opening}, {"role": "tool", "name": "zoom", "content": zoomed}]
    assert prepare_multimodal_messages(messages) == messages


def test_a_trl_environment_that_shows_more_than_text_is_refused() -> None:
    class Pictures(CounterEnv):
        def reset(self, seed: int = 0, **row: Any) -> Any:
            return [{"type": "image", "image": None}]

    with pytest.raises(MalformedEnvironment, match=r"Pictures.reset\(\) returned list, not text"):
        from_trl(Pictures)().reset(seed=0)


@pytest.mark.slow
def test_trl_reads_the_tools_of_an_exported_class() -> None:
    pytest.importorskip("trl", reason="extra 'trl'")
    from transformers.utils import get_json_schema

    env: Any = trl_environment_factory("Calculator-v0")()
    for name in ("add", "submit"):
        schema = get_json_schema(getattr(env, name))["function"]
        assert schema["name"] == name and schema["parameters"]["required"]
    assert get_json_schema(env.add)["function"]["parameters"]["properties"]["a"]["type"] == "integer"


def test_a_preset_belongs_to_the_module_that_made_it() -> None:
    assert Taxi.__module__ == __name__
    assert isinstance(make_env("tests.envs.test_adapter_packages:Taxi", max_turns=3), GymnasiumEnv)
    with pytest.raises(TypeError, match="max_turn"):
        from_gymnasium("Taxi-v4", max_turn=3)


@pytest.mark.parametrize(
    ("module", "extra"), [("reasoning_gym", "reasoning-gym"), ("textarena", "textarena"), ("websockets", "openenv")]
)
def test_a_missing_package_names_the_extra(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"pip install 'shoal\[{extra}\]'"):
        load_extra(module, extra)


def test_adapters_import_no_package_of_others() -> None:
    """An id costs nothing before an environment of it is made: reasoning-gym alone takes seconds."""
    names = "gymnasium_env, reasoning_gym_env, textarena_env, openenv_client, openenv_server, trl_env"
    code = f"import sys; from envs.adapters import {names}; from envs.adapters.gymnasium_env import from_gymnasium\n"
    code += "from_gymnasium('Taxi-v4')\n"
    code += "sys.exit([m for m in ('reasoning_gym','textarena','minigrid','trl','websockets','torch','PIL') "
    code += "if m in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr
