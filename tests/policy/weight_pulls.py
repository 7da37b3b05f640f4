"""What the other processes of a transfer do in tests; few imports, for each process pays for them."""

import os
import signal
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from policy.sync.snapshot import PolicySnapshot
from policy.sync.weight_broadcast import CHUNK_BYTES, TransferGroup, joined, receive
from policy.sync.weight_offer import OfferedSnapshot
from policy.sync.weight_sender import WeightSender

HOST = "127.0.0.1"
Received = tuple[str, dict[str, tuple[list[int], str, bytes]]]


def pull(offer: OfferedSnapshot, transfer: str, rank: int, ranks: int, device: str = "cpu") -> Received:
    """In another process: (digest, {name: (shape, dtype, first and last bytes)})."""
    snapshot = receive(offer, transfer=transfer, rank=rank, ranks=ranks, device=torch.device(device))
    return snapshot.digest, {name: told(array) for name, array in snapshot.tensors.items()}


def told(array: np.ndarray) -> tuple[list[int], str, bytes]:
    content = np.ascontiguousarray(array).tobytes()
    return list(array.shape), str(array.dtype), content[:64] + content[-64:]


def small(version: int) -> PolicySnapshot:
    return PolicySnapshot.create(version, {"a": np.full((3, 2), version, np.float32)})


def die_after_a_chunk(offer: OfferedSnapshot, device: str) -> None:
    until = time.monotonic() + offer.deadline_s
    own = torch.device(device)
    with joined(offer, transfer="dies", rank=0, ranks=1, device=own, until=until) as (line, meeting):
        group = TransferGroup(meeting, own_host=line.host, rank=1, ranks=1, device=own)
        group.form(until)
        group.broadcast(np.empty(CHUNK_BYTES, np.uint8), until)
        os.kill(os.getpid(), signal.SIGKILL)


def hold_a_snapshot(told_to: Connection) -> None:
    told_to.send(WeightSender(HOST, keep=2, deadline_s=60).offer(small(1)))
    time.sleep(120)


def import_torch() -> None:
    """Importing this module has done it."""
