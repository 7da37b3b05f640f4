"""Snapshots that travel as files."""

from pathlib import Path

import numpy as np
import pytest

from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from policy.sync.weight_files import StoredSnapshot

TENSORS = {
    "b.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(4.5, np.float32),
    "c.t": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.zeros((0, 2), np.float32),
}
EXPECTED = {name: (array.shape, "float32") for name, array in TENSORS.items()}


def stored(folder: Path, version: int = 3, keep: int = 3) -> StoredSnapshot:
    return StoredSnapshot.write(PolicySnapshot.create(version, TENSORS), folder, keep=keep)


def test_a_stored_snapshot_is_mapped_as_it_was_and_passes_the_same_checks(tmp_path: Path) -> None:
    snapshot = stored(tmp_path).open()
    snapshot.verify(EXPECTED)
    assert snapshot.digest == PolicySnapshot.create(3, TENSORS).digest
    assert {name: array.tolist() for name, array in snapshot.tensors.items()} == {
        name: array.tolist() for name, array in TENSORS.items()
    }
    assert not any(array.flags.writeable for array in snapshot.tensors.values())


def test_one_changed_byte_of_a_file_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    found = stored(tmp_path)
    content = bytearray(Path(found.path).read_bytes())
    at = content.index(np.float32(5).tobytes())
    content[at + 3] ^= 1
    Path(found.path).write_bytes(content)
    with pytest.raises(WeightSyncError, match="does not match its digest"):
        found.open().verify(EXPECTED)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x" * 20)])
def test_a_file_that_is_gone_or_is_no_such_file_is_a_weight_sync_error(tmp_path: Path, damage) -> None:
    found = stored(tmp_path)
    damage(Path(found.path))
    with pytest.raises(WeightSyncError, match="version 3"):
        found.open()


def versions_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("version-").removesuffix(".safetensors")) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize(("keep", "left"), [(3, [9, 10, 11]), (4, [2, 9, 10, 11]), (1, [11])])
def test_as_many_newest_versions_stay_as_asked_and_a_mapped_older_one_can_still_be_read(
    tmp_path: Path, keep: int, left: list[int]
) -> None:
    first = stored(tmp_path, 1, keep).open()
    for version in (2, 9, 10, 11):
        stored(tmp_path, version, keep)
    assert versions_in(tmp_path) == left
    first.verify(EXPECTED)


def test_an_older_version_written_after_newer_ones_stays_and_what_an_earlier_life_left_goes(tmp_path: Path) -> None:
    for version in (10, 11, 12, 13):
        stored(tmp_path, version)
    (tmp_path / "version-00000014.4711").write_bytes(b"half of it")
    found = stored(tmp_path, 10)
    found.open().verify(EXPECTED)
    assert versions_in(tmp_path) == [10]
