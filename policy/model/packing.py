"""Where each token of a packed forward lies in the layouts that the layers compute in.

Letters: T tokens in all, N sequences, K width of the short convolution, C chunk size of the delta rule, R = M * C rows
of the M chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Sequences of similar length that attend together, right-padded to the longest of them."""

    sequences: list[int]
    max_length: int
    max_context: int
    """Most keys of a sequence: cached tokens and new ones."""
    token_of_row: Tensor
    """(n * max_length,) token of each padded row; padding repeats the sequence's last token."""
    rows: Tensor
    """Rows that hold a token, sorted like `tokens`."""
    tokens: Tensor
    """(tokens of the bucket,) the token of each of `rows`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """All index tensors of one forward pass; made once and shared by every layer.

    Example: lengths 3 and 2, K = 4, C = 4: conv_rows = [3, 4, 5, 9, 10] (three rows of context before each sequence),
    chunk_rows = [0, 1, 2, 4, 5] (each sequence begins a chunk), alive = [2].
    """

    num_tokens: int
    lengths: list[int]
    """(N) tokens of each sequence in this pass, all >= 1."""
    past: list[int]
    """(N) tokens of each sequence that the cache already holds."""
    slots: list[int] | None
    """(N) cache slot of each sequence; None without a cache."""
    positions: Tensor
    """(T,) position of each token in its conversation."""
    conv_rows: Tensor
    """(T,) row of each token where K - 1 rows of context lie before every sequence."""
    context_rows: Tensor
    """(N * (K - 1),) the context rows, oldest first, sequence by sequence."""
    num_conv_rows: int
    chunk_rows: Tensor
    """(T,) row of each token in the chunks: chunk 0 of all sequences first, then chunk 1 of those that have one."""
    token_of_chunk_row: Tensor
    """(R,) token of each row; padding points at token 0 and must be made harmless (beta = 0, g = 0)."""
    alive: list[int]
    """alive[i] = sequences that have a chunk i; they are the first of `order`."""
    order: Tensor
    """(N,) sequences by falling number of chunks."""
    buckets: list[Bucket]

    @staticmethod
    def create(
        starts: Sequence[int],
        past: Sequence[int],
        slots: Sequence[int] | None,
        *,
        kernel: int,
        chunk_size: int,
        device: torch.device,
    ) -> "Packing":
        """Layouts of sequences that begin at `starts[:-1]`; `starts[-1]` = T."""
        lengths = [end - start for start, end in pairwise(starts)]
        if not lengths or starts[0] != 0 or min(lengths) < 1:
            raise ValueError(f"sequence_starts must rise from 0 to the number of tokens, got {list(starts)}")
        length_N = torch.tensor(lengths)
        past_N = torch.tensor(list(past))
        sequence_T = torch.repeat_interleave(length_N)
        offset_T = torch.arange(starts[-1]) - torch.tensor(starts[:-1])[sequence_T]

        chunks_N = (length_N + chunk_size - 1) // chunk_size
        order = torch.argsort(chunks_N, descending=True, stable=True)
        alive = [int((chunks_N > i).sum()) for i in range(int(chunks_N.max()))]
        first_chunk = torch.tensor([sum(alive[:i]) for i in range(len(alive))])
        rank_N = torch.empty_like(order).index_copy_(0, order, torch.arange(len(lengths)))
        chunk_T = first_chunk[offset_T // chunk_size] + rank_N[sequence_T]
        chunk_rows = chunk_T * chunk_size + offset_T % chunk_size
        token_of_chunk_row = torch.zeros(sum(alive) * chunk_size, dtype=torch.long)
        token_of_chunk_row[chunk_rows] = torch.arange(starts[-1])

        context = kernel - 1
        keys = [length + held for length, held in zip(lengths, past, strict=True)]
        begin_N = torch.tensor(starts[:-1]) + context * torch.arange(len(lengths))
        return Packing(
            num_tokens=starts[-1],
            lengths=lengths,
            past=list(past),
            slots=None if slots is None else list(slots),
            positions=(past_N[sequence_T] + offset_T).to(device),
            conv_rows=(torch.arange(starts[-1]) + context * (sequence_T + 1)).to(device),
            context_rows=(begin_N[:, None] + torch.arange(context)).flatten().to(device),
            num_conv_rows=starts[-1] + context * len(lengths),
            chunk_rows=chunk_rows.to(device),
            token_of_chunk_row=token_of_chunk_row.to(device),
            alive=alive,
            order=order.to(device),
            buckets=[_bucket(group, starts, past, device) for group in similar_lengths(keys)],
        )


def similar_lengths(lengths: Sequence[int], *, max_padded: int = 0) -> list[list[int]]:
    """Groups of indices by falling length, none of a group shorter than half of its longest.

    max_padded > 0 also limits a group's size times its longest.
    """
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        full = max_padded and groups and (len(groups[-1]) + 1) * longest > max_padded
        if not groups or full or 2 * lengths[index] < longest:
            groups.append([])
            longest = lengths[index]
        groups[-1].append(index)
    return groups


def _bucket(group: list[int], starts: Sequence[int], past: Sequence[int], device: torch.device) -> Bucket:
    begin = torch.tensor([starts[i] for i in group])
    length = torch.tensor([starts[i + 1] - starts[i] for i in group])
    column = torch.arange(int(length.max()))
    token_of_row = (begin[:, None] + torch.minimum(column, length[:, None] - 1)).flatten()
    rows = (column < length[:, None]).flatten().nonzero()[:, 0]
    return Bucket(
        sequences=group,
        max_length=int(length.max()),
        max_context=max(starts[i + 1] - starts[i] + past[i] for i in group),
        token_of_row=token_of_row.to(device),
        rows=rows.to(device),
        tokens=token_of_row[rows].to(device),
    )


class _TakeRows(torch.autograd.Function):
    """x[index], where each row of x is wanted at most once: the gradient is a copy instead of an accumulation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, source: Tensor, target: Tensor | None) -> Tensor:
        ctx.save_for_backward(source, target)
        ctx.num_rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        source, target = ctx.saved_tensors
        grad = grads[0] if target is None else grads[0].index_select(0, target)
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, source, grad), None, None, None


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` for an index without repetitions."""
    return _TakeRows.apply(x, index, index, None)  # type: ignore[return-value]


def spread_rows(x: Tensor, index: Tensor, *, source: Tensor, target: Tensor) -> Tensor:
    """`x[index]`, where the rows `target` of the result are those of `source` and all others are padding.

    Padding rows carry a copy of some row so that they are finite; no gradient flows back through them.
    """
    return _TakeRows.apply(x, index, source, target)  # type: ignore[return-value]


class _PlaceRows(torch.autograd.Function):
    """Zeros with the rows `index` set to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return grads[0].index_select(0, index), None, None


def place_rows(x: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(num_rows, ...) zeros with row index[i] = x[i]."""
    return _PlaceRows.apply(x, index, num_rows)  # type: ignore[return-value]
