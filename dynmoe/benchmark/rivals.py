"""How others compute a sparse layer: the same function, each by its own data flow.

Every rival maps ``(x_TD, weights_TE, mask_TE, ffn)`` to ``y_t = sum of weight_te * ffn_e(x_t)``
over the experts in the token's mask, differentiable in the tokens, the weights and the FFNs.

Shape suffixes: T tokens, E experts, P pairs, C capacity of an expert, K most experts of a token,
D model width, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class StackedFFN(NamedTuple):
    """Linear-GELU-Linear of all experts in stacked tensors, as all of these libraries hold it."""

    w1_EHD: Tensor
    b1_EH: Tensor
    w2_EDH: Tensor
    b2_ED: Tensor

    def one(self, e: int, x_PD: Tensor) -> Tensor:
        """Expert e on its rows. Indexing has a backward that fills a whole [E, ...] tensor."""
        h_PH = F.gelu(F.linear(x_PD, self.w1_EHD[e], self.b1_EH[e]))
        return F.linear(h_PH, self.w2_EDH[e], self.b2_ED[e])

    def batched(self, x_ECD: Tensor) -> Tensor:
        """Every expert on its own C rows."""
        h_ECH = F.gelu(torch.baddbmm(self.b1_EH[:, None], x_ECD, self.w1_EHD.mT))
        return torch.baddbmm(self.b2_ED[:, None], h_ECH, self.w2_EDH.mT)


Rival = Callable[[Tensor, Tensor, Tensor, StackedFFN], Tensor]


def naive_loop(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """What one writes first: select each expert's tokens by a boolean mask, add the results."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(mask_TE.shape[1]):
        token_P = mask_TE[:, e].nonzero().squeeze(1)
        out_PD = ffn.one(e, x_TD[token_P]) * weights_TE[token_P, e, None]
        y_TD.index_add_(0, token_P, out_PD.to(y_TD.dtype))
    return y_TD


def hf_loop(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """MixtralExperts.forward of Hugging Face transformers 5 (models/mixtral/modeling_mixtral.py).

    Its experts are gated (three matrices); here they are the two-matrix FFN of all cases. It takes
    K indices per token, so a token with fewer gets the id E, which the loop skips.
    """
    experts = mask_TE.shape[1]
    with torch.no_grad():
        index_TE = torch.where(mask_TE, torch.arange(experts, device=mask_TE.device), experts)
        index_TK = index_TE.sort(dim=1).values[:, : int(mask_TE.sum(1).max())]
        hit_EKT = F.one_hot(index_TK, experts + 1).permute(2, 1, 0)
        hit_E = (hit_EKT.sum((-1, -2)) > 0).nonzero()
    weights_TK = F.pad(weights_TE, (0, 1)).gather(1, index_TK)
    y_TD = torch.zeros_like(x_TD)
    for (e,) in hit_E.tolist():
        if e == experts:
            continue
        place_P, token_P = torch.where(hit_EKT[e])
        out_PD = ffn.one(e, x_TD[token_P]) * weights_TK[token_P, place_P, None]
        y_TD.index_add_(0, token_P, out_PD.to(y_TD.dtype))
    return y_TD


def padded(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """One-hot einsum dispatch of GShard (arXiv 2006.16668, Algorithm 1) and DeepSpeed.

    deepspeed/moe/sharded_moe.py; DynMoE's published code follows it. Dropless: the capacity is the
    load of the busiest expert.
    """
    place_C = torch.arange(int(mask_TE.sum(0).max()), device=mask_TE.device)
    hit_TEC = (mask_TE.cumsum(0) - 1)[..., None] == place_C
    dispatch_TEC = (hit_TEC & mask_TE[..., None]).to(x_TD.dtype)
    combine_TEC = weights_TE.to(x_TD.dtype)[..., None] * dispatch_TEC
    out_ECD = ffn.batched(torch.einsum("tec,td->ecd", dispatch_TEC, x_TD))
    return torch.einsum("tec,ecd->td", combine_TEC.to(out_ECD.dtype), out_ECD)


def padded_bmm(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """The same padding by index instead of one-hot products, as Tutel does (arXiv 2206.03382)."""
    experts, capacity = mask_TE.shape[1], int(mask_TE.sum(0).max())
    token_P, expert_P = mask_TE.nonzero(as_tuple=True)
    place_P = expert_P * capacity + (mask_TE.cumsum(0) - 1)[mask_TE]
    rows_RD = x_TD.new_zeros(experts * capacity, x_TD.shape[1]).index_copy(
        0, place_P, x_TD[token_P]
    )
    out_PD = ffn.batched(rows_RD.view(experts, capacity, -1)).flatten(0, 1)[place_P]
    out_PD = out_PD * weights_TE[mask_TE][:, None]
    return torch.zeros_like(x_TD).index_add(0, token_P, out_PD.to(x_TD.dtype))


def dense_then_mask(x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, ffn: StackedFFN) -> Tensor:
    """Every expert on every token: the short way to write a soft or thresholded mixture."""
    out_ETD = ffn.batched(x_TD.expand(mask_TE.shape[1], -1, -1))
    return torch.einsum("te,etd->td", (weights_TE * mask_TE).to(out_ETD.dtype), out_ETD)


RIVALS: dict[str, Rival] = {
    "naive loop": naive_loop,
    "hf loop": hf_loop,
    "padded": padded,
    "padded_bmm": padded_bmm,
    "dense then mask": dense_then_mask,
}
