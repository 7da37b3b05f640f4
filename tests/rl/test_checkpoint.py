"""Checkpoints under kills at every boundary, power cuts, full disks and flipped bits."""

import errno
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.runs.checkpoint import (
    CheckpointError,
    FileSystem,
    list_checkpoints,
    load_latest,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)


def content(step: int) -> dict[str, Any]:
    rng = np.random.default_rng(step)
    weights = rng.normal(size=(4, 3)).astype(np.float32)
    return {
        "tensors": {
            "model": {"w": weights, "transposed": weights.T, "scalar": np.array(step, np.int64)},
            "optimizer": {"exp_avg": np.full(5, step, np.float64), "none": np.zeros((0, 2), np.float32)},
        },
        "state": {"rng": [step, [1, 2**63]], "best": 0.5, "nested": {"a": None}, "nan_free": True},
    }


def save(folder: Path, step: int, **options: Any) -> Path:
    return save_checkpoint(folder, step, **content(step), **options)


def assert_is(folder: Path, step: int) -> None:
    """The newest loadable checkpoint of `folder` is the one of `step`, bit for bit."""
    loaded, expected = load_latest(folder), content(step)
    assert (loaded.step, loaded.state, loaded.path.name) == (step, expected["state"], f"step-{step:06d}")
    assert loaded.tensors.keys() == expected["tensors"].keys()
    for stem, arrays in expected["tensors"].items():
        assert loaded.tensors[stem].keys() == arrays.keys()
        for name, array in arrays.items():
            back = loaded.tensors[stem][name]
            assert (back.dtype, back.shape) == (array.dtype, array.shape) and np.array_equal(back, array)


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, nothing cleans up."""


class DyingFileSystem(FileSystem):
    """Dies at call number `last`, a write in the middle; with `power_cut`, what was not fsynced is lost, too."""

    def __init__(self, last: int, *, power_cut: bool = False) -> None:
        self.calls: list[str] = []
        self._last = last
        self._power_cut = power_cut
        self._unsynced: set[Path] = set()

    def _call(self, name: str) -> bool:
        self.calls.append(name)
        return len(self.calls) == self._last

    def _die(self) -> None:
        if self._power_cut:
            for path in self._unsynced:
                if path.exists():
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise Killed

    def make_dir(self, path: Path) -> None:
        if self._call(f"make_dir {path.name}"):
            self._die()
        super().make_dir(path)

    def write(self, path: Path, content: bytes) -> None:
        self._unsynced.add(path)
        if self._call(f"write {path.name}"):
            super().write(path, content[: len(content) // 2])
            self._die()
        super().write(path, content)

    def sync(self, path: Path) -> None:
        if self._call(f"sync {path.name}"):
            self._die()
        super().sync(path)
        self._unsynced.discard(path)

    def rename(self, source: Path, target: Path) -> None:
        if self._call(f"rename {target.name}"):
            self._die()
        super().rename(source, target)
        # files in a renamed directory move with it
        self._unsynced = {target / p.name if p.parent == source else p for p in self._unsynced}

    def remove(self, path: Path) -> None:
        if self._call(f"remove {path.name}"):
            for number, file in enumerate(sorted(path.iterdir())):
                if number % 2:
                    file.unlink()
            self._die()
        super().remove(path)


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 100)
    assert path == tmp_path / "checkpoints" / "step-000100"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert_is(tmp_path / "checkpoints", 100)
    assert read_checkpoint(path).tensors["model"]["w"].flags.writeable


def test_the_manifest_is_written_last_and_all_is_synced_before_the_rename(tmp_path: Path) -> None:
    disk = DyingFileSystem(0)
    save(tmp_path, 7, disk=disk)
    names = [call.split()[1] if "step" not in call else "folder" for call in disk.calls]
    files = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
    assert names == ["folder", *(name for name in files for _ in "ws"), "folder", "folder", tmp_path.name]
    assert [call.split()[0] for call in disk.calls] == ["make_dir", *["write", "sync"] * 4, "sync", "rename", "sync"]


@pytest.mark.parametrize("power_cut", [False, True])
def test_death_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, power_cut: bool) -> None:
    whole = DyingFileSystem(0)
    for step in (1, 2, 3):
        save(tmp_path / "whole", step, keep=2, disk=whole if step == 3 else FileSystem())
    assert {call.split()[0] for call in whole.calls} == {"make_dir", "write", "sync", "rename", "remove"}
    loaded = []
    for last in range(1, len(whole.calls) + 1):
        folder = tmp_path / f"{power_cut}-{last}"
        save(folder, 1, keep=2)
        save(folder, 2, keep=2)
        with pytest.raises(Killed):
            save(folder, 3, keep=2, disk=DyingFileSystem(last, power_cut=power_cut))
        loaded.append(load_latest(folder).step)
        for path in list_checkpoints(folder):
            read_checkpoint(path)  # no damaged one is ever in sight
        assert_is(folder, loaded[-1])
        save(folder, 4, keep=2)  # a later save clears the remains
        assert_is(folder, 4)
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        assert len(list_checkpoints(folder)) == 2
    renamed = whole.calls.index("rename step-000003") + 1
    assert loaded == [2] * renamed + [3] * (len(whole.calls) - renamed)


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import numpy as np
from rl.runs.checkpoint import save_checkpoint
for step in range(1, 10**6):
    array = np.full(200_000, step, np.float32)
    save_checkpoint(Path(sys.argv[1]), step, tensors={"model": {"w": array}}, state={"step": step}, keep=2)
    print(step, flush=True)
"""


