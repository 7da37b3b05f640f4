"""Snapshots that travel as a file: written once, mapped by every engine that sees the folder.

A file appears under its name only when it is whole. The manifest travels beside it, so whoever maps it checks the same
digests as of a snapshot that came as objects.
"""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from policy.sync.snapshot import PolicySnapshot, TensorSpec, WeightSyncError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSnapshot:
    """A `PolicySnapshot` without its tensors, which lie in a safetensors file.

    Example: stored = StoredSnapshot.write(snapshot, folder); stored.open().digest == snapshot.digest
    """

    version: int
    manifest: tuple[TensorSpec, ...]
    path: str

    @staticmethod
    def write(snapshot: PolicySnapshot, folder: Path, *, keep: int) -> "StoredSnapshot":
        """Write it; remove all others but the `keep - 1` versions before it.

        A worker that restarts loads the version that was pushed last, not the one just written. Newer versions and
        unfinished files are of an earlier life of the run, which went back to a checkpoint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"version-{snapshot.version:08d}.safetensors"
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file(in_order(snapshot.tensors), unfinished)
        unfinished.replace(path)
        kept = [each for each in sorted(folder.glob("version-*.safetensors")) if each <= path][-keep:]
        for old in set(folder.glob("version-*")).difference(kept):
            old.unlink()  # engines that mapped it keep it
        return StoredSnapshot(version=snapshot.version, manifest=snapshot.manifest, path=str(path))

    def open(self) -> PolicySnapshot:
        """Map the file; nothing is read yet. Raises `WeightSyncError` where it is gone or is no such file."""
        try:
            tensors = map_tensors(Path(self.path))
        except (OSError, ValueError, KeyError) as error:
            raise WeightSyncError(f"version {self.version}: {self.path} cannot be mapped: {error!r}") from error
        return PolicySnapshot(version=self.version, manifest=self.manifest, tensors=tensors, path=self.path)


def in_order(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """In C order, as safetensors writes whatever it is given: of a transposed array it would keep the wrong values."""
    return {name: np.asarray(array, order="C") for name, array in tensors.items()}


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read-only arrays over a safetensors file (8 bytes of header length, header in JSON, data)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r", offset=8 + length)
    return {
        name: np.asarray(data[slice(*entry["data_offsets"])]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in header.items()
    }
