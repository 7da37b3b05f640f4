"""What an engine and a learner ask of a policy's network, whoever wrote it."""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn


class PolicyCache(Protocol):
    """State of the conversations in `num_slots` slots of at most `max_tokens` tokens."""

    num_slots: int
    max_tokens: int
    lengths: list[int]
    """Tokens held in each slot."""

    @property
    def nbytes(self) -> int: ...

    def reset(self, slot: int) -> None:
        """Empty a slot."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Make `target` a deep copy of `source`."""
        ...


class PolicyOutput(Protocol):
    """What one pass gives."""

    @property
    def logits(self) -> Tensor:
        """(rows, V) fp32."""
        ...

    @property
    def routed_experts(self) -> Tensor | None:
        """(rows, M, k) int64 experts of M sparse layers; None where the model has none or does not tell."""
        ...


class PolicyShape(Protocol):
    """The part of a model's config that others need."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_experts(self) -> int:
        """Experts whose routes the model reports and replays; 0 = none."""
        ...


CacheT = TypeVar("CacheT", bound=PolicyCache)


class PolicyModel(nn.Module, ABC, Generic[CacheT]):
    """A causal language model over packed tokens; `policy.model.hybrid.HybridModel` says what each argument means."""

    config: PolicyShape

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def forward(
        self,
        token_ids: Tensor,
        sequence_starts: Tensor,
        *,
        cache: CacheT | None = None,
        slots: list[int] | None = None,
        routed_experts: Tensor | None = None,
        logits_at: Tensor | None = None,
    ) -> PolicyOutput: ...

    @abstractmethod
    def decode(self, token_ids: Tensor, cache: CacheT) -> PolicyOutput: ...

    @abstractmethod
    def new_cache(self, num_slots: int, max_tokens: int) -> CacheT: ...

    @abstractmethod
    def refresh_decode_weights(self) -> object:
        """Make what `decode` derives from the weights; it does so by itself after any in-place change of them."""
