"""Trainings that a program outside leads through the endpoint: the openai client of tests/rl/calculator_agent.py."""

import json
import random
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from conf.loading import load_config
from conf.schema import TrainConfig
from envs.base import AgentEnv
from envs.outcome import EnvHost
from policy.engine.local_engine import LocalEngine
from policy.engine.protocol import Completion, GenerationRequest
from policy.model.hf_model import load_policy_model
from rl.runs.run_folder import RunFolder
from rollout.dialects.dialect import make_dialect
from rollout.record.recorder import TrajectoryReader
from rollout.record.trajectory import Trajectory
from rollout.serve.agent_process import AgentCrew
from rollout.worker import RolloutWorker
from tests.rl.training import SMALL, small_config, train_in_process

ROOT = Path(__file__).resolve().parents[2]
AGENT = f"{sys.executable} {ROOT / 'tests' / 'rl' / 'calculator_agent.py'}"
DIES_ONCE = """
import os, pathlib, sys, httpx
mark = pathlib.Path(sys.argv[1])
if not mark.exists():  # takes a session, and dies with it
    mark.touch()
    key = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    assert httpx.post(os.environ["SHOAL_URL"] + "/v1/sessions", headers=key, timeout=60).json()["session_id"]
    os._exit(3)
os.execv(sys.executable, [sys.executable, sys.argv[2]])
"""


ANSWERS_ITS_ENVIRONMENTS_NAME = """
import os, httpx
key = {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
http = httpx.Client(base_url=os.environ["SHOAL_URL"], headers=key, timeout=60)
while True:
    session = http.post("/v1/sessions").json()
    if session["session_id"] is None:
        continue
    task = session["task"]
    chat = {"model": session["model"], "messages": task["messages"], "max_tokens": 4}
    header = {"x-shoal-session": session["session_id"]}
    http.post("/v1/chat/completions", json=chat, headers=header).raise_for_status()
    http.post("/v1/sessions/" + session["session_id"] + "/reward", json={"answer": task["env_name"]})
"""


class PaysForItsName(AgentEnv):
    """So much, and nothing for another's."""

    def __init__(self, *, name: str, pays: float) -> None:
        super().__init__()
        self.name, self.pays = name, pays

    def task(self, rng: random.Random, level: int) -> str:
        return f"{self.name} {rng.randrange(10**9)}"

    def reward(self, answer: str) -> float:
        return self.pays if answer == self.name else 0.0


class Heard(LocalEngine):
    """Keeps all that it answered."""

    completions: list[Completion]

    async def generate(self, request: GenerationRequest) -> Completion:
        self.completions.append(await super().generate(request))
        return self.completions[-1]


def train_with(config: TrainConfig) -> tuple[list[Trajectory], list[Completion]]:
    """The trained trajectories of a run in this process, and all that its engine sampled."""
    heard: list[Completion] = []

    def build(config: TrainConfig, name: str, host: EnvHost) -> RolloutWorker:
        engine = Heard(load_policy_model(config.policy, seed=config.seed), config.engine)
        engine.completions = heard
        return RolloutWorker(
            name,
            engine=engine,
            dialect=make_dialect(config.policy),
            host=host,
            config=config.rollout,
            seed=config.seed,
            agents=AgentCrew(config.agent.command, processes=config.agent.processes),
        )

    finished = train_in_process(config, build=build)
    with TrajectoryReader(finished.folder.trajectories) as reader:
        groups = reader.groups("consumed")
    return [trajectory for group in groups for trajectory in group.trajectories], heard


def sampled_turns(trajectory: Trajectory) -> list[tuple[int, ...]]:
    """Token ids of each stretch that the loss mask names."""
    pairs = zip(trajectory.loss_mask.tolist(), trajectory.token_ids.tolist(), strict=True)
    return [tuple(token for _, token in run) for mask, run in groupby(pairs, key=lambda pair: pair[0]) if mask]


def calculator(tmp_path: Path, command: str, *words: str) -> TrainConfig:
    """From the shipped warm start, whose calls can be read; eight episodes a step."""
    small = [word for word in SMALL if not word.startswith("policy.")]
    return load_config([*small, "env=calculator", f"agent.command='{command}'", f"run.root={tmp_path}", *words])


def test_every_token_that_an_agents_run_trains_on_is_one_that_the_engine_sampled(tmp_path: Path) -> None:
    trajectories, heard = train_with(calculator(tmp_path, AGENT, "steps=2"))
    assert len(trajectories) == 2 * 2 * 4
    answered = {tuple(completion.token_ids.tolist()) for completion in heard}
    turns = [turn for trajectory in trajectories for turn in sampled_turns(trajectory)]
    assert len(turns) > len(trajectories) and set(turns) <= answered


@pytest.mark.slow
def test_an_agent_program_that_died_is_started_again_and_its_session_is_played_again(tmp_path: Path) -> None:
    program, mark = tmp_path / "dies_once.py", tmp_path / "mark"
    program.write_text(DIES_ONCE)
    command = f"{sys.executable} {program} {mark} {ROOT / 'tests' / 'rl' / 'calculator_agent.py'}"
    trajectories, _ = train_with(calculator(tmp_path, command, "steps=1"))
    assert mark.exists()
    assert len(trajectories) == 8 and not any(trajectory.stop_reason.is_error for trajectory in trajectories)


@pytest.mark.slow
def test_of_a_mix_an_agent_program_is_told_each_task_s_environment_which_also_scores_it(tmp_path: Path) -> None:
    program = tmp_path / "names.py"
    program.write_text(ANSWERS_ITS_ENVIRONMENTS_NAME)
    here = f"{__name__}:{PaysForItsName.__name__}"
    mix = ", ".join(
        f"{name}: {{id: '{here}', kwargs: {{name: {name}, pays: {pays}}}}}"
        for name, pays in (("left", 1.0), ("right", 0.5))
    )
    words = ("env.name=both", f"env.mix={{{mix}}}", f"agent.command='{sys.executable} {program}'", "steps=3")
    trajectories, _ = train_with(small_config(tmp_path, *words))
    assert len(trajectories) == 3 * 2 * 4
    assert {(t.task.env_name, t.reward) for t in trajectories} == {("left", 1.0), ("right", 0.5)}
    assert all(t.prompt[-1].text.startswith(f"{t.task.env_name} ") for t in trajectories)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_program_outside_trained_on_ray_gains_held_out_success(tmp_path: Path) -> None:
    words = (
        "env=calculator", f"agent.command='{AGENT}'", "seed=1", "steps=20", "rollout.groups_per_step=8",
        "rollout.group_size=8", "learner.optimizer.warmup_steps=3", "evaluation.every=0", "evaluation.final_tasks=200",
        "monitor.wandb=disabled", f"run.root={tmp_path}",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "rl.cli", "train", *words], cwd=ROOT, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(RunFolder.resolve(tmp_path, "latest").summary.read_text())
    print({name: summary[name] for name in ("success_before", "success_after", "ci95", "train_seconds")})
    assert summary["success_after"] - summary["success_before"] >= 0.15
