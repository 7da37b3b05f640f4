"""The growing token row of one episode. It can only be appended to (pitfalls I1, I2).

Letters: L tokens so far, n tokens of a segment, M sparse layers, k experts per token.
"""

from collections.abc import Sequence

import numpy as np

from policy.engine.protocol import Completion, EngineError


class TokenRecord:
    """Example: append_given([7, 8]), append_sampled(a completion of [9, 2] under version 3) ->
    token_ids [7, 8, 9, 2], loss_mask [0, 0, 1, 1], policy_versions [-1, -1, 3, 3]."""

    def __init__(self) -> None:
        self._token_ids: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self._routes: list[np.ndarray | None] = []

    def __len__(self) -> int:
        return sum(map(len, self._token_ids))

    def append_given(self, token_ids: Sequence[int]) -> None:
        """Add what the policy did not sample: prompts, results, headers."""
        n = len(token_ids)
        self._append(token_ids, np.zeros(n), np.zeros(n), np.full(n, -1), None)

    def append_sampled(self, completion: Completion) -> None:
        """Add a completion. Raises `EngineError` for one that cannot be trained on (pitfalls A11)."""
        n = len(completion.token_ids)
        if len(completion.logprobs) != n or len(completion.policy_versions) != n:
            raise EngineError(
                f"completion of {n} tokens with {len(completion.logprobs)} logprobs and "
                f"{len(completion.policy_versions)} policy versions"
            )
        if not np.isfinite(completion.logprobs).all():
            raise EngineError("completion with a logprob that is not finite")
        if completion.routed_experts is not None and len(completion.routed_experts) != n:
            raise EngineError(f"completion of {n} tokens with routes of {len(completion.routed_experts)}")
        if completion.prompt_routes is not None:
            self._fill_routes(completion.prompt_routes)
        self._append(
            completion.token_ids, np.ones(n), completion.logprobs, completion.policy_versions, completion.routed_experts
        )

    def _fill_routes(self, known: np.ndarray) -> None:
        """Take the routes (L, M, k) where none was known: of given tokens, and of a turn's last one.

        Raises `EngineError` for another length.
        """
        if len(known) != len(self):
            raise EngineError(f"completion with routes of {len(known)} prompt tokens, the prompt has {len(self)}")
        start = 0
        for i, ids in enumerate(self._token_ids):
            rows, start = known[start : start + len(ids)], start + len(ids)
            mine = self._routes[i]
            self._routes[i] = rows if mine is None else np.where((mine < 0).all((1, 2), keepdims=True), rows, mine)

    def _append(
        self,
        token_ids: Sequence[int] | np.ndarray,
        mask: np.ndarray,
        logprobs: np.ndarray,
        versions: np.ndarray,
        routes: np.ndarray | None,
    ) -> None:
        self._token_ids.append(np.array(token_ids, np.int32))
        self._mask.append(mask.astype(np.uint8))
        self._logprobs.append(logprobs.astype(np.float32))
        self._versions.append(versions.astype(np.int32))
        self._routes.append(routes)

    @property
    def token_ids(self) -> np.ndarray:
        """(L,) int32; like all columns a new array at every call."""
        return _joined(self._token_ids, np.int32)

    @property
    def loss_mask(self) -> np.ndarray:
        """(L,) uint8."""
        return _joined(self._mask, np.uint8)

    @property
    def logprobs(self) -> np.ndarray:
        """(L,) float32."""
        return _joined(self._logprobs, np.float32)

    @property
    def policy_versions(self) -> np.ndarray:
        """(L,) int32."""
        return _joined(self._versions, np.int32)

    @property
    def routed_experts(self) -> np.ndarray | None:
        """(L, M, k) int16, -1 where no route is known; None where no completion brought routes."""
        known = next((routes for routes in self._routes if routes is not None), None)
        if known is None:
            return None
        parts = [
            np.full((len(ids), *known.shape[1:]), -1, np.int16) if routes is None else routes.astype(np.int16)
            for ids, routes in zip(self._token_ids, self._routes, strict=True)
        ]
        return np.concatenate(parts)


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])
