"""shoal doctor: what it finds on this machine, and what it says where something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rl.cli.doctor.doctor import all_checks, exit_code
from rl.cli.doctor.doctor_checks import (
    Check,
    port_check,
    ray_check,
    smoke_check,
    version_check,
    wandb_check,
    write_check,
)
from rl.cli.main import main


@pytest.mark.slow
def test_the_quick_checks_of_this_machine_are_told_as_json(tmp_path, capsys):
    code = main(["doctor", "--no-smoke", "--json", "--root", str(tmp_path / "runs")])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out.splitlines()[-1])["checks"]}
    assert code == (3 if any(check["status"] == "fail" for check in checks.values()) else 0)
    assert {"python", "torch", "ray", "cores", "disk", "write access", "ports", "wandb", "engines"} <= checks.keys()
    assert checks["torch"]["status"] == "ok" and "tested 2." in checks["torch"]["found"]
    assert all(bool(check["fix"]) == (check["status"] != "ok") for check in checks.values())
    assert not (tmp_path / "runs").exists() and list(tmp_path.iterdir()) == []  # it leaves nothing behind


@pytest.mark.parametrize(
    ("requirement", "status", "fix"),
    [
        ("pytest>=8", "ok", ""),
        ("pytest>=1,<2", "warn", "pip install 'pytest<2,>=1'"),
        ("no-such-package-here>=1", "fail", "pip install 'no-such-package-here>=1'"),
    ],
)
def test_a_version_is_held_against_its_range(requirement, status, fix):
    check = version_check(requirement, {"pytest": "9.2.0"})
    assert (check.status, check.fix) == (status, fix)


def test_a_folder_that_cannot_be_written_is_a_failure_and_ends_with_3(tmp_path):
    blocked = Path("/proc/runs") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        blocked.mkdir(mode=0o500)
    check = write_check(blocked)
    assert check.status == "fail" and check.fix == "shoal train run.root=DIR"
    assert exit_code([check]) == 3 and exit_code([Check(name="x", status="warn", found="", fix="y")]) == 0


def process(proc: Path, pid: int, command: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes(command.replace(" ", "\0").encode())


def test_a_cluster_whose_driver_is_gone_is_named_with_the_command_that_ends_it(tmp_path):
    process(
        tmp_path, 12, "/x/raylet --raylet_socket_name=/tmp/ray/session_2026-11-23_21-39-31_826030_11/sockets/raylet"
    )
    process(tmp_path, 13, "/x/gcs_server --log_dir=/tmp/ray/session_2026-11-23_21-39-31_826030_11/logs")
    check = ray_check(tmp_path, proc=tmp_path)
    assert check.status == "warn" and check.fix == "kill 12 13"
    process(tmp_path, 11, "python train.py")
    assert ray_check(tmp_path, proc=tmp_path).status == "ok"


def test_a_shell_that_only_names_a_session_is_not_taken_for_a_cluster(tmp_path):
    process(tmp_path, 12, "/usr/bin/less /tmp/ray/session_2026-11-23_21-39-31_826030_11/logs/raylet.out")
    assert ray_check(tmp_path, proc=tmp_path).status == "ok"


def test_wandb_online_without_a_key_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert wandb_check().status == "ok"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert wandb_check().fix == "wandb login"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_check().status == "ok"


def test_processes_here_reach_each_other():
    assert port_check().status == "ok"


def test_a_training_that_fails_is_told_with_its_last_words():
    def broken(*_: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", "import sys; sys.exit('no luck')"], capture_output=True, text=True)

    check = smoke_check(run=broken)
    assert check.status == "fail" and check.found == "no luck" and check.fix.startswith("shoal train experiment=smoke")


@pytest.mark.slow
def test_nothing_is_trained_where_something_failed_already():
    checks = list(all_checks(Path("/proc/runs"), smoke=True))
    assert "smoke run" not in {check.name for check in checks}


@pytest.mark.slow
def test_the_smoke_run_trains_here_and_leaves_nothing():
    assert smoke_check() == Check(
        name="smoke run", status="ok", found="rolled out, learned, evaluated, wrote a checkpoint"
    )
