"""A run's folder: how it is named, found and made, and what it says about the run's life."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rl.runs.run_folder import RunFolder, RunFolderError, RunStatus, list_runs, slug, write_atomic
from tests.fakes import FakeClock


def create(root: Path, name: str = "") -> RunFolder:
    return RunFolder.create(root, "calculator", "tiny_hybrid", name)


def test_a_new_folder_has_a_telling_name_and_belongs_to_its_user(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs", "my Env/../x", "tiny_hybrid", clock=lambda: 1795446127.0)
    assert re.fullmatch(r"20261123-150207-my-env-x-tiny-hybrid-[0-9a-f]{4}", folder.name)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert folder.path.parent == tmp_path / "runs"
    assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoints", "logs", "run.json"]
    state = folder.state()
    assert (state.status, state.step, state.pid) == (RunStatus.RUNNING, 0, os.getpid())


def test_two_runs_of_the_same_second_do_not_share_a_folder(tmp_path: Path) -> None:
    clock = FakeClock()
    names = {RunFolder.create(tmp_path, "e", "p", clock=clock).name for _ in range(20)}
    assert len(names) == 20


def test_latest_points_to_the_newest_run(tmp_path: Path) -> None:
    for name in ("first", "second"):
        create(tmp_path, name)
        assert os.readlink(tmp_path / "latest") == name
        assert RunFolder.resolve(tmp_path, "latest").name == name
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "Upper", "under_score", "dot.", "latest", "ü", "a\n"])
def test_bad_names_are_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="made of a-z, 0-9 and '-'"):
        create(tmp_path / "runs", name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    create(tmp_path, "mine").write_config("seed: 1\n")
    with pytest.raises(RunFolderError, match=r".*/mine exists already"):
        create(tmp_path, "mine")
    assert (tmp_path / "mine" / "config.yaml").read_text() == "seed: 1\n"


def test_a_root_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*/file/runs/mine: Not a directory"):
        create(tmp_path / "file" / "runs", "mine")


@contextmanager
def no_large_files() -> Iterator[None]:
    """Every write fails with EFBIG, in this process, as on a disk without room."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_space_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with no_large_files(), pytest.raises(RunFolderError) as failure:
        create(tmp_path, "mine")
    assert re.search(r"cannot write .*/mine/run\.json: File too large", str(failure.value))
    assert list(tmp_path.iterdir()) == []

    folder = create(tmp_path, "mine")
    folder.write_summary({"success": 0.5})
    with no_large_files(), pytest.raises(RunFolderError, match=r"summary\.json"):
        folder.write_summary({"success": 0.9})
    assert json.loads(folder.summary.read_text()) == {"success": 0.5}
    assert sorted(p.name for p in folder.path.iterdir()) == ["checkpoints", "logs", "run.json", "summary.json"]


