"""Weights as a broadcast: one process group for one transfer, from the learner's process to all ranks of one engine.

A transfer, from the side of an engine's rank. R = ranks of the engine; the sender is rank 0 of R + 1 in the group.

    rank      -> sender   over TCP: token, version, transfer, rank, R, its GPU          one line of JSON
    sender    -> rank     which backend, where the group's store is; or what is wrong   one line, once all R have asked
    sender    => ranks    the weights as one stream of bytes, in chunks                 gloo or NCCL
    rank      -> sender   "done"; the sender drops the group                            one line

The group is made anew each time, beside whatever groups the process has: workers may come and go, and whoever dies in
a transfer costs this one alone. The stream is the manifest's tensors in its order, C-ordered, padded to `ALIGN_BYTES`:
small ones travel together, large ones in pieces, and a GPU never holds more of it than a chunk.

Every wait ends at the transfer's deadline, and what fails is a `WeightSyncError` of whoever waited.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed

from policy.sync.snapshot import PolicySnapshot, TensorSpec, WeightSyncError
from policy.sync.weight_offer import OfferedSnapshot

CHUNK_BYTES = 64 << 20
ALIGN_BYTES = 64
MAX_LINE_BYTES = 4096
CPU = torch.device("cpu")
c10d: Any = torch.distributed
"""Its annotations leave out stores, and how groups are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the members of a transfer's group meet, as the sender tells them."""

    backend: str
    """"gloo" | "nccl"."""
    host: str
    """Of the group's store, at the sender."""
    port: int


def receive(
    offer: OfferedSnapshot, *, transfer: str, rank: int, ranks: int, device: torch.device = CPU
) -> PolicySnapshot:
    """Pull an offered snapshot as one of an engine's `ranks`, all of which must call this under one name `transfer`.

    `device`: where the model lies; the tensors come to host memory. They have the manifest's names, shapes and digests.
    Raises `WeightSyncError` where the sender no longer has the version, is gone, or did not send it in time.
    """
    until = time.monotonic() + offer.deadline_s
    try:
        with joined(offer, transfer=transfer, rank=rank, ranks=ranks, device=device, until=until) as (line, meeting):
            content = np.empty(sum(padded_bytes(spec) for spec in offer.manifest), np.uint8)
            with TransferGroup(meeting, own_host=line.host, rank=rank + 1, ranks=ranks, device=device) as group:
                group.form(until)
                for start in range(0, len(content), CHUNK_BYTES):
                    group.broadcast(content[start : start + CHUNK_BYTES], until)
                line.say({"done": True}, until)
    except WeightSyncError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # of sockets, of torch.distributed, of JSON
        late = time.monotonic() >= until
        why = f"it took longer than {offer.deadline_s:g} s" if late else "the transfer broke off"
        raise WeightSyncError(
            f"version {offer.version} could not be received from {offer.host}:{offer.port}: {why} ({error!r})"
        ) from error
    snapshot = PolicySnapshot(
        version=offer.version, manifest=offer.manifest, tensors=dict(unpack(offer.manifest, content))
    )
    snapshot.verify_tensors()
    return snapshot


@contextlib.contextmanager
def joined(
    offer: OfferedSnapshot, *, transfer: str, rank: int, ranks: int, device: torch.device, until: float
) -> Iterator[tuple["Line", Meeting]]:
    """Ask the sender for a version and wait until all ranks have. Raises `WeightSyncError` where it refuses."""
    with socket.create_connection((offer.host, offer.port), timeout=left(until)) as connection:
        line = Line(connection)
        request = {"version": offer.version, "transfer": transfer, "rank": rank, "ranks": ranks}
        line.say(request | {"token": offer.token, "gpu": gpu_of(device)}, until)
        answer = line.hear(until)
        if "error" in answer:
            raise WeightSyncError(f"version {offer.version}: the sender refused it: {answer['error']}")
        yield line, Meeting(**answer)


