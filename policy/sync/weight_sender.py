"""The learner's side of a broadcast: the newest snapshots, and a thread for each transfer that engines ask for.

Threads
- `weight-sender` accepts connections until `close`; each gets a thread, which reads its request within `REQUEST_S`;
- the thread of the first rank that asks leads the transfer: it waits for the other ranks and broadcasts, both within
  the deadline. The others leave their connection to it. So engines are served side by side, and none waits for another.
"""

import contextlib
import hmac
import logging
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from policy.sync.snapshot import PolicySnapshot, WeightSyncError
from policy.sync.weight_broadcast import CPU, Line, Meeting, TransferGroup, c10d, chunks, gpu_of, left
from policy.sync.weight_offer import OfferedSnapshot

DEADLINE_S = 80.0
"""Of a transfer; less than the silence after which a vLLM core counts as stuck (`policy.vllm.core.HANG_S`)."""
REQUEST_S = 10.0
REFUSAL_S = 1.0
ACCEPT_S = 0.5
"""How soon `close` is noticed."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class _Transfer:
    """One engine's pull."""

    snapshot: PolicySnapshot
    """Held by it: dropped by the sender meanwhile, it is still sent whole."""
    ranks: int
    lines: dict[int, Line] = field(default_factory=dict)
    """By rank of the engine."""
    gpus: set[str] = field(default_factory=set)
    complete: threading.Event = field(default_factory=threading.Event)
    """All ranks have asked."""


class WeightSender:
    """Example: sender = WeightSender("10.0.0.1", keep=4); offer = sender.offer(snapshot); sender.close()"""

    def __init__(self, host: str, *, keep: int, device: torch.device = CPU, deadline_s: float = DEADLINE_S) -> None:
        """`host`: of this node, as engines reach it. `keep`: how many offers stay good. `device`: of the model."""
        self._host = host
        self._keep = keep
        self._device = device
        self._deadline_s = deadline_s
        self._token = secrets.token_hex(32)
        self._lock = threading.Lock()
        """Guards the two below."""
        self._held: dict[int, PolicySnapshot] = {}
        """In the order in which they were offered."""
        self._transfers: dict[str, _Transfer] = {}
        self._closed = threading.Event()
        self._listener = socket.create_server((host, 0), backlog=128)
        self._listener.settimeout(ACCEPT_S)
        self._port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="weight-sender", daemon=True).start()

    def offer(self, snapshot: PolicySnapshot) -> OfferedSnapshot:
        """Hold it until `keep` others were offered after it."""
        with self._lock:
            self._held.pop(snapshot.version, None)
            self._held[snapshot.version] = snapshot
            for version in list(self._held)[: -self._keep]:
                del self._held[version]
        return OfferedSnapshot(
            version=snapshot.version,
            manifest=snapshot.manifest,
            host=self._host,
            port=self._port,
            token=self._token,
            deadline_s=self._deadline_s,
        )

    def close(self) -> None:
        """Accept nobody any more; a transfer that runs ends by itself. Safe to call twice."""
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._closed.is_set():
                    return
                log.exception("a connection could not be accepted")
                self._closed.wait(ACCEPT_S)
                continue
            threading.Thread(target=self._serve, args=(Line(connection),), name="weight-transfer", daemon=True).start()

    def _serve(self, line: Line) -> None:
        until = time.monotonic() + self._deadline_s
        try:
            request = line.hear(min(until, time.monotonic() + REQUEST_S))
            transfer, leads = self._join(request, line)
        except (OSError, ValueError, KeyError, TypeError, WeightSyncError) as error:
            log.warning("a request for weights was refused: %r", error)
            _refuse([line], error)
            return
        if not leads:
            return
        began_s = time.monotonic()
        try:
            backend = self._send(transfer, until)
            took_s = time.monotonic() - began_s
            log.info("version %d -> %d ranks, %s, %.3f s", transfer.snapshot.version, transfer.ranks, backend, took_s)
        except (OSError, RuntimeError, ValueError) as error:  # of sockets, of torch.distributed, of JSON
            log.warning("version %d did not arrive: %r", transfer.snapshot.version, error)
            _refuse(list(transfer.lines.values()), error)
        finally:
            with self._lock:
                del self._transfers[request["transfer"]]
            for each in transfer.lines.values():
                each.close()

    def _join(self, request: dict[str, Any], line: Line) -> tuple[_Transfer, bool]:
        """The transfer that is asked for, and whether this is its first rank."""
        version, name, rank, ranks = (request[key] for key in ("version", "transfer", "rank", "ranks"))
        if not hmac.compare_digest(str(request["token"]).encode(), self._token.encode()):
            raise WeightSyncError("the token is not this sender's")
        if not (isinstance(name, str) and 0 <= rank < ranks):
            raise WeightSyncError(f"transfer {name!r} cannot have rank {rank!r} of {ranks!r}")
        with self._lock:
            transfer, leads = self._transfers.get(name), name not in self._transfers
            if transfer is None:
                if version not in self._held:
                    held = ", ".join(map(str, self._held)) or "none"
                    raise WeightSyncError(f"version {version!r} is not held any more; versions held: {held}")
                transfer = self._transfers[name] = _Transfer(snapshot=self._held[version], ranks=ranks)
            if (version, ranks) != (transfer.snapshot.version, transfer.ranks) or rank in transfer.lines:
                raise WeightSyncError(f"transfer {name!r} has another version, other ranks, or rank {rank} twice")
            transfer.lines[rank] = line
            transfer.gpus.add(str(request["gpu"]))
            if len(transfer.lines) == ranks:
                transfer.complete.set()
        return transfer, leads

    def _send(self, transfer: _Transfer, until: float) -> str:
        """Broadcast it to all ranks and wait until each has it. Returns the backend."""
        if not transfer.complete.wait(left(until)):
            raise WeightSyncError(f"{len(transfer.lines)} of {transfer.ranks} ranks asked in {self._deadline_s:g} s")
        listener = socket.create_server((self._host, 0))
        port = listener.getsockname()[1]
        store = c10d.TCPStore(
            self._host,
            port,
            is_master=True,
            timeout=timedelta(seconds=left(until)),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # else it would listen on every interface
        )
        meeting = Meeting(backend=self._backend(transfer), host=self._host, port=port)
        group = TransferGroup(
            meeting, own_host=self._host, rank=0, ranks=transfer.ranks, device=self._device, store=store
        )
        with group:
            for line in transfer.lines.values():
                line.say({"backend": meeting.backend, "host": meeting.host, "port": meeting.port}, until)
            group.form(until)
            for chunk in chunks(transfer.snapshot):
                group.broadcast(chunk, until)
            for line in transfer.lines.values():
                line.hear(until)
        return meeting.backend

    def _backend(self, transfer: _Transfer) -> str:
        """NCCL where each member has a GPU of its own, which it demands; else gloo, from host memory to host memory."""
        gpus = transfer.gpus | {gpu_of(self._device)}
        apart = len(gpus) == transfer.ranks + 1 and "" not in gpus
        return "nccl" if apart and c10d.is_nccl_available() else "gloo"


def _refuse(lines: list[Line], error: Exception) -> None:
    for line in lines:
        with contextlib.suppress(OSError):  # it is gone, or has failed by itself
            line.say({"error": str(error)}, time.monotonic() + REFUSAL_S)
        line.close()
