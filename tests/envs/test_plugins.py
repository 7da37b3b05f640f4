"""Environments of a user's own package, without editing Shoal: by entry point and by import path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.record.recorder import TrajectoryReader

ROOT = Path(__file__).parents[2]
EGGS = '''
from envs.base import AgentEnv, call, say
from envs.tool import tool


class Eggs(AgentEnv):
    def task(self, rng, level):
        self.dozens = rng.randint(2, 10 ** (level + 5))
        return f"eggs in {self.dozens} dozen?"

    @tool
    def multiply(self, a: int, b: int) -> int:
        """a * b"""
        return a * b

    def reward(self, answer):
        return float(answer.strip() == str(12 * self.dozens))

    def oracle(self):
        replies = yield call("multiply", a=self.dozens, b=12)
        yield say(replies[0].text)
'''
PROJECT = """
[build-system]
requires = ["hatchling>=1.25"]
build-backend = "hatchling.build"

[project]
name = "egg-envs"
version = "1.0"

[project.entry-points."shoal.envs"]
"Eggs-v0" = "egg_envs.eggs:Eggs"

[tool.hatch.build.targets.wheel]
packages = ["egg_envs"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a user's package."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "egg_envs").mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "egg_envs" / "__init__.py").write_text("")
    (source / "egg_envs" / "eggs.py").write_text(EGGS)
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*words, "--target", target, source], capture_output=True, text=True, timeout=100)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip(f"the build backend cannot be installed here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return target


def python(*words: str, site: Path, timeout: float = 60) -> str:
    """What a new interpreter prints, for which the packages in `site` are installed."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_is_listed_made_and_solved_in_a_fresh_process(installed: Path) -> None:
    code = "from envs.registry import list_envs, make_env; from envs.check.demonstration import demonstrate\n"
    code += "assert 'Eggs-v0' in list_envs()\n"
    code += "for id in ('Eggs-v0', 'egg_envs.eggs:Eggs'): print(demonstrate(make_env(id), seed=1, level=0).reward)"
    assert python("-c", code, site=installed).split() == ["1.0", "1.0"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_training_on_ray_finds_an_installed_package_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    """The pool of environments is an actor in a process of its own: it resolves the id itself."""
    words = ["env=Eggs-v0", "policy.init=random", "experiment=smoke", "cluster=ray", f"run.root={tmp_path}"]
    python("-m", "rl.cli", "train", *words, site=installed, timeout=220)
    run = tmp_path / "latest"
    assert json.loads((run / "summary.json").read_text())["n"] == 8
    with TrajectoryReader(run / "trajectories.db") as reader:
        rows = list(reader.each({"env_id": "Eggs-v0"}))
    assert len(rows) >= 24 + 8 and [row.trajectory.error for row in rows if row.trajectory.error] == []
    assert all(row.trajectory.prompt[0].text.startswith("eggs in ") for row in rows)
