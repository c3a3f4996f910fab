"""List the routed (token, expert) pairs, gather the rows of every expert, sum rows by token.

Dropless and linear in the number of pairs: no capacity, no one-hot tensor, no loop over tokens.
Moving rows is a gather or a segmented sum, in the backward pass too, hence deterministic; on a CPU
this replaces the slow backward of indexing (``index_add_``).

Shape suffixes: T tokens, E living experts, P pairs sorted by token, R rows sorted by expert, N rows
of one expert, D model width. R is P, or a little more where the rows of an expert are rounded up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Pairs(NamedTuple):
    """The routed pairs, sorted by token, and their rows, sorted by expert."""

    counts: list[int]
    """Rows of each expert: the one host synchronisation of the layer."""
    end_E: Tensor
    """Where each expert's rows end."""
    token_R: Tensor
    """Token of each row. A row without a pair repeats its expert's last one; no output has it."""
    token_P: Tensor
    """Token of each pair."""
    expert_P: Tensor
    """Expert of each pair, a column of the mask."""
    row_P: Tensor
    """Row of each pair."""
    start_T: Tensor
    """Where each token's run of pairs starts."""


def few_sizes(rows: int) -> int:
    """Round up to a multiple of 8 that is one of 16 between two powers of 2: at most 7, or 1/16,
    more."""
    step = 1 << max(3, (rows - 1).bit_length() - 5)
    return -(-rows // step) * step


def pairs(mask_TE: Tensor, rounded: bool = False) -> Pairs:
    """List the pairs of a boolean mask, if ``rounded`` with ``few_sizes`` of the experts' rows.

    The rows of an expert are in the order of tokens.
    """
    pairs_E = mask_TE.sum(0)
    host_counts = pairs_E.tolist()  # NOTE: the device must have finished the routing here.
    # nonzero_static, because nonzero would ask the device for its size, which is known by now.
    token_P, expert_P = mask_TE.nonzero_static(size=sum(host_counts)).t().contiguous()
    counts = [few_sizes(n) for n in host_counts] if rounded else host_counts
    end_E = pairs_E.cumsum(0)
    by_expert_P = expert_P.argsort(stable=True)  # stable: tokens stay in order within an expert
    rows = torch.arange(len(token_P), device=mask_TE.device)
    token_R = token_P[by_expert_P]
    if counts != host_counts:
        # Rows without a pair repeat a real token, whose activations are finite: 0 times them is 0.
        last_E = token_R[(end_E - 1).clamp(min=0)]
        rows_E = torch.tensor(counts, device=mask_TE.device)
        shift_E = (rows_E - pairs_E).cumsum(0) - (rows_E - pairs_E)
        rows += shift_E[expert_P[by_expert_P]]
        end_E, token_R = rows_E.cumsum(0), last_E.repeat_interleave(rows_E)
        token_R[rows] = token_P[by_expert_P]
    row_P = torch.empty_like(token_P)
    row_P[by_expert_P] = rows
    k_T = mask_TE.sum(1)
    return Pairs(counts, end_E, token_R, token_P, expert_P, row_P, k_T.cumsum(0) - k_T)


def gather(x_TD: Tensor, p: Pairs) -> Tensor:
    """Return the token of every row, [R, D]."""
    return _Gather.apply(x_TD, p.token_R, p.row_P, p.start_T)


def combine(out_RD: Tensor, weights_TE: Tensor, p: Pairs) -> Tensor:
    """``y_t = sum over the pairs (t, e) of token t of weights_te * out_r``, [T, D]."""
    return _Combine.apply(out_RD, weights_TE, *p[2:])


def sum_by_token(
    rows_RD: Tensor, row_P: Tensor, start_T: Tensor, weight_P: Tensor | None = None
) -> Tensor:
    """Sum the rows of every token's pairs, each times its weight, [T, D]; 0 without pairs."""
    return F.embedding_bag(row_P, rows_RD, start_T, mode="sum", per_sample_weights=weight_P)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, row_P: Tensor, start_T: Tensor) -> Tensor:
        ctx.save_for_backward(row_P, start_T)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # NOTE: autograd's own backward of index_select adds rows in any order on a GPU.
        return sum_by_token(grads[0].contiguous(), *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out_RD: Tensor,
        weights_TE: Tensor,
        token_R: Tensor,
        token_P: Tensor,
        expert_P: Tensor,
        row_P: Tensor,
        start_T: Tensor,
    ) -> Tensor:
        # embedding_bag wants the dtype of the rows; the router's weights are fp32.
        weight_P = weights_TE[token_P, expert_P].to(out_RD.dtype)
        ctx.save_for_backward(out_RD, weight_P, token_R, token_P, expert_P, row_P)
        ctx.shape, ctx.dtype = weights_TE.shape, weights_TE.dtype
        return sum_by_token(out_RD, row_P, start_T, weight_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # NOTE: here single pairs get their gradient. ``grad_RD`` times the weights is that by the
        # output of every pair: conflict.py, which is next in the backward pass, compares them.
        out_RD, weight_P, token_R, token_P, expert_P, row_P = ctx.saved_tensors
        grad_RD = grads[0].index_select(0, token_R)
        weights_grad_TE = None
        if ctx.needs_input_grad[1]:
            # NOTE: summed in the router's fp32: D products rounded to bf16 would be its gradient.
            dot_R = (grad_RD * out_RD).sum(1, dtype=ctx.dtype)
            weights_grad_TE = dot_R.new_zeros(ctx.shape)
            weights_grad_TE[token_P, expert_P] = dot_R[row_P]
        weight_R = weight_P.new_zeros(len(token_R))  # 0 where a row has no pair: no gradient
        weight_R[row_P] = weight_P
        return grad_RD.mul_(weight_R[:, None]), weights_grad_TE, None, None, None, None, None
