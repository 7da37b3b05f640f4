"""What a run makes of bad input, failing environments, refused weights and full disks."""

import dataclasses
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.message import Message
from envs.tasks.task_source import make_task
from rl.cluster.learner_service import build_learner
from rl.loop.tasks import task_entries
from rl.monitor.json_lines import JsonLines
from rl.runs.run_folder import RunFolder
from rollout.record.ledger import read_audit
from rollout.record.recorder import Recorder, StoredTrajectory
from rollout.record.trajectory import StopReason, Turn
from rollout.schedule.scheduler import GroupsFailing
from tests.envs.failing_envs import answers, answers_longer_for_larger_numbers
from tests.rl.failing_runs import LOOSE, cli, lines_of, one_env, playing, rows_of
from tests.rl.training import SMALL, Run, small_config, train_in_process
from tests.rollout.trajectories import make_group, make_trajectory

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# --- bad usage: nothing is started, nothing is written


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["env=calculater"], "unknown env 'calculater'. Did you mean 'calculator'?"),
        (["env=Calculater-v0"], "no environment 'Calculater-v0'; did you mean 'Calculator-v0'?"),
        (["env=mix", "env.mix.calculator.id=ShopBD-v0"], "did you mean 'ShopDB-v0'?"),
        (["policy=tiny_hybird"], "unknown policy 'tiny_hybird'. Did you mean 'tiny_hybrid'?"),
        (["rollout.max_stalness=1"], "Did you mean 'rollout.max_staleness'?"),
        (["+rollout.group_sizes=4"], "Did you mean 'rollout.group_size'?"),
        (["env=tests.envs.failing_envs:Fragil"], "did you mean 'Fragile'?"),
        (["env=tests.envs.small_envs:NoTask"], "NoTask defines no task(self, rng, level)"),
        (["env=tests.envs.small_envs:NoReward"], "NoReward defines no reward(self, answer)"),
        (["env=tests.envs.small_envs:WrongTaskSignature"], "must take task(self, rng, level)"),
        (["env=tests.envs.small_envs:UntypedTool"], "where"),
        (["env=tests.envs.small_envs:NotAnEnvironment"], "is not a subclass of envs.base.AgentEnv"),
        (["env=tests.envs.failing_envs:Fragile"], "env.kwargs.where is missing"),
        (
            ["env=tests.envs.failing_envs:Indifferent", "env.level=1"],
            "env.level=1 is out of range: .* levels 0 to 0",
        ),
        (["learner.publish_every=9"], "learner.publish_every=9 would deadlock"),
    ],
)
def test_bad_usage_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(capsys, "train", "policy.init=random", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("shoal: ") and (told in err or re.search(told, err))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_starts_neither_ray_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from rl.cli.main import main;"
        "code = main(['train', 'env=mix', 'policy.init=random', 'dry_run=true']);"
        "sys.exit(code or ('ray' in sys.modules) + 2 * ('torch' in sys.modules))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "dry_run: true" in done.stdout
    assert list(tmp_path.iterdir()) == []


# --- environments that fail now and then

FAULTS = {
    "reset-raises": (StopReason.ENV_ERROR, "reset", "KeyError: 'missing shelf'"),
    "reset-exits": (StopReason.ENV_ERROR, "reset", "SystemExit: 3"),
    "reset-hangs": (StopReason.ENV_ERROR, "reset", "timed out after 0.3 s"),
    "step-raises": (StopReason.ENV_ERROR, "step", "KeyError: 'missing shelf'"),
    "step-exits": (StopReason.ENV_ERROR, "step", "SystemExit: 3"),
    "step-hangs": (StopReason.ENV_ERROR, "step", "timed out after 0.3 s"),
    "reward-raises": (StopReason.ENV_ERROR, "reward", "KeyError: 'missing shelf'"),
    "reward-exits": (StopReason.ENV_ERROR, "reward", "SystemExit: 3"),
    "reward-hangs": (StopReason.ENV_ERROR, "reward", "timed out after 0.3 s"),
    "reward-nan": (StopReason.ENV_ERROR, "reward", "reward() returned reward = nan, not a finite number"),
    "reward-none": (StopReason.ENV_ERROR, "reward", "reward() returned reward = None, not a finite number"),
}
STEPS, GROUPS, MEMBERS = 20, 6, 4


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A mix of environments, each with its own fault in a quarter of its problems; one answer in six crashes too."""
    mix = ", ".join(
        f"{fault}: {{id: 'tests.envs.failing_envs:Fragile', kwargs: {{where: {fault.split('-')[0]}, "
        f"how: '{fault.split('-')[1]}'}}}}"  # quoted: a bare nan is a number
        for fault in FAULTS
    )
    config = small_config(
        tmp_path_factory.mktemp("fragile"), "env.name=fragile", f"env.mix={{{mix}}}", f"steps={STEPS}",
        f"rollout.groups_per_step={GROUPS}", f"rollout.group_size={MEMBERS}", "env.reset_timeout_s=0.3",
        "env.step_timeout_s=0.3", "env.reward_timeout_s=0.3", LOOSE,
    )  # fmt: skip
    return train_in_process(config, build=playing(answers("yes", "yes", "no", "no", "no", "crash")))


def has_failed(row: StoredTrajectory) -> bool:
    return row.trajectory.error is not None


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_an_environment_is_a_recorded_episode(fragile: Run, fault: str) -> None:
    reason, where, message = FAULTS[fault]
    failed = [row.trajectory for row in rows_of(fragile.folder) if row.trajectory.task.env_name == fault]
    found = [t for t in failed if t.error and (t.error.where, t.error.message) == (where, message)]
    assert found
    for trajectory in found:
        assert (trajectory.stop_reason, trajectory.reward) == (reason, None)
        assert trajectory.error is not None and trajectory.error.kind == "env"
        if fault.endswith(("raises", "exits")):
            assert "tests/envs/failing_envs.py" in trajectory.error.traceback
            assert "envs/pool/pool.py" not in trajectory.error.traceback


def test_failed_episodes_are_never_trained_on_and_the_others_of_their_group_are(fragile: Run) -> None:
    rows = rows_of(fragile.folder)
    failed = [row for row in rows if has_failed(row)]
    assert {row.status for row in failed} <= {"dropped", "committed"}  # committed: alive when the run ended
    assert all(row.advantage is None and row.trajectory.reward is None for row in failed)
    assert all(row.trajectory.reward is not None for row in rows if row.status == "consumed")
    beside = {row.trajectory.group_id for row in failed if row.step} & {
        row.trajectory.group_id for row in rows if row.status == "consumed"
    }
    assert beside, "no group was trained on without its failed members"
    assert all(row.cause.startswith("env_error: KeyError") for row in failed if row.step)


def test_the_books_balance_after_drops_and_every_step_is_whole(fragile: Run) -> None:
    audit: Any = fragile.audit
    assert audit["balanced"] is True
    assert audit["consumed"] == STEPS * GROUPS
    assert list(audit["dropped"]) == ["env_error"]
    assert audit["issued"] == audit["consumed"] + audit["dropped"]["env_error"]
    dropped = lines_of(fragile.folder.events, "dropped")
    assert len(dropped) == audit["dropped"]["env_error"] == fragile.controller.scheduler.counters.dropped
    assert all(event["reason"] == "env_error" and event["group"] in event["error"] for event in dropped)
    stored = Counter(row.status for row in rows_of(fragile.folder) if not row.step)
    assert stored == {"dropped": MEMBERS * len(dropped)}


def test_a_mix_is_trained_and_its_rewards_are_told_apart(fragile: Run) -> None:
    steps = lines_of(fragile.folder.metrics, "step")
    assert len(steps) == STEPS
    rewards = {name: [row[f"reward/{name}/mean"] for row in steps if f"reward/{name}/mean" in row] for name in FAULTS}
    for name, values in rewards.items():
        trained = [
            row.trajectory.reward or 0.0
            for row in rows_of(fragile.folder)
            if row.status == "consumed" and row.trajectory.task.env_name == name
        ]
        assert trained and min(values) <= np.mean(trained) <= max(values), name
    assert 0 < max(row["env/error_ratio"] for row in steps) < 1
    assert max(row["group/frac_mixed"] for row in steps) > 0
    assert lines_of(fragile.folder.events, "no_signal") == []


def test_show_prints_the_authors_traceback_of_a_failed_episode(
    fragile: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(r for r in rows_of(fragile.folder) if has_failed(r) and r.trajectory.task.env_name == "step-exits")
    code, out, _ = cli(capsys, "show", str(fragile.folder.path), "--traj", str(row.row))
    assert code == 0
    for part in ("env error in step: SystemExit: 3", 'failing_envs.py", line', "raise SystemExit(3)", "reward none"):
        assert part in out
    code, out, _ = cli(capsys, "show", str(fragile.folder.path), "--traj", row.trajectory.trajectory_id, "--json")
    assert "SystemExit: 3" in json.loads(out.splitlines()[-1])["error"]["traceback"]


def test_show_prints_an_episode_that_ended_before_its_first_token_and_escapes_what_failed_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(tmp_path, "x", "y", "silent")
    empty = Turn(start=4, end=4, message=Message.assistant(""), finish_reason="deadline")
    silent = dataclasses.replace(make_trajectory(None, stop_reason=StopReason.ENV_ERROR), turns=(empty,))
    recorder = Recorder(folder.trajectories)
    recorder.write([make_group([silent])])
    recorder.mark_dropped(["g"], "env_error: \x1b[31mred")
    recorder.close()
    code, out, _ = cli(capsys, "show", str(folder.path), "--traj", "1")
    assert code == 0 and "0 tokens by policy version none, deadline" in out
    assert "\\x1b[31mred" in out and "\x1b" not in out


# --- runs that fail


def failed_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[RunFolder, str]:
    """A run that must fail as failed runs do: exit code 1, one line, a folder that says why, the traceback in a log."""
    code, out, err = cli(capsys, "train", *SMALL, f"run.root={tmp_path / 'runs'}", *words)
    assert (code, out) == (1, ""), err
    assert err.count("\n") == 1 and err.startswith("shoal: run ")
    folder = RunFolder.resolve(tmp_path / "runs", "latest")
    assert str(folder.path) in err
    state = folder.state()
    assert state.status == "failed"
    assert " ".join(state.error.split()) in err
    assert "Traceback (most recent call last)" in (folder.logs / "driver.log").read_text()
    assert read_audit(folder.ledger)["balanced"] is True
    assert not folder.summary.exists()
    return folder, err


@pytest.mark.parametrize(("where", "how"), [("reset", "raises"), ("reset", "hangs"), ("reward", "none")])
def test_an_environment_that_always_fails_ends_the_run_and_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, how: str
) -> None:
    words = one_env("Hopeless", where=where, how=how)
    folder, err = failed_run(
        capsys, tmp_path, "steps=50", "env.reset_timeout_s=0.3", "rollout.max_turn_tokens=2", *words
    )
    found = re.search(
        r"21 of the last 21 groups could not be trained on, the last for env_error: (\S+): (.*) \(in", err
    )
    assert found and found[2] == FAULTS[f"{where}-{how}"][2]
    audit = read_audit(folder.ledger)
    assert audit["consumed"] == 0 and 21 <= audit["dropped"]["env_error"] < 40
    assert lines_of(folder.events, "run_failed")[0]["error"] == folder.state().error
    code, out, _ = cli(capsys, "show", str(folder.path), "--traj", found[1])
    assert code == 0 and f"env error in {where}: {found[2]}" in out


def test_a_prompt_that_never_fits_ends_the_run_and_names_the_setting(tmp_path: Path) -> None:
    config = small_config(tmp_path, *one_env("Wordy"), "steps=5", LOOSE)
    with pytest.raises(GroupsFailing, match=r"no_tokens: train/wordy/\d+/0: truncated_tokens .*max_model_tokens"):
        train_in_process(config, build=playing(answers("yes")))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learner.loss.advantage=tests.envs.failing_envs:broken_advantage"], "TypeError: unsupported operand"),
        (one_env("OneProblem"), "only 1 distinct problems"),
    ],
)
def test_a_failed_run_tells_its_cause_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    folder, err = failed_run(capsys, tmp_path, "steps=3", "rollout.max_turn_tokens=2", *words)
    assert told in err
    code, out, _ = cli(capsys, "show", str(folder.path))
    assert code == 0 and told in out and "failed, step 0 of 3" in out


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writes beyond `size_bytes` of any file fail in this process, as on a disk that fills up."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_folder_that_cannot_be_written_fails_the_run_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    roots = {f"{tmp_path}/file/runs": "Not a directory", "/sys/shoal-runs": "denied|not permitted|Read-only"}
    for root, why in roots.items():
        code, out, err = cli(capsys, "train", *SMALL, f"run.root={root}")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert re.match(rf"shoal: cannot write the run folder {root}/\S+: .*({why})", err)
    with file_size_limit(1000):  # room for run.json, not for config.yaml
        code, _, err = cli(capsys, "train", *SMALL, f"run.root={tmp_path / 'runs'}")
    assert code == 1 and re.match(r"shoal: cannot write the run folder \S+/config.yaml: File too large\n", err)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_disk_that_fills_up_fails_the_run_which_resumes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["steps=1000", "run.checkpoint_every=3", "rollout.max_turn_tokens=2"]
    with file_size_limit(1_000_000):  # the ledger's log is there first, after a checkpoint
        folder, err = failed_run(capsys, tmp_path, *words)
    assert re.search(r"cannot (write|use) .*(trajectories\.db|ledger)", err)
    stopped_at = folder.state().step
    assert 3 <= stopped_at < 1000
    assert [p.name for p in folder.path.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"] == []
    for file in (folder.metrics, folder.events, folder.spans):
        assert all(json.loads(line) for line in file.read_text().splitlines())
    code, _, err = cli(capsys, "resume", str(folder.path), f"steps={stopped_at + 3}")
    assert (code, err) == (0, "")
    audit = read_audit(folder.ledger)
    assert audit["balanced"] is True and audit["consumed"] == 2 * (stopped_at + 3)
    consumed = [r.trajectory.trajectory_id for r in rows_of(folder) if r.status == "consumed" and r.step]
    assert len(consumed) == len(set(consumed)) == 8 * (stopped_at + 3)


def test_a_metrics_file_that_cannot_grow_is_named(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    with file_size_limit(1000), pytest.raises(OSError, match=r"File too large: .*/metrics\.jsonl"):
        file.append({"text": "x" * 2000})


# --- nothing to learn


def test_a_constant_reward_moves_no_weight_and_is_told_once(tmp_path: Path) -> None:
    config = small_config(tmp_path, *one_env("Indifferent"), "steps=13", "learner.optimizer.weight_decay=0.1", LOOSE)
    run = train_in_process(config, build=playing(answers("yes", "no")))
    initial = build_learner(config).snapshot().tensors
    assert all(np.array_equal(run.weights[name], initial[name]) for name in initial)
    steps = lines_of(run.folder.metrics, "step")
    assert [row["group/frac_mixed"] for row in steps] == [0.0] * 13
    assert not any("loss/policy" in row for row in steps)
    events = lines_of(run.folder.events, "no_signal")
    assert [(e["step"], e["steps"], e["all_good"], e["all_bad"]) for e in events] == [(10, 10, 0.0, 1.0)]


# --- slow episodes


def test_slow_tasks_are_trained_on_as_often_as_they_are_dispatched(tmp_path: Path) -> None:
    config = small_config(tmp_path, "steps=12", *one_env("Slow", straggler_seed=0), LOOSE)
    straggler = make_task(task_entries(config), split="train", seed=config.seed, counter=5)
    config = dataclasses.replace(config, env=dataclasses.replace(config.env, kwargs={"straggler_seed": straggler.seed}))
    run = train_in_process(config, build=playing(answers_longer_for_larger_numbers))
    rows = rows_of(run.folder)
    by_group = {row.trajectory.group_id: row for row in rows}
    # the first 24 tasks, no other: a slow one was neither passed over nor replaced by a quick one
    assert set(by_group) == {f"train/slow/{counter}" for counter in range(24)}
    assert run.audit["consumed"] == run.audit["issued"] == 24 and run.audit["dropped"] == {}
    late = by_group[straggler.task_id]
    assert late.trajectory.seconds > 0.45
    assert late.step is not None and late.step - 1 - late.trajectory.min_policy_version <= 2
    others = [row.trajectory.seconds for row in rows if row.trajectory.group_id != straggler.task_id]
    assert late.trajectory.seconds > 5 * np.median(others)
    lengths = {row.trajectory.num_sampled_tokens for row in rows}
    assert len(lengths) > 5, "lengths do not differ"
    last = lines_of(run.folder.metrics, "step")[-1]
    for name in ("length", "reward", "seconds"):
        assert math.isclose(last[f"selection_bias/{name}"], 1.0, rel_tol=1e-6)
