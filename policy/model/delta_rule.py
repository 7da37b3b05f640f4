"""The gated delta rule: the recurrence, and the chunked form with a hand-written gradient.

Per head, with state S (K x V), log decay g <= 0 and write strength b:
    S <- exp(g) S;  S <- S + k (b (v - S^T k))^T;  o = S^T q
Paper: "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv 2412.06464, section 3; the chunked form is the WY
representation of "Parallelizing Linear Transformers with the Delta Rule", arXiv 2406.06484, section 3.

In a chunk that starts from S, with c = cumsum(g), D_ij = exp(c_i - c_j) for j <= i, e = exp(c), f = exp(c_last - c):
    A_ij = b_i (k_i . k_j) D_ij for j < i,  X = (I + A)^-1
    missing = v - e (k S)                  what the state that the chunk starts from does not hold yet
    new = X (b missing)                    what each token writes, given what those before it write
    o = e (q S) + ((q k^T) D) new
    S' = e_last S + k^T (f new)
The gradient is written out because PyTorch's own makes several times as many passes over the (C x C) and (C x K)
blocks, and those are where a CPU spends its time. tests/policy/test_gated_delta_net.py holds both the outputs and the
gradients against the recurrence.

Letters: M chunks, N sequences, H heads, C chunk size, K key dim, V value dim, B = M H blocks of one head and chunk.
"""

from typing import Any

import torch
from torch import Tensor


def recurrent_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence token by token: the definition that the fast forms must equal.

    q, k (T, H, K), v (T, H, V), g, beta (T, H), state (H, K, V). Returns outputs (T, H, V) and the last state.
    """
    outputs = []
    for t in range(q.shape[0]):
        state = state * g[t].exp()[:, None, None]
        delta = (v[t] - torch.einsum("hkv,hk->hv", state, k[t])) * beta[t][:, None]
        state = state + torch.einsum("hk,hv->hkv", k[t], delta)
        outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outputs), state


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, alive: list[int], state: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The delta rule with the work inside all chunks batched and one short loop over chunk indices.

    q, k (M, H, C, K), v (M, H, C, V), g, beta (M, H, C), all fp32; chunks are sorted as in `Packing`: chunk 0 of every
    sequence, then chunk 1 of the first alive[1] sequences, and so on. `state` (N, H, K, V) is what each sequence starts
    from; no gradient flows into it. Returns the outputs (M, H, C, V) and the last states (N, H, K, V), or None where
    `state` is None: sequences then start from zero and end with the pass.
    """
    heads = q.shape[1]
    blocks = (x.flatten(0, 1) for x in (q, k, v, g, beta))
    start = None if state is None else state.flatten(0, 1)
    out, last = _ChunkedDeltaRule.apply(*blocks, [count * heads for count in alive], start)  # type: ignore[misc]
    return out.unflatten(0, (-1, heads)), None if last is None else last.unflatten(0, (-1, heads))


def _decay(log_decay: Tensor) -> Tensor:
    """exp, with 0 for what is below 1e-17: denormal numbers would slow the products after it several times."""
    return log_decay.masked_fill(log_decay < -40.0, -torch.inf).exp_()


