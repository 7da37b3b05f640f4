"""Checkpoints that a kill at any moment, a full disk or a flipped bit cannot spoil unnoticed.

    checkpoints/step-000100/   model.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a directory of another name: files first, each fsynced, the manifest {file: sha256} last,
then the directory is fsynced, renamed, and its parent fsynced. So a directory named step-* was complete once, and what
happened to it later shows in its hashes. No pickle: weights are safetensors, everything else is JSON.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{6,})")


class CheckpointError(RuntimeError):
    """Raised when a checkpoint cannot be written or none can be loaded; the message names the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int
    tensors: dict[str, dict[str, np.ndarray]]
    """File stem ("model") -> tensor name -> array."""
    state: dict[str, Any]
    """JSON: everything that is not an array."""
    path: Path


class FileSystem:
    """The calls that change the disk; tests pass one that fails between any two of them."""

    def make_dir(self, path: Path) -> None:
        path.mkdir(parents=True)

    def write(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)

    def sync(self, path: Path) -> None:
        """fsync a file or a directory."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


_DISK = FileSystem()


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping[str, Any],
    keep: int = 3,
    disk: FileSystem = _DISK,
) -> Path:
    """Write `folder/step-<step>` and keep the newest `keep`; returns its path.

    A valid checkpoint of that step is left as it is: a run reaches a step once. Raises `CheckpointError`, the older
    checkpoints untouched, where the disk is full or not writable or `state` is not JSON.
    """
    target = folder / f"step-{step:06d}"
    if target.exists() and _fault(target) is None:
        return target
    partial = folder / f".tmp-{target.name}-{secrets.token_hex(4)}"
    try:
        files = _pack(step, tensors, state)
        disk.make_dir(partial)
        for name, content in files.items():
            disk.write(partial / name, content)
            disk.sync(partial / name)
        disk.sync(partial)
        if target.exists():  # a damaged one of the same step
            _discard(target, disk)
        disk.rename(partial, target)
        disk.sync(folder)
    except (OSError, TypeError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        cause = "no space for the checkpoint" if full else "cannot write the checkpoint"
        raise CheckpointError(f"{cause} {target}: {error}") from error
    try:
        prune_checkpoints(folder, keep, disk=disk)
    except OSError as error:  # the new checkpoint stands: not a reason to stop a run
        warnings.warn(f"cannot delete old checkpoints in {folder}: {error}", RuntimeWarning, stacklevel=2)
    return target


def load_latest(folder: Path) -> Checkpoint:
    """The newest checkpoint whose hashes match; warns about each newer one that is damaged.

    Raises `CheckpointError` if there is none.
    """
    faults = []
    for path in _newest_first(folder):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
            warnings.warn(f"{error}; falling back to the checkpoint before it", RuntimeWarning, stacklevel=2)
    found = "all are damaged: " + "; ".join(faults) if faults else "there is none"
    raise CheckpointError(f"no checkpoint to load in {folder}: {found}")


def read_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint directory, every hash checked. Raises `CheckpointError` naming the bad file."""
    manifest = _read_manifest(path)
    contents = {name: _read_verified(path / name, digest) for name, digest in manifest["files"].items()}
    try:
        state = json.loads(contents.pop(STATE))
        tensors = {name.removesuffix(".safetensors"): _unpack(content) for name, content in contents.items()}
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"damaged checkpoint {path}: {error}") from error
    return Checkpoint(step=manifest["step"], tensors=tensors, state=state, path=path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first, damaged ones included."""
    return _newest_first(folder)[::-1]


def prune_checkpoints(folder: Path, keep: int, *, disk: FileSystem = _DISK) -> None:
    """Delete all but the newest `keep` (>= 1), what a kill left half written or half deleted, never the newest valid.

    A directory is renamed first: half deleted, it could pass for a damaged checkpoint.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    newest_first = _newest_first(folder)
    kept = newest_first[:keep]
    if all(_fault(path) for path in kept):
        kept += [path for path in newest_first[keep:] if _fault(path) is None][:1]
    for path in folder.iterdir():
        if path.name.startswith((".tmp-", ".del-")):
            disk.remove(path)
        elif path in newest_first and path not in kept:
            _discard(path, disk)


def _discard(path: Path, disk: FileSystem) -> None:
    doomed = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
    disk.rename(path, doomed)
    disk.remove(doomed)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not named like a checkpoint, e.g. step-000100")
    return int(match[1])


def _pack(step: int, tensors: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> content, the manifest last."""
    files = {}
    for stem, arrays in tensors.items():
        # order="C" keeps arrays without dimensions as they are; np.ascontiguousarray would add one
        rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        files[f"{stem}.safetensors"] = safetensors.numpy.save(rows)
    files[STATE] = json.dumps(state).encode()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[MANIFEST] = json.dumps({"format": FORMAT, "step": step, "files": digests}, indent=1).encode()
    return files


def _unpack(content: bytes) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in safetensors.numpy.load(content).items()}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT or manifest["step"] != _step_of(path):
            raise ValueError(f"format {manifest['format']} and step {manifest['step']} do not fit")
        if not isinstance(manifest["files"], dict) or STATE not in manifest["files"]:
            raise ValueError(f"{STATE} is not listed")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged checkpoint file {path / MANIFEST}: {error!r}") from error
    return manifest


def _read_verified(path: Path, digest: str) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"damaged checkpoint file {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise CheckpointError(f"damaged checkpoint file {path}: its sha256 is not the manifest's")
    return content


def _fault(path: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None if it can."""
    try:
        manifest = _read_manifest(path)
        for name, digest in manifest["files"].items():
            _read_verified(path / name, digest)
    except CheckpointError as error:
        return str(error)
    return None
