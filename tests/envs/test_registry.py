"""From ids to environments, also in a fresh process, and clear errors for everything that is none."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from envs.errors import MalformedEnvironment, UnknownEnvironment
from envs.library.calculator import Calculator
from envs.registry import environment_facts, list_envs, make_env
from tests.envs.small_envs import Doubling

ROOT = Path(__file__).parents[2]


def test_built_in_ids_are_listed_and_made() -> None:
    assert {"Calculator-v0", "ToolGate-v0", "ShopDB-v0"} <= set(list_envs())
    env = make_env("Calculator-v0", max_turns=3)
    assert isinstance(env, Calculator)
    assert env.max_turns == 3
    assert env.spec is not None
    assert env.spec.to_json()  # its entry point is text


def test_ids_may_name_a_class_in_a_module_or_a_registered_id_in_a_module(tmp_path: Path) -> None:
    assert isinstance(make_env("tests.envs.small_envs:Doubling"), Doubling)
    (tmp_path / "my_shop.py").write_text(
        "import gymnasium\nfrom envs.library.shop_db import ShopDB as Shop\n"
        "gymnasium.register('MyShop-v0', entry_point='my_shop:Shop')\n"
    )
    # A fresh process that starts in the author's folder and knows nothing of it but the id.
    code = "import sys; sys.path.remove('') if '' in sys.path else None; from envs.registry import make_env; "
    code += "print(type(make_env('my_shop:MyShop-v0', max_turns=2)).__name__, make_env('my_shop:Shop').max_turns)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["ShopDB", "4"], done.stderr


def test_nothing_is_registered_at_import() -> None:
    code = "import gymnasium, envs.registry, envs.library.shop_db; print('ShopDB-v0' in gymnasium.registry)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_an_unknown_id_names_the_nearest_and_the_list() -> None:
    with pytest.raises(UnknownEnvironment, match=r"'Calcluator-v0'; did you mean 'Calculator-v0'\? Known: .*ShopDB-v0"):
        make_env("Calcluator-v0")
    with pytest.raises(UnknownEnvironment, match=r"there is no module 'no_such_shop'"):
        make_env("no_such_shop:Shop")
    with pytest.raises(UnknownEnvironment, match=r"has no 'Doublin'; did you mean 'Doubling'"):
        make_env("tests.envs.small_envs:Doublin")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("NotAnEnvironment", "is not a subclass of envs.base.AgentEnv"),
        ("asyncio", "is not a subclass of envs.base.AgentEnv"),
        ("NoTask", r"NoTask defines no task\(self, rng, level\)"),
        ("NoReward", r"NoReward defines no reward\(self, answer\)"),
        ("WrongTaskSignature", r"WrongTaskSignature.task must take task\(self, rng, level\)"),
        ("UntypedTool", "tool look: parameter where has no type"),
    ],
)
def test_a_malformed_class_gives_one_clear_error(name: str, text: str) -> None:
    with pytest.raises(MalformedEnvironment, match=text):
        make_env(f"tests.envs.small_envs:{name}")


def test_unknown_constructor_arguments_name_the_known_ones() -> None:
    with pytest.raises(MalformedEnvironment, match="'latency'; its arguments are: max_turns, latency_median_s"):
        make_env("Calculator-v0", latency=1.0)


def test_a_module_that_fails_to_import_is_malformed_and_keeps_the_cause(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "broken_shop_module.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "raising_shop_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MalformedEnvironment, match="No module named 'not_installed_anywhere'"):
        make_env("broken_shop_module:Shop")
    with pytest.raises(MalformedEnvironment, match="raised ZeroDivisionError") as caught:
        make_env("raising_shop_module:Shop")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_id_registered_by_hand_works_and_is_not_taken_over() -> None:
    gymnasium.register("HandMade-v0", entry_point="tests.envs.small_envs:Doubling")
    try:
        assert isinstance(make_env("HandMade-v0"), Doubling)
    finally:
        del gymnasium.registry["HandMade-v0"]


def test_facts_for_the_manifest_name_class_version_and_source() -> None:
    facts = environment_facts(["Calculator-v0", "tests.envs.small_envs:Doubling"])
    assert facts["Calculator-v0"]["class"] == "envs.library.calculator:Calculator"
    assert facts["Calculator-v0"]["version"] == 0
    assert {len(row["sha256"]) for row in facts.values()} == {64}