class TransferGroup:
    """The process group of one transfer, as a context that drops it. Rank 0 sends."""

    def __init__(
        self, meeting: Meeting, *, own_host: str, rank: int, ranks: int, device: torch.device, store: Any = None
    ) -> None:
        """`own_host`: this process's address on the network of the transfer. `store`: of the sender, which hosts it."""
        self._meeting = meeting
        self._own_host = own_host
        self._rank = rank
        self._size = ranks + 1
        self._device = device if meeting.backend == "nccl" else CPU
        self._store = store
        self._group: Any = None
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> "TransferGroup":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._group is not None:
            (self._group.shutdown if kind is None else self._group.abort)()  # to shut down is to wait for the others
        self._group = self._store = self._staging = None

    def form(self, until: float) -> None:
        """Meet the others. Raises RuntimeError, as torch.distributed does, where one does not come in time."""
        timeout = timedelta(seconds=left(until))
        if self._store is None:
            meeting = self._meeting
            self._store = c10d.TCPStore(meeting.host, meeting.port, timeout=timeout, wait_for_workers=False)
        store = c10d.PrefixStore("weights", self._store)
        if self._meeting.backend == "nccl":
            torch.cuda.set_device(self._device)  # of this thread
            self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8, device=self._device)
            with _waits_that_block():
                self._group = c10d.ProcessGroupNCCL(store, self._rank, self._size, timeout)
            return
        options = c10d.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [c10d.ProcessGroupGloo.create_device(hostname=self._own_host)]
        self._group = c10d.ProcessGroupGloo(store, self._rank, self._size, options)

    def broadcast(self, chunk: np.ndarray, until: float) -> None:
        """(at most CHUNK_BYTES) uint8: rank 0 sends it, the others fill it. Raises RuntimeError as `form` does."""
        host = torch.from_numpy(chunk)
        staged = host if self._staging is None else self._staging[: len(chunk)]
        if self._staging is not None and self._rank == 0:
            staged.copy_(host)
        timeout = timedelta(seconds=left(until))
        self._group.broadcast(staged, 0, timeout).wait(timeout)
        if self._staging is not None and self._rank != 0:
            host.copy_(staged)


@contextlib.contextmanager
def _waits_that_block() -> Iterator[None]:
    """An NCCL group made meanwhile raises in whoever waits for it. Others have a watchdog, which ends the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# --- the stream ---


def padded_bytes(spec: TensorSpec) -> int:
    """What a tensor takes of the stream."""
    return -(-np.dtype(spec.dtype).itemsize * prod(spec.shape) // ALIGN_BYTES) * ALIGN_BYTES


def chunks(snapshot: PolicySnapshot) -> Iterator[np.ndarray]:
    """The stream, (at most CHUNK_BYTES) uint8 each. The next one overwrites it."""
    chunk, filled = np.zeros(CHUNK_BYTES, np.uint8), 0
    for spec in snapshot.manifest:
        content = np.ascontiguousarray(snapshot.tensors[spec.name]).reshape(-1).view(np.uint8)
        padding = np.zeros(padded_bytes(spec) - len(content), np.uint8)
        for piece in (content, padding):
            while len(piece):
                taken = min(len(piece), CHUNK_BYTES - filled)
                chunk[filled : filled + taken] = piece[:taken]
                piece, filled = piece[taken:], filled + taken
                if filled == CHUNK_BYTES:
                    yield chunk
                    filled = 0
    if filled:
        yield chunk[:filled]


def unpack(manifest: tuple[TensorSpec, ...], content: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors inside a whole stream; nothing is copied."""
    start = 0
    for spec in manifest:
        dtype = np.dtype(spec.dtype)
        end = start + dtype.itemsize * prod(spec.shape)
        yield spec.name, content[start:end].view(dtype).reshape(spec.shape)
        start += padded_bytes(spec)


# --- the line ---


def left(until: float) -> float:
    """Seconds to a deadline on the monotonic clock. Raises TimeoutError past it."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline has passed")
    return seconds


def gpu_of(device: torch.device) -> str:
    """Id of the GPU, the same in every process that computes on it; "" = the CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


class Line:
    """One side of a TCP connection on which the two say a line of JSON in turn. Nothing on it is ever unpickled."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.host: str = connection.getsockname()[0]
        """This side's address on the way to the other."""

    def say(self, message: Mapping[str, Any], until: float) -> None:
        self._connection.settimeout(left(until))
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def hear(self, until: float) -> dict[str, Any]:
        """Raises OSError where the other side is gone or silent, ValueError where it says something else."""
        heard = b""
        while not heard.endswith(b"\n"):
            self._connection.settimeout(left(until))
            more = self._connection.recv(MAX_LINE_BYTES)
            if not more:
                raise ConnectionError("the other side is gone")
            heard += more
            if len(heard) > MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        message = json.loads(heard)
        if not isinstance(message, dict):
            raise ValueError(f"not an object: {str(message)[:40]}")
        return message

    def close(self) -> None:
        self._connection.close()