def test_heartbeats_and_the_end_are_written_to_run_json(tmp_path: Path) -> None:
    clock = FakeClock()
    folder = RunFolder.create(tmp_path, "e", "p", clock=clock)
    clock.advance(5)
    folder.heartbeat(step=7, clock=clock)
    state = folder.state()
    assert (state.step, state.started_s, state.heartbeat_s, state.status) == (7, 0.0, 5.0, RunStatus.RUNNING)
    folder.finish("failed", error="RuntimeError: loss is NaN")
    state = folder.state()
    assert (state.status, state.step, state.error) == (RunStatus.FAILED, 7, "RuntimeError: loss is NaN")
    with pytest.raises(ValueError, match="'done' is not a valid RunStatus"):
        folder.finish("done")


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    before = path.open()
    write_atomic(path, "new")
    assert (before.read(), path.read_text()) == ("old", "new")
    assert list(tmp_path.iterdir()) == [path]


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from rl.runs.run_folder import RunFolder
RunFolder.create(sys.argv[1], "e", "p", "child")
print("made", flush=True)
sys.stdin.read()
"""


@contextmanager
def child_run(root: Path) -> Iterator["subprocess.Popen[str]"]:
    """A run named "child" in another process."""
    command = [sys.executable, "-c", CHILD, str(root), str(Path(__file__).parents[2])]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "made\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_a_run_whose_process_is_gone_is_crashed_and_can_be_taken_over(tmp_path: Path) -> None:
    with child_run(tmp_path) as process:
        folder = RunFolder.resolve(tmp_path, "child")
        assert folder.state().status == RunStatus.RUNNING
        with pytest.raises(RunFolderError, match=f"still running, as process {process.pid}"):
            folder.begin()
    assert folder.state().status == RunStatus.CRASHED
    assert [(run.name, run.state and run.state.status) for run in list_runs(tmp_path)] == [("child", RunStatus.CRASHED)]
    folder.begin(step=3)
    assert (folder.state().status, folder.state().step) == (RunStatus.RUNNING, 3)


def test_another_process_under_the_same_number_does_not_pass_for_the_run(tmp_path: Path) -> None:
    folder = create(tmp_path, "mine")
    values = json.loads(folder.run_json.read_text())
    folder.run_json.write_text(json.dumps(values | {"pid_started": "12"}))
    assert folder.state().status == RunStatus.CRASHED


def test_a_run_on_another_machine_is_judged_by_its_heartbeat(tmp_path: Path) -> None:
    clock = FakeClock()
    folder = RunFolder.create(tmp_path, "e", "p", clock=clock)
    values = json.loads(folder.run_json.read_text())
    folder.run_json.write_text(json.dumps(values | {"host": "elsewhere"}))
    clock.advance(100)
    assert folder.state(clock=clock).status == RunStatus.RUNNING
    clock.advance(100)
    assert folder.state(clock=clock).status == RunStatus.CRASHED


def test_resolve_takes_an_id_a_unique_prefix_and_a_path(tmp_path: Path) -> None:
    for name in ("20261123-a", "20261124-b", "20261124-bc"):
        create(tmp_path, name)
    for run, name in [
        ("20261124-b", "20261124-b"),  # an id, though it begins another
        ("20261123", "20261123-a"),
        (str(tmp_path / "20261124-bc"), "20261124-bc"),
        (str(tmp_path / "latest"), "20261124-bc"),
    ]:
        assert RunFolder.resolve(tmp_path, run).name == name


def test_resolve_says_what_there_is_instead(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is none in"):
        RunFolder.resolve(tmp_path, "x")
    with pytest.raises(RunFolderError, match="no run at"):
        RunFolder.resolve(tmp_path, "latest")
    for name in ("alpha-one", "alpha-two", "beta"):
        create(tmp_path, name)
    with pytest.raises(RunFolderError, match=r"'alpha' begins 2 runs in .*: alpha-one, alpha-two"):
        RunFolder.resolve(tmp_path, "alpha")
    with pytest.raises(RunFolderError, match=r"no run 'bata' in .*; the nearest of 3 is 'beta'"):
        RunFolder.resolve(tmp_path, "bata")
    for run in ("..", "", str(tmp_path), "../beta"):
        with pytest.raises(RunFolderError):
            RunFolder.resolve(tmp_path, run)


def test_runs_are_listed_newest_first_also_where_a_file_is_broken(tmp_path: Path) -> None:
    clock = FakeClock()
    for name in ("old", "new", "broken"):
        clock.advance(1)
        RunFolder.create(tmp_path, "e", "p", name, clock=clock)
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    RunFolder.resolve(tmp_path, "old").write_summary({"success_after": 0.9})
    runs = list_runs(tmp_path)
    assert [run.name for run in runs] == ["new", "old", "broken"]
    assert runs[1].summary == {"success_after": 0.9} and runs[0].summary == {}
    assert runs[2].state is None and "cannot read" in runs[2].fault
    assert list_runs(tmp_path / "missing") == []


def test_the_manifest_says_what_made_the_run(tmp_path: Path) -> None:
    folder = create(tmp_path)
    facts = {"Calculator-v0": {"version": "1", "digest": "ab"}}
    folder.write_manifest(seed=3, environments=facts, argv=["shoal", "train", "seed=3"])
    manifest = json.loads(folder.manifest.read_text())
    assert (manifest["seed"], manifest["environments"], manifest["argv"][1]) == (3, facts, "train")
    assert manifest["packages"]["numpy"] and manifest["python"].startswith("3.") and manifest["cores"] >= 1
    git = manifest["git"]
    assert git is None or (re.fullmatch("[0-9a-f]{40}", git["commit"]) and isinstance(git["dirty"], bool))


def test_writing_a_manifest_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from rl.runs.run_folder import RunFolder\n"
        "RunFolder.create(sys.argv[1], 'e', 'p').write_manifest(seed=1, environments={})\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'wandb') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parents[2])]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"


def test_slugs_hold_only_plain_characters() -> None:
    assert [slug(text) for text in ("Tiny_Hybrid", "a  b/..", "--x--", "Ünï", "")] == [
        "tiny-hybrid",
        "a-b",
        "x",
        "n",
        "run",
    ]