def test_sigkill_at_random_moments_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(0)
    for number in range(3):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", WRITER, str(folder), str(Path(__file__).parents[2])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        told = [process.stdout.readline()]
        time.sleep(rng.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        told += process.communicate(timeout=30)[0].split()
        loaded = load_latest(folder)
        assert loaded.step in (int(told[-1]), int(told[-1]) + 1)
        assert loaded.state == {"step": loaded.step}
        assert np.all(loaded.tensors["model"]["w"] == loaded.step)


def test_any_flipped_bit_is_noticed_or_harmless(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    rng = random.Random(0)
    for path in sorted(newest.iterdir()):
        original = path.read_bytes()
        for _ in range(25):
            damaged = bytearray(original)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                step = load_latest(tmp_path).step
            if step == 1:
                assert path.name in str(seen[0].message) or path.name == "manifest.json"
            else:  # a changed blank of the manifest
                assert path.name == "manifest.json"
                assert_is(tmp_path, 2)
        path.write_bytes(original)
    assert_is(tmp_path, 2)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "missing"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_loaded(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    bad = save(tmp_path, 2) / name
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(bad.read_bytes()[: -3 if damage == "truncate" else 0])
    with pytest.warns(RuntimeWarning, match=f"damaged checkpoint file .*step-000002/{name}.*falling back"):
        assert_is(tmp_path, 1)
    with pytest.raises(CheckpointError, match=name):
        read_checkpoint(bad.parent)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointError, match="format 1 and step 1 do not fit"):
        read_checkpoint(tmp_path / "step-000009")


def test_nothing_to_load_is_an_error_that_says_why(tmp_path: Path) -> None:
    for empty in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match="there is none"):
            load_latest(empty)
    (save(tmp_path, 1) / "state.json").write_text("{}")
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(CheckpointError, match=r"all are damaged: .*state\.json: its sha256 is not the manifest's"),
    ):
        load_latest(tmp_path)


class FullDisk(FileSystem):
    """Takes the first `bytes_left` bytes, half of a write included, then no more."""

    def __init__(self, bytes_left: int) -> None:
        self._bytes_left = bytes_left

    def write(self, path: Path, content: bytes) -> None:
        fits = content[: self._bytes_left]
        super().write(path, fits)
        self._bytes_left -= len(fits)
        if len(fits) < len(content):
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("bytes_left", [0, 100, 400, 800])
def test_a_full_disk_raises_and_leaves_the_old_checkpoint(tmp_path: Path, bytes_left: int) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"no space for the checkpoint .*step-000002"):
        save(tmp_path, 2, disk=FullDisk(bytes_left))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert_is(tmp_path, 1)


def test_state_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 1, tensors={}, state={"rng": object()})
    assert list(tmp_path.iterdir()) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1_000_000, 2_000_000):
        save(tmp_path, step, keep=3)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000100", "step-1000000", "step-2000000"]
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        prune_checkpoints(tmp_path, 0)


def test_pruning_never_deletes_the_newest_valid_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=4)
    for step in (3, 4):
        (tmp_path / f"step-{step:06d}" / "state.json").write_text("{}")
    prune_checkpoints(tmp_path, 2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000002", "step-000003", "step-000004"]
    with pytest.warns(RuntimeWarning):
        assert_is(tmp_path, 2)


def test_a_step_is_saved_once_unless_its_checkpoint_was_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    again = save_checkpoint(tmp_path, 1, tensors={}, state={"other": True})
    assert again == path
    assert_is(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"")
    save(tmp_path, 1)
    assert_is(tmp_path, 1)


def test_old_checkpoints_that_cannot_be_deleted_do_not_fail_a_save(tmp_path: Path) -> None:
    class Stuck(FileSystem):
        def remove(self, path: Path) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy")

    save(tmp_path, 1)
    with pytest.warns(RuntimeWarning, match="cannot delete old checkpoints"):
        save(tmp_path, 2, keep=1, disk=Stuck())
    assert_is(tmp_path, 2)
    shutil.rmtree(tmp_path)
