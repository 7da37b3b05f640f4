"""The growing row of an episode's tokens."""

import numpy as np
import pytest

from policy.engine.protocol import Completion, EngineError
from rollout.record.token_record import TokenRecord


def completion(token_ids: list[int], routes: list[int], prompt_routes: list[int] | None) -> Completion:
    """One sparse layer, one expert per token."""
    return Completion(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.full(len(token_ids), -1, np.float32),
        policy_versions=np.zeros(len(token_ids), np.int32),
        finish_reason="stop",
        routed_experts=np.array(routes, np.int16).reshape(-1, 1, 1),
        prompt_routes=None if prompt_routes is None else np.array(prompt_routes, np.int16).reshape(-1, 1, 1),
    )


def test_routes_of_a_prompt_fill_what_was_unknown_and_change_nothing_that_was_known() -> None:
    record = TokenRecord()
    record.append_given([10, 11])
    record.append_sampled(completion([12, 13], [3, -1], [1, 2]))
    record.append_given([14])
    record.append_sampled(completion([15], [-1], [7, 7, 7, 4, 5]))
    assert record.routed_experts is not None
    assert record.routed_experts.ravel().tolist() == [1, 2, 3, 4, 5, -1]


def test_routes_of_a_kept_state_stay_unknown_or_as_they_were() -> None:
    record = TokenRecord()
    record.append_given([10, 11])
    record.append_sampled(completion([12], [-1], None))
    record.append_sampled(completion([13], [-1], [-1, 6, 8]))
    assert record.routed_experts is not None
    assert record.routed_experts.ravel().tolist() == [-1, 6, 8, -1]


def test_routes_of_another_prompt_are_refused() -> None:
    record = TokenRecord()
    record.append_given([10, 11])
    with pytest.raises(EngineError, match="routes of 1 prompt tokens, the prompt has 2"):
        record.append_sampled(completion([12], [-1], [1]))
