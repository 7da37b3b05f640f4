"""Drawing the next token of every running request at once.

Shapes: B running requests, R rows there can be, V vocabulary.

Randomness is counter based: token number n of a request with key k is decided by one uniform number that is a function
of (k, n) alone. So a request draws the same tokens whatever runs beside it, in whichever row, and after it was moved or
its state was recomputed. What may still differ with the company a request runs in is the last bits of its logits,
because matrix products of other shapes round differently: a draw flips only where the uniform number falls within that
rounding (about 1e-6) of a boundary between two tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from policy.engine.protocol import SamplingSpec
from policy.model.logprobs import processed_logits

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(seed: int) -> int:
    """Key of the random stream of a seed (any integer); neighbouring seeds give unrelated keys."""
    return int(_mix(np.array([seed & _MASK], np.uint64))[0])


def uniforms(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """(B,) float64 in [0, 1): element i is number `counters[i]` of stream `keys[i]` (uint64)."""
    mixed = _mix(keys + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_STRIDE))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One token for each of B rows."""

    token_ids: np.ndarray
    """(B,) int64."""
    logprobs: np.ndarray
    """(B,) float32, see `SamplingSpec`; not finite where a row's logits were not."""


class SamplingRows:
    """The sampling settings of the running requests, one row each, so that a step costs a few tensor operations.

    Example: rows.put(0, SamplingSpec(temperature=0.7), key=stream_key(1)); rows.draw(logits, 0, counters=[0])
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._temperature = torch.ones(num_rows, device=device)
        self._banned: torch.Tensor | None = None
        """(R, V), made when the first request bans something."""
        self._top_k = np.zeros(num_rows, np.int64)
        self._top_p = np.ones(num_rows, np.float64)
        self._keys = np.zeros(num_rows, np.uint64)
        # Who uses them, so that a step skips what nobody asked for.
        self._filters = np.zeros(num_rows, bool)
        self._greedy = np.zeros(num_rows, bool)

    def put(self, row: int, spec: SamplingSpec, key: int) -> None:
        greedy = spec.temperature == 0
        self._greedy[row] = greedy
        self._temperature[row] = spec.temperature
        self._top_k[row] = spec.top_k or self._vocab_size
        self._top_p[row] = spec.top_p
        self._filters[row] = not greedy and (spec.top_k > 0 or spec.top_p < 1)
        self._keys[row] = key
        if self._banned is None and spec.banned_token_ids:
            shape, device = (len(self._keys), self._vocab_size), self._temperature.device
            self._banned = torch.zeros(shape, dtype=torch.bool, device=device)
        if self._banned is not None:
            self._banned[row] = False
            self._banned[row, list(spec.banned_token_ids)] = True

    def move(self, source: int, target: int) -> None:
        for column in (self._top_k, self._top_p, self._keys, self._filters, self._greedy):
            column[target] = column[source]
        self._temperature[target] = self._temperature[source]
        if self._banned is not None:
            self._banned[target] = self._banned[source]

    def draw(self, logits: torch.Tensor, first: int, counters: np.ndarray) -> Draw:
        """Draw for rows [first, first + B) from `logits` (B, V); `counters` (B,) = tokens drawn before this one."""
        last = first + len(logits)
        banned = None if self._banned is None else self._banned[first:last]
        scaled = processed_logits(logits, self._temperature[first:last], banned)
        logprobs = torch.log_softmax(scaled, -1)
        probs = logprobs.exp()
        if self._filters[first:last].any():
            self._filter(probs, first)
        # Inverse of the cumulative distribution, in float64 so that no token's share is lost to rounding. The target
        # stays below the total: the first entry above it exists and has a probability above 0.
        cumulative = probs.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        uniform = torch.from_numpy(uniforms(self._keys[first:last], counters)).to(logits.device).unsqueeze(1)
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        # The clamp is for rows that are not finite: they must not break the others.
        token_ids = torch.searchsorted(cumulative, target, right=True).clamp_(max=self._vocab_size - 1)
        greedy = self._greedy[first:last]
        if greedy.any():
            mask = torch.from_numpy(greedy).to(logits.device).unsqueeze(1)
            token_ids = torch.where(mask, scaled.argmax(-1, keepdim=True), token_ids)
        chosen = logprobs.gather(-1, token_ids)
        return Draw(token_ids=token_ids.squeeze(1).cpu().numpy(), logprobs=chosen.squeeze(1).cpu().numpy())

    def _filter(self, probs: torch.Tensor, first: int) -> None:
        """Set to 0, in place, what top-k and then top-p of the rows that use them leave out. probs (B, V)."""
        rows = np.flatnonzero(self._filters[first : first + len(probs)])
        ordered, order = probs[rows].sort(dim=-1, descending=True, stable=True)
        top_k = torch.from_numpy(self._top_k[first + rows]).to(probs.device).unsqueeze(1)
        ordered[torch.arange(probs.shape[1], device=probs.device) >= top_k] = 0
        top_p = torch.from_numpy(self._top_p[first + rows]).to(probs.device).unsqueeze(1)
        cumulative = ordered.cumsum(-1, dtype=torch.float64)
        # A token stays while those before it hold less than top_p of what top-k left; so the first always stays.
        ordered[cumulative - ordered >= top_p * cumulative[:, -1:]] = 0
        probs[rows] = torch.empty_like(ordered).scatter_(-1, order, ordered)
