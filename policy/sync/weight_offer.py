"""Snapshots that stay with the learner until an engine asks for them: what travels through Ray is where to ask."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from policy.sync.snapshot import TensorSpec, check_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferedSnapshot:
    """A `PolicySnapshot` without its tensors, which a `WeightSender` broadcasts to whoever pulls them.

    Example: offer = sender.offer(snapshot); receive(offer, transfer="a1", rank=0, ranks=1).digest == snapshot.digest
    """

    version: int
    manifest: tuple[TensorSpec, ...]
    """Whoever pulls the tensors compares them with its digests: it came another way than they did."""
    host: str
    """Address of the sender, on the learner's node."""
    port: int
    token: str = field(repr=False)
    """Secret of the sender; it serves nobody without."""
    deadline_s: float
    """Longest that a transfer may take, on either side."""

    def verify(self, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Check the manifest against `expected` {name: (shape, dtype)} of the model that will load it.

        Raises `WeightSyncError`, as `PolicySnapshot.verify` does.
        """
        check_manifest(self.version, self.manifest, expected)

    def to_wire(self) -> dict[str, Any]:
        """As plain values, for messages between vLLM's processes, which hold nothing else."""
        return asdict(self)

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "OfferedSnapshot":
        manifest = tuple(TensorSpec(**spec | {"shape": tuple(spec["shape"])}) for spec in wire["manifest"])
        return OfferedSnapshot(**{**wire, "manifest": manifest})
