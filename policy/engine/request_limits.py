"""What no engine can serve, refused by name before it disturbs anything."""

import math

import numpy as np

from policy.engine.protocol import MAX_TEMPERATURE, MIN_TEMPERATURE, GenerationRequest, UnsupportedRequest


def check_request(request: GenerationRequest, *, vocab_size: int, max_model_tokens: int) -> None:
    """Raise `UnsupportedRequest` naming the value and its range where a request can never be served."""
    prompt_ids, spec = np.asarray(request.prompt_ids), request.sampling
    if prompt_ids.ndim != 1 or not np.issubdtype(prompt_ids.dtype, np.integer):
        raise UnsupportedRequest(f"prompt_ids is {prompt_ids.dtype} {prompt_ids.shape}, not a row of integers")
    if not 1 <= len(prompt_ids) < max_model_tokens:
        raise UnsupportedRequest(f"prompt of {len(prompt_ids)} tokens is not in [1, {max_model_tokens - 1}]")
    for name, ids in (("prompt", prompt_ids), ("stop", spec.stop_token_ids), ("banned", spec.banned_token_ids)):
        if (bad := _first_outside(ids, vocab_size)) is not None:
            raise UnsupportedRequest(f"{name} token id {bad} is not in [0, {vocab_size - 1}]")
    if len(set(spec.banned_token_ids)) >= vocab_size:
        raise UnsupportedRequest(f"all {vocab_size} tokens are banned; at least one must be allowed")
    if spec.max_tokens < 1:
        raise UnsupportedRequest(f"max_tokens {spec.max_tokens} is not at least 1")
    if spec.temperature != 0 and not MIN_TEMPERATURE <= spec.temperature <= MAX_TEMPERATURE:
        allowed = f"0 or in [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]"
        raise UnsupportedRequest(f"temperature {spec.temperature} is not {allowed}")
    if not 0 < spec.top_p <= 1:
        raise UnsupportedRequest(f"top_p {spec.top_p} is not in (0, 1]")
    if spec.top_k < 0:
        raise UnsupportedRequest(f"top_k {spec.top_k} is not at least 0")
    if not math.isfinite(request.deadline_s):
        raise UnsupportedRequest(f"deadline_s {request.deadline_s} is not finite")


def _first_outside(ids: np.ndarray | tuple[int, ...], vocab_size: int) -> int | None:
    """The first id that is not in the vocabulary."""
    array = np.asarray(ids)
    outside = array[(array < 0) | (array >= vocab_size)]
    return int(outside[0]) if len(outside) else None
