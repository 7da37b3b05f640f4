"""The command line: help, errors, exit codes, JSON on the last line, sweeps and children."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from conf.loading import load_config, read_config, resolved_yaml
from envs.message import Message, ToolCall, ToolResult
from envs.task import Task
from rl.cli.bench import run_benchmark
from rl.cli.main import COMMANDS, main
from rl.cli.sweep import run_sweep
from rl.monitor.monitor import Monitor
from rl.monitor.progress import visible
from rl.runs.run_folder import RunFolder
from rl.runs.usage import UsageError
from rollout.record.ledger import Ledger
from rollout.record.recorder import Recorder
from rollout.record.trajectory import EpisodeError, StopReason, Trajectory, TrajectoryGroup, Turn
from tests.rl.test_monitor import evaluation

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


# --- help and errors


def test_help_names_every_command_and_shows_examples(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(f"  {name}" in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, _ = run(capsys, name, "--help")
        assert code == 0 and f"  shoal {name}" in out
    assert run(capsys)[0] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["train", "env=calclator"], "unknown env 'calclator'. Did you mean 'calculator'?"),
        (["train", "rollout.max_stalenes=1"], "Did you mean 'rollout.max_staleness'?"),
        (["train", "-m", "seed=1,2", "stepz=3"], "unknown key 'stepz'. Did you mean 'steps'?"),
        (["train", "sft.steps=3"], "'sft.steps=3' has no effect"),
        (["train", "--config-dir", "nowhere"], "config folder 'nowhere' does not exist"),
        (["train", "--nonsense"], "--nonsense"),
        (["train", "env=Chess-v0"], "no environment 'Chess-v0'"),
        (["train", "env=json:Chess-v0"], "Chess"),
        (["train", "env.kwargs.latncy_median_s=1"], "Did you mean 'env.kwargs.latency_median_s'?"),
        (["train", "policy.preset=tiny_hybrd"], "Did you mean 'tiny_hybrid'?"),
        (["train", "policy.overrides.hiden_size=8"], "'hidden_size'"),
        (["train", "policy.init=random", "learner.loss.name=os.path:jion"], "os.path:jion"),
        (["sft", "steps=3"], "'steps=3' has no effect"),
        (["show", "latest", "--root", "nowhere"], "nowhere"),
        (["show"], "RUN"),
        (["resume", "x", "--root", "nowhere"], "no run 'x'"),
        (["eval", "x", "--root", "nowhere"], "no run 'x'"),
        (["env", "lsit"], "lsit"),
    ],
)
def test_bad_usage_is_told_in_words_and_ends_with_2(capsys, words, told):
    code, _, err = run(capsys, *words)
    assert code == 2 and told in err


def test_dry_run_prints_a_config_that_reads_back_and_makes_nothing(capsys, tmp_path):
    words = ["env=shop_db", "seed=5", "policy.init=random", f"run.root={tmp_path}/runs", "dry_run=true"]
    code, out, _ = run(capsys, "train", *words)
    assert code == 0 and read_config(out) == load_config(words)
    assert not (tmp_path / "runs").exists()


def test_options_may_stand_before_and_after_the_overrides(capsys):
    code, out, _ = run(
        capsys, "train", "seed=5", "--config-dir", str(ROOT / "conf"), "policy.init=random", "dry_run=true"
    )
    assert code == 0 and read_config(out).seed == 5


def test_python_m_rl_train_is_the_same_command(tmp_path):
    command = [sys.executable, "-m", "rl.train", "stepz=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == "shoal: unknown key 'stepz'. Did you mean 'steps'?\n"


def test_an_environment_list_is_json_and_needs_no_torch():
    code = "import sys; from rl.cli.main import main; main(['env', 'list', '--json']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    envs = {row["id"]: row["builtin"] for row in json.loads(done.stdout.splitlines()[-1])["envs"]}
    assert envs["Calculator-v0"] and envs["ToolGate-v0"] and envs["ShopDB-v0"]


# --- runs


def hostile_trajectory() -> Trajectory:
    """Two turns, an error with the author's traceback, and text that would like to paint the terminal."""
    task = Task(task_id="train/calc/0", env_id="Calculator-v0", env_name="calc", seed=1, level=2)
    mask = np.array([0, 0, 1, 1, 0, 1], np.uint8)
    call = ToolCall(name="add", arguments={"a": 2, "b": 3}, call_id="0")
    result = ToolResult(call_id="0", name="add", content="5 [red]\x1b[31mred\u202e")
    return Trajectory(
        trajectory_id="train/calc/0/0",
        group_id="train/calc/0",
        task=task,
        member=0,
        token_ids=np.arange(6, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -0.5, 0.0).astype(np.float32),
        policy_versions=np.array([-1, -1, 3, 4, -1, 4], np.int32),
        turns=(
            Turn(start=2, end=4, message=Message.assistant(calls=[call]), reply=(Message.tool(result),)),
            Turn(start=5, end=6, message=Message.assistant("five")),
        ),
        prompt=(Message.user("2 + 3?"),),
        reward=None,
        stop_reason=StopReason.ENV_ERROR,
        error=EpisodeError(kind="env", where="reward", message="boom", traceback='File "mine.py", line 3, in reward'),
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """A folder of runs with one finished run."""
    folder = RunFolder.create(tmp_path, "calc", "tiny_hybrid", "first-run")
    config = load_config(["env.name=calc", "seed=9", "steps=2", "monitor=quiet"])
    folder.write_config(resolved_yaml(config))
    monitor = Monitor(folder.path, config)
    monitor.evaluation(evaluation(0, 0.25))
    monitor.step(1, 1, {"reward/mean": 0.5, "trainer/tok_s": 100.0})
    monitor.evaluation(evaluation(2, 0.75))
    monitor.close()
    trajectory = hostile_trajectory()
    recorder = Recorder(folder.trajectories)
    group = TrajectoryGroup(group_id="train/calc/0", task=trajectory.task, attempt=1, trajectories=(trajectory,))
    recorder.write([group])
    recorder.flush(30.0)
    recorder.close()
    folder.heartbeat(step=2)
    folder.write_summary({"env": "calc", "success_before": 0.25, "success_after": 0.75})
    folder.finish("finished")
    return tmp_path


def test_ls_lists_runs_newest_first(capsys, root):
    RunFolder.create(root, "calc", "tiny_hybrid", "second-run", clock=lambda: time.time() + 5)
    code, out, _ = run(capsys, "ls", "--root", str(root), "--json")
    rows = json.loads(out.splitlines()[-1])["runs"]
    assert code == 0
    assert [(row["run"], row["status"]) for row in rows] == [("second-run", "running"), ("first-run", "finished")]
    code, out, _ = run(capsys, "ls", "--root", str(root))
    assert "0.25 -> 0.75" in out and out.index("second-run") < out.index("first-run")
    assert "shoal train" in run(capsys, "ls", "--root", str(root / "nowhere"))[1]


def test_ls_tells_the_success_of_a_run_that_goes_on_from_its_evaluations(capsys, root):  # faults F6
    folder = RunFolder.create(root, "calc", "tiny_hybrid", "second-run")
    monitor = Monitor(folder.path, load_config(["monitor=quiet"]))
    monitor.evaluation(evaluation(0, 0.4))
    line = next(row for row in run(capsys, "ls", "--root", str(root))[1].splitlines() if "second-run" in row)
    assert line.split()[1:4] == ["running", "0", "0.40"]
    monitor.evaluation(evaluation(5, 0.6))
    monitor.close()
    assert "0.40 -> 0.60" in run(capsys, "ls", "--root", str(root))[1]


def test_show_tells_status_settings_curve_and_last_step(capsys, root):
    code, out, _ = run(capsys, "show", "first", "--root", str(root))
    assert code == 0
    for part in ("finished, step 2 of 2", "seed=9", "0.250", "0.750", "▃▆", "trainer/tok_s", "1 committed"):
        assert part in out, part
    code, out, _ = run(capsys, "show", "first", "--root", str(root), "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["status"], facts["step"], facts["changed"]["seed"]) == ("finished", 2, 9)
    assert [row["eval/success"] for row in facts["evaluations"]] == [0.25, 0.75]
    assert facts["metrics"]["reward/mean"] == 0.5 and facts["trajectories"] == {"committed": 1}


def test_show_prints_an_episode_word_by_word_with_the_authors_traceback(capsys, root):
    for key in ("1", "train/calc/0/0"):
        code, out, _ = run(capsys, "show", "latest", "--root", str(root), "--traj", key)
        assert code == 0
        for part in (
            "2 + 3?",
            "add(a=2, b=3)",
            "5 [red]",
            "five",
            "version 3 to 4",
            "version 4",
            "env_error",
            "reward none",
        ):
            assert part in out, part
        assert "env error in reward: boom" in out and 'File "mine.py", line 3, in reward' in out
        assert "\x1b" not in out and "\u202e" not in out and "\\x1b[31mred\\u202e" in out


def test_an_episode_as_json(capsys, root):
    _, out, _ = run(capsys, "show", "latest", "--root", str(root), "--traj", "1", "--json")
    facts = json.loads(out.splitlines()[-1])
    assert (facts["row"], facts["reward"], facts["versions"], facts["num_turns"]) == (1, None, [3, 4], 2)
    assert facts["error"]["traceback"].startswith("File") and len(facts["messages"]) == 4


def test_an_episode_is_shown_with_the_life_of_its_group(capsys, root):
    _, out, _ = run(capsys, "show", "latest", "--root", str(root), "--traj", "1", "--json")
    assert json.loads(out.splitlines()[-1])["lineage"] == []  # of a run without a ledger
    ledger = Ledger(RunFolder.resolve(root, "latest").ledger)
    ledger.issue([hostile_trajectory().task])
    assert ledger.lease("train/calc/0", "worker\x1b[31m-0", 9.0) == 1
    ledger.drop("train/calc/0", "env_error")
    ledger.close()
    _, out, _ = run(capsys, "show", "latest", "--root", str(root), "--traj", "1")
    line = next(line for line in out.splitlines() if line.startswith("lineage of its group: "))
    assert (
        line.startswith("lineage of its group: issued → leased to worker\\x1b[31m-0 (") and "dropped: env_error" in line
    )
    _, out, _ = run(capsys, "show", "latest", "--root", str(root), "--traj", "1", "--json")
    events = json.loads(out.splitlines()[-1])["lineage"]
    assert [(e["event"], e["attempt"]) for e in events] == [("issued", None), ("leased", 1), ("dropped", 1)]


def test_an_episode_that_is_not_there_is_bad_usage(capsys, root):
    code, _, err = run(capsys, "show", "latest", "--root", str(root), "--traj", "7")
    assert code == 2 and "there are 1" in err


def test_control_characters_become_visible():
    assert visible("a\x1b[0m\n\tb\x07\u202e\u200b") == "a\\x1b[0m\n\tb\\x07\\u202e\\u200b"


def test_a_reader_that_closes_its_pipe_early_is_no_error(root):
    command = f"{sys.executable} -m rl.cli show latest --root {root} --traj 1 | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stderr == "" and done.stdout.startswith("train/calc/0/0")


# --- sweeps, children, benchmarks


def test_a_sweep_runs_each_combination_as_a_run_of_its_own_and_fails_if_one_does(capsys, tmp_path):
    combinations = [["steps=1", f"seed={seed}"] for seed in (1, 2, 3)]
    configs = [load_config([*words, f"run.root={tmp_path}"]) for words in combinations]
    seen: list[list[str]] = []

    def train(arguments: Sequence[str]) -> int:
        seen.append(list(arguments))
        name = arguments[-1].removeprefix("run.name=")
        folder = RunFolder.create(tmp_path, "calc", "tiny", name)
        summary = {"success_before": 0.5, "success_after": 0.9, "ci95": [0.8, 0.95], "n": 7, "train_seconds": 3.2}
        folder.write_summary(summary)
        return 1 if "seed=2" in arguments else 0

    assert run_sweep(combinations, configs, run=train) == 1
    assert [words[:5] for words in seen] == [["-m", "rl.cli", "train", "steps=1", f"seed={s}"] for s in (1, 2, 3)]
    assert len({words[-1] for words in seen}) == 3
    out = capsys.readouterr().out
    assert out.count("0.900") == 3 and "seed=2" in out and out.count("0.800 to 0.950") == 3
    assert run_sweep(combinations[:1], configs[:1], run=lambda _: 0) == 0


def test_an_interrupted_run_ends_its_sweep(tmp_path):
    config = load_config([f"run.root={tmp_path}"])
    started: list[int] = []

    def train(_: Sequence[str]) -> int:
        started.append(1)
        return 130

    assert run_sweep([["seed=1"], ["seed=2"]], [config, config], run=train) == 130 and len(started) == 1


CHILD = """
import signal, sys, time
seen = []
signal.signal(signal.{name}, lambda *_: seen.append(1))
open(sys.argv[1], "w").close()
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
print(len(seen), file=open(sys.argv[1], "w"))
sys.exit(42)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 42)])
def test_a_signal_to_the_parents_group_reaches_the_child_once(tmp_path, name, code):
    script, ready = tmp_path / "child.py", tmp_path / "ready"
    script.write_text(CHILD.format(name=name))
    words = [str(script), str(ready)]
    parent_code = f"import sys; from rl.cli.child_process import run_python; sys.exit(run_python({words!r}))"
    parent = subprocess.Popen([sys.executable, "-c", parent_code], cwd=ROOT, start_new_session=True)
    deadline_s = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline_s and parent.poll() is None
        time.sleep(0.05)
    os.killpg(parent.pid, getattr(signal, name))  # as a terminal does
    assert parent.wait(30) == code
    assert ready.read_text() == "1\n"


def test_a_benchmark_is_found_in_the_checkout_and_gets_its_arguments(tmp_path, capfd):
    with pytest.raises(UsageError, match="source checkout"):
        run_benchmark("async", [], checkout=tmp_path)
    (tmp_path / "benchmarks").mkdir()
    script = "import sys\nfrom conf.schema import TrainConfig\nprint(sys.argv[1:])\nsys.exit(3)\n"
    (tmp_path / "benchmarks" / "engine.py").write_text(script)
    assert run_benchmark(None, [], checkout=tmp_path) == 0
    assert run_benchmark("engine", ["--json", "n=3"], checkout=tmp_path) == 3
    assert capfd.readouterr().out.split("\n")[:2] == ["engine", "['--json', 'n=3']"]
    with pytest.raises(UsageError, match="Did you mean 'engine'"):
        run_benchmark("engin", [], checkout=tmp_path)
