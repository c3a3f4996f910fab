"""What every router returns. Routers know nothing of experts.

Every router is called as ``router(x_TD, live, token_mask_T) -> Routing``. ``live`` lists the slots
that hold an expert; column j of every result belongs to slot ``live[j]``. Scores, gates and losses
are computed in fp32 under any autocast.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Routing(NamedTuple):
    """What a router decided for T tokens over E living experts."""

    weights_TE: Tensor
    """Combine weights, fp32; the output is ``sum_e weights_te * expert_e(x_t)``."""
    mask_TE: Tensor
    """Bool: the experts whose output enters the token's output. k is its row sum."""
    scores_TE: Tensor
    """The router's own scores, fp32: cosines (top-any) or probabilities (top-k)."""
    unserved_T: Tensor
    """Bool: real tokens that no expert serves, before any evaluation fallback."""
    aux: Tensor
    """Auxiliary loss, a scalar; the task multiplies it by ``moe.aux_weight``."""
    dispatch_TE: Tensor
    """Bool: the pairs to compute. Equal to the mask unless a gradient needs more."""


def cosine(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """Cosine similarity of every row of ``x_TD`` with every row of ``w_ED``, in its dtype, [T, E].

    0, with gradient 0, for a row of zeros.
    """
    return _CosineWithUnits.apply(x_TD, F.normalize(w_ED, dim=1))


class _CosineWithUnits(torch.autograd.Function):
    """``x @ w.T / |x|`` for unit rows w, in two passes over [T, D] each way.

    No normalised copy of the tokens is made, nor is one in another dtype kept. Autograd's own
    backward of the norm would take three times as long as the product.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.dtype = x_TD.dtype
        kept_TD, x_TD = x_TD, x_TD.to(w_ED.dtype)
        norm_T1 = torch.linalg.vector_norm(x_TD, dim=1, keepdim=True)
        inverse_T1 = torch.where(norm_T1 > 1e-12, 1 / norm_T1, 0)
        scores_TE = F.linear(x_TD, w_ED) * inverse_T1
        ctx.save_for_backward(kept_TD, w_ED, inverse_T1, scores_TE)
        return scores_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, w_ED, inverse_T1, scores_TE = ctx.saved_tensors
        x_TD = x_TD.to(w_ED.dtype)
        grad_TE = grads[0] * inverse_T1
        x_grad_TD = w_grad_ED = None
        if ctx.needs_input_grad[0]:
            radial_T1 = (grad_TE * scores_TE).sum(1, keepdim=True) * inverse_T1
            x_grad_TD = (grad_TE @ w_ED).addcmul_(x_TD, radial_T1, value=-1).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            w_grad_ED = grad_TE.t() @ x_TD
        return x_grad_TD, w_grad_ED
