"""The tokens of a call: which count, those that are not finite, and sums over their routing.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dynmoe.layers.routers import Routing


class RoutingStats(NamedTuple):
    """Sums over the real, finite tokens of one forward pass, detached."""

    load_E: Tensor
    """Tokens of each living expert."""
    k_hist: Tensor
    """Tokens that chose k experts, k = 0 to E; before any evaluation fallback."""
    unserved_D: Tensor
    """Sum of the inputs no expert serves: R_S of DynMoE's Algorithm 1, fp32."""


def check_mask(token_mask: Tensor, x: Tensor) -> None:
    """Raises ValueError for a token mask that is not one of the input ``x`` of a layer."""
    check_bool(token_mask)
    shape = x.shape[:-1]
    # Some blocks pass the tokens of all sequences as rows.
    if token_mask.shape != shape and not (x.ndim == 2 and token_mask.numel() == len(x)):
        raise ValueError(
            f"token_mask: expected the shape of x without its last dimension, {list(shape)} of "
            f"{list(x.shape)}, found {list(token_mask.shape)}"
        )


def check_bool(token_mask: Tensor) -> None:
    """Raises ValueError for a token mask of another dtype."""
    if token_mask.dtype != torch.bool:
        raise ValueError(
            f"token_mask: expected torch.bool, False on padding, found {token_mask.dtype} of shape "
            f"{list(token_mask.shape)}. Write attention_mask.bool()"
        )


def set_aside(x_TD: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Put 0 in the place of tokens that are not finite, and take them out of the mask.

    One pass over [T, D], and a copy of it where there is no host to ask: 0 times NaN would be NaN
    in the gradients of routers, which sum over all tokens.
    """
    norm_T = torch.linalg.vector_norm(
        x_TD.detach(), dim=1, dtype=torch.promote_types(x_TD.dtype, torch.float32)
    )
    finite_T = norm_T.isfinite()
    if x_TD.device.type == "cpu" and not torch.compiler.is_compiling() and bool(finite_T.all()):
        return x_TD, token_mask_T
    return (
        x_TD.masked_fill(~finite_T[:, None], 0),
        finite_T if token_mask_T is None else token_mask_T & finite_T,
    )


def of_some(aux: Tensor, x_TD: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return ``aux``, or 0 of the same graph where no token counts: ranks that have some agree with
    those that have none on which parameters get gradients."""
    if token_mask_T is None:
        return aux if len(x_TD) else aux.nan_to_num() * 0
    return torch.where(token_mask_T.any(), aux, 0)


def routing_stats(x_TD: Tensor, routing: Routing, token_mask_T: Tensor | None) -> RoutingStats:
    """Sum over real tokens; a few passes over [T, E] and one over [T, D], no host sync."""
    # NOTE: in fp32 under any autocast, because a window of bf16 sums would stagnate. Detached,
    # because the window would keep the graphs of all its steps.
    with torch.autocast(x_TD.device.type, enabled=False):
        unserved_D = routing.unserved_T.float() @ x_TD.detach().float()
    # The mask may hold the evaluation fallback of a token that no expert served: its k is 0.
    k_T = routing.mask_TE.sum(1).masked_fill(routing.unserved_T, 0)
    if token_mask_T is not None:
        k_T = k_T.masked_fill(~token_mask_T, -1)
    each_k = torch.arange(routing.mask_TE.shape[1] + 1, device=k_T.device)
    return RoutingStats(
        load_E=routing.mask_TE.sum(0),
        k_hist=(k_T[:, None] == each_k).sum(0),
        unserved_D=unserved_D,
    )
