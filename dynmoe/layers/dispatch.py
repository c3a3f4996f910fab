"""Gather the rows of routed (token, expert) pairs, and sum weighted rows back to their tokens.

Dropless and linear in the number of pairs: no capacity, no one-hot tensor, no loop over tokens.
The two autograd functions are each other's adjoint, so each one's backward is the other's forward;
both are deterministic. On a CPU this replaces the slow backward of indexing (``index_add_``).

Shape suffixes: T tokens, E living experts, P pairs sorted by expert, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pairs(NamedTuple):
    """The routed pairs, sorted by expert, and the way back from pairs to tokens."""

    counts: list[int]
    """Pairs of each expert: the one host synchronisation of the layer."""
    token_P: Tensor
    """Token of each pair."""
    expert_P: Tensor
    """Expert of each pair, a column of the mask."""
    place_P: Tensor
    """Positions in the expert order, grouped by token: token t owns a run of them."""
    start_T: Tensor
    """Where each token's run in ``place_P`` starts."""


def pairs(mask_TE: Tensor) -> Pairs:
    """List the pairs of a boolean mask: ``nonzero`` of its transpose is sorted by expert."""
    expert_P, token_P = mask_TE.t().nonzero(as_tuple=True)
    position_TE = (mask_TE.t().reshape(-1).cumsum(0) - 1).view(mask_TE.shape[1], -1).t()
    k_T = mask_TE.sum(1)
    return Pairs(
        counts=mask_TE.sum(0).tolist(),
        token_P=token_P,
        expert_P=expert_P,
        place_P=position_TE[mask_TE],
        start_T=k_T.cumsum(0) - k_T,
    )


def gather(x_TD: Tensor, p: Pairs) -> Tensor:
    """The token row of every pair, [P, D]."""
    return _Gather.apply(x_TD, p)


def combine(out_PD: Tensor, weight_P: Tensor, p: Pairs) -> Tensor:
    """``y_t = sum of weight_p * out_p`` over the pairs of token t, [T, D]; 0 without pairs."""
    return _Combine.apply(out_PD, weight_P, p)


def _sum_by_token(rows_PD: Tensor, p: Pairs, weight_P: Tensor | None = None) -> Tensor:
    if weight_P is not None:
        weight_P = weight_P[p.place_P]
    return F.embedding_bag(p.place_P, rows_PD, p.start_T, mode="sum", per_sample_weights=weight_P)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, p: Pairs) -> Tensor:
        ctx.pairs = p
        return x_TD[p.token_P]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_PD,) = grads
        return _sum_by_token(grad_PD.contiguous(), ctx.pairs), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_PD: Tensor, weight_P: Tensor, p: Pairs) -> Tensor:
        ctx.pairs = p
        ctx.save_for_backward(out_PD, weight_P)
        return _sum_by_token(out_PD, p, weight_P)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        out_PD, weight_P = ctx.saved_tensors
        grad_PD = grads[0][ctx.pairs.token_P]
        return grad_PD * weight_P[:, None], (grad_PD * out_PD).sum(1), None
