"""What every router returns. Routers know nothing of experts.

Every router is called as ``router(x_TD, live, token_mask_T) -> Routing``. ``live`` lists the slots
that hold an expert; column j of every result belongs to slot ``live[j]``. Scores, gates and losses
are computed in fp32 under any autocast.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, linalg
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
    """Cosine similarity of every row of ``x_TD`` with every row of ``w_ED``, [T, E].

    The token's norm divides the [T, E] product: no normalised copy of the tokens is made.
    """
    norm_T1 = linalg.vector_norm(x_TD, dim=1, keepdim=True).clamp(min=1e-12)
    return F.linear(x_TD, F.normalize(w_ED, dim=1)) / norm_T1
