"""Versioned weights as data: what a learner publishes and an engine verifies before it serves.

A snapshot is refused as a whole: names, shapes, dtypes and digests must all agree, so
that no worker goes on with part of another version while a sync says that it went well.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


class WeightSyncError(RuntimeError):
    """Raised when a snapshot does not fit the model that should load it; the message names the tensor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of a snapshot."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """numpy name, e.g. "float32"."""
    digest: str
    """sha256 of its bytes."""


def tensor_digest(array: np.ndarray) -> str:
    """sha256 of an array's bytes in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicySnapshot:
    """All weights of one policy version.

    Example: PolicySnapshot.create(3, {"model.norm.weight": np.zeros(96, np.float32)}).digest -> "1f0c..."
    """

    version: int
    manifest: tuple[TensorSpec, ...]
    """Sorted by name; one entry per tensor."""
    tensors: Mapping[str, np.ndarray]
    path: str = ""
    """Safetensors file that the tensors are mapped from; "" = they are in memory alone."""

    @staticmethod
    def create(version: int, tensors: Mapping[str, np.ndarray]) -> "PolicySnapshot":
        manifest = tuple(
            TensorSpec(name=name, shape=tuple(array.shape), dtype=str(array.dtype), digest=tensor_digest(array))
            for name, array in sorted(tensors.items())
        )
        return PolicySnapshot(version=version, manifest=manifest, tensors=dict(tensors))

    @property
    def digest(self) -> str:
        """sha256 over the manifest: equal digests mean equal weights."""
        rows = [[s.name, list(s.shape), s.dtype, s.digest] for s in self.manifest]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def verify(self, expected: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        """Check against `expected` {name: (shape, dtype)} of the model that will load it, and every digest.

        Raises `WeightSyncError` naming the first tensor that is missing, unknown, of another shape or dtype, not
        finite, or whose bytes do not give the digest of the manifest.
        """
        check_manifest(self.version, self.manifest, expected)
        self.verify_tensors()

    def verify_tensors(self) -> None:
        """Check the tensors against the manifest alone, as whoever received both apart does."""
        specs = {spec.name: spec for spec in self.manifest}
        if stray := sorted(self.tensors.keys() ^ specs.keys()):
            raise WeightSyncError(f"version {self.version}: tensor {stray[0]!r} is not in both manifest and data")
        for name, spec in specs.items():
            array = self.tensors[name]
            if tuple(array.shape) != spec.shape:
                raise WeightSyncError(
                    f"version {self.version}: {name!r} has shape {array.shape}, expected {spec.shape}"
                )
            if str(array.dtype) != spec.dtype:
                raise WeightSyncError(f"version {self.version}: {name!r} is {array.dtype}, expected {spec.dtype}")
            if not np.isfinite(array).all():
                raise WeightSyncError(f"version {self.version}: {name!r} holds values that are not finite")
            if tensor_digest(array) != spec.digest:
                raise WeightSyncError(f"version {self.version}: {name!r} does not match its digest")


def check_manifest(
    version: int, manifest: Sequence[TensorSpec], expected: Mapping[str, tuple[tuple[int, ...], str]]
) -> None:
    """Raise `WeightSyncError` unless the manifest names the tensors of `expected` {name: (shape, dtype)}."""
    specs = {spec.name: spec for spec in manifest}
    if missing := sorted(expected.keys() - specs.keys()):
        raise WeightSyncError(f"version {version}: tensor {missing[0]!r} is missing ({len(missing)} in all)")
    if unknown := sorted(specs.keys() - expected.keys()):
        raise WeightSyncError(f"version {version}: tensor {unknown[0]!r} is unknown ({len(unknown)} in all)")
    for name, (shape, dtype) in expected.items():
        spec = specs[name]
        if spec.shape != tuple(shape):
            raise WeightSyncError(f"version {version}: {name!r} has shape {spec.shape}, expected {shape}")
        if spec.dtype != dtype:
            raise WeightSyncError(f"version {version}: {name!r} is {spec.dtype}, expected {dtype}")
