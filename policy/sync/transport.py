"""Which way weights travel from the learner to engines, and what an engine makes of what arrives.

| way | what passes through Ray | where the tensors are |
|---|---|---|
| "objects" | the snapshot itself | in Ray's object store |
| "files" | a `StoredSnapshot` | in the run's folder, mapped by every engine |
| "broadcast" | an `OfferedSnapshot` | with the learner, until an engine's ranks pull them |
"""

from collections.abc import Callable
from pathlib import Path

import torch

from policy.sync.snapshot import PolicySnapshot
from policy.sync.weight_files import StoredSnapshot
from policy.sync.weight_offer import OfferedSnapshot
from policy.sync.weight_sender import WeightSender

Snapshot = PolicySnapshot | OfferedSnapshot
"""Weights of a version, here or to be pulled: what an engine loads."""
PublishedSnapshot = Snapshot | StoredSnapshot
"""What passes through Ray."""


def weights_folder(transport: str, run_folder: Path) -> Path | None:
    """Where a run keeps the files of its versions; None where weights take another way."""
    return run_folder / "weights" if transport == "files" else None


def publisher(
    transport: str, *, run_folder: Path, keep: int, host: str, device: torch.device
) -> Callable[[PolicySnapshot], PublishedSnapshot]:
    """What the learner does with each snapshot. `keep`: how many of them stay good; `host`: of this node, as engines
    reach it; `device`: where the learner's model lies."""
    if folder := weights_folder(transport, run_folder):
        return lambda snapshot: StoredSnapshot.write(snapshot, folder, keep=keep)
    if transport == "broadcast":
        return WeightSender(host, keep=keep, device=device).offer
    return lambda snapshot: snapshot


def arrived(published: PublishedSnapshot) -> Snapshot:
    """What an engine can load of it. Raises `WeightSyncError` where a file is gone."""
    return published.open() if isinstance(published, StoredSnapshot) else published
