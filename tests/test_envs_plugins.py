"""Environments of a user's own package, without editing Shoal: by entry point and by import path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README_ENV = '''
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
    (source / "egg_envs" / "eggs.py").write_text(README_ENV)
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*words, "--target", target, source], capture_output=True, text=True, timeout=100)
    if "hatchling" in done.stderr and done.returncode:
        pytest.skip(f"the build backend cannot be installed here: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return target


def run(code: str, installed: Path, timeout: float = 60) -> str:
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{installed}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_package_is_listed_made_and_solved_in_a_fresh_process(installed: Path) -> None:
    code = "from envs.registry import list_envs, make_env; from envs.demonstration import demonstrate\n"
    code += "assert 'Eggs-v0' in list_envs()\n"
    code += "for id in ('Eggs-v0', 'egg_envs.eggs:Eggs'): print(demonstrate(make_env(id), seed=1, level=0).reward)"
    assert run(code, installed).split() == ["1.0", "1.0"]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_workers_find_an_installed_package(installed: Path) -> None:
    code = """
import ray
ray.init(num_cpus=1, include_dashboard=False, logging_level="error")

@ray.remote
def solve(env_id):
    from envs.demonstration import demonstrate
    from envs.registry import make_env
    return demonstrate(make_env(env_id), seed=1, level=0).reward

print(ray.get([solve.remote("Eggs-v0"), solve.remote("egg_envs.eggs:Eggs")], timeout=60))
ray.shutdown()
"""
    assert "[1.0, 1.0]" in run(code, installed, timeout=110)


def test_the_environment_has_at_most_20_lines() -> None:
    assert len([line for line in README_ENV.splitlines() if line.strip()]) <= 20