class _ChunkedDeltaRule(torch.autograd.Function):
    """q, k (B, C, K), v (B, C, V), g, beta (B, C); alive counts blocks; start (N H, K, V) or None."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, alive: list[int], start: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        size, beta = q.shape[1], beta.unsqueeze(-1)
        cum = g.cumsum(-1)
        ahead = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
        # Masked before exp: above the diagonal the difference is positive and may overflow.
        decay = _decay((cum.unsqueeze(-1) - cum.unsqueeze(-2)).masked_fill_(ahead, -torch.inf))
        since, until = _decay(cum).unsqueeze(-1), _decay(cum[:, -1:] - cum).unsqueeze(-1)
        overlap = torch.bmm(k, k.mT).mul_(decay)
        within = torch.bmm(q, k.mT).mul_(decay)
        eye = torch.eye(size, dtype=q.dtype, device=q.device).expand_as(overlap)
        # The solver reads only what lies below the diagonal and takes the diagonal as ones.
        inverse = torch.linalg.solve_triangular(overlap * beta, eye, upper=False, unitriangular=True)

        missing, new, out = v.clone(), torch.empty_like(v), torch.empty_like(v)
        state, states, last = start, [], []
        for rows, num_next in _blocks(alive):
            states.append(state)
            if state is not None:
                missing[rows].addcmul_(torch.bmm(k[rows], state), since[rows], value=-1)
            torch.bmm(inverse[rows], missing[rows] * beta[rows], out=new[rows])
            torch.bmm(within[rows], new[rows], out=out[rows])
            if state is not None:
                out[rows].addcmul_(torch.bmm(q[rows], state), since[rows])
            # Without a cache the state that a sequence ends with is not needed.
            kept = slice(rows.start, rows.start + num_next) if start is None else rows
            following = torch.bmm(k[kept].mT, new[kept] * until[kept])
            if state is not None:
                following.addcmul_(state[: len(following)], since[kept, -1:])
            last.append(following[num_next:])
            state = following[:num_next]
        ctx.save_for_backward(q, k, beta, decay, since, until, overlap, within, inverse, missing, new)
        ctx.alive, ctx.states = alive, states
        final = None if start is None else torch.cat(last[::-1])
        if final is not None:
            ctx.mark_non_differentiable(final)
        return out, final

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """d_x is the gradient of x. A factor exp(c) of x passes x . d_x on to c, whatever the other factors are."""
        q, k, beta, decay, since, until, overlap, within, inverse, missing, new = ctx.saved_tensors
        d_out = grads[0]
        d_new = torch.bmm(within.mT, d_out)
        d_written = torch.empty_like(new)  # of b * missing, which X turns into new
        d_q, d_k, d_cum = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(since.squeeze(-1))
        d_state: Tensor | None = None
        for (rows, num_next), state in zip(reversed(_blocks(ctx.alive)), reversed(ctx.states), strict=True):
            going_on = slice(rows.start, rows.start + num_next)
            if d_state is not None:
                d_new[going_on].addcmul_(torch.bmm(k[going_on], d_state), until[going_on])
                torch.bmm(new[going_on] * until[going_on], d_state.mT, out=d_k[going_on])
                through_until = torch.linalg.vecdot(d_k[going_on], k[going_on])
                d_cum[going_on].sub_(through_until)
                d_cum[going_on, -1] += through_until.sum(-1)
            torch.bmm(inverse[rows].mT, d_new[rows], out=d_written[rows])
            if state is None:
                continue
            d_read, d_erased = d_out[rows] * since[rows], d_written[rows] * (since[rows] * -beta[rows])
            torch.bmm(d_read, state.mT, out=d_q[rows])
            from_erased = torch.bmm(d_erased, state.mT)
            d_k[rows].add_(from_erased)
            d_cum[rows].add_(torch.linalg.vecdot(d_q[rows], q[rows])).add_(torch.linalg.vecdot(from_erased, k[rows]))
            d_here = torch.bmm(q[rows].mT, d_read).baddbmm_(k[rows].mT, d_erased)
            if d_state is not None:
                carried = d_state.mul_(since[going_on, -1:])
                d_here[:num_next].add_(carried)
                d_cum[going_on, -1] += torch.linalg.vecdot(carried.flatten(1), state[:num_next].flatten(1))
            d_state = d_here

        d_lower = torch.bmm(d_written, new.mT).tril_(-1).neg_()  # of A: X = (I + A)^-1
        d_within = torch.bmm(d_out, new.mT)
        from_lower = d_lower * overlap
        d_beta = torch.linalg.vecdot(d_written, missing).add_(from_lower.sum(-1))
        through_decay = from_lower.mul_(beta).addcmul_(d_within, within)
        d_cum.add_(through_decay.sum(-1)).sub_(through_decay.sum(-2))
        d_overlap, d_scores = d_lower.mul_(decay).mul_(beta), d_within.mul_(decay)
        d_q.baddbmm_(d_scores, k)
        d_k.baddbmm_(d_scores.mT, q).baddbmm_(d_overlap + d_overlap.mT, k)
        return d_q, d_k, d_written.mul_(beta), d_cum.flip(-1).cumsum(-1).flip(-1), d_beta, None, None


def _blocks(alive: list[int]) -> list[tuple[slice, int]]:
    """Per chunk index its rows of blocks and how many of them go on to the next."""
    ends = [sum(alive[: i + 1]) for i in range(len(alive))]
    return [(slice(end - count, end), after) for end, count, after in zip(ends, alive, [*alive[1:], 0], strict=True)]
