"""How others compute a sparse layer, on equal weights and routing.

Shape suffixes: T tokens, E experts, P pairs, C capacity of an expert, K experts of a token, D model
width, H hidden width, I width of the first product: H, gated 2 H.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import Experts
from dynmoe.layers.ffn import GatedFFN


class StackedFFN(NamedTuple):
    """The FFNs of all experts in stacked tensors, as all of these libraries hold them.

    Linear, GELU, Linear; without biases it is gated, gate and up in one matrix.
    """

    w1_EID: Tensor
    b1_EI: Tensor | None
    w2_EDH: Tensor
    b2_ED: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def activate(self, pre_I: Tensor) -> Tensor:
        if self.b1_EI is not None:
            return F.gelu(pre_I)
        gate_H, up_H = pre_I.chunk(2, dim=-1)
        return F.silu(gate_H) * up_H

    def one(self, e: int, x_PD: Tensor) -> Tensor:
        """Expert e on its rows. Indexing has a backward that fills a whole [E, ...] tensor."""
        b1_I, b2_D = (None if b is None else b[e] for b in (self.b1_EI, self.b2_ED))
        return F.linear(self.activate(F.linear(x_PD, self.w1_EID[e], b1_I)), self.w2_EDH[e], b2_D)

    def batched(self, x_ECD: Tensor) -> Tensor:
        """Every expert on its own C rows."""
        return _bmm(self.activate(_bmm(x_ECD, self.w1_EID, self.b1_EI)), self.w2_EDH, self.b2_ED)


def _bmm(x_ECI: Tensor, w_EOI: Tensor, b_EO: Tensor | None) -> Tensor:
    if b_EO is None:
        return torch.bmm(x_ECI, w_EOI.mT)
    return torch.baddbmm(b_EO[:, None], x_ECI, w_EOI.mT)


def stack(experts: Experts) -> StackedFFN:
    """Return a pool of Linear-GELU-Linear or of gated FFNs in stacked leaf tensors."""

    def stacked(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors).detach().requires_grad_()

    slots: list[Any] = list(experts.slots)
    if isinstance(slots[0], GatedFFN):
        first = [torch.cat([slot.gate.weight, slot.up.weight]) for slot in slots]
        return StackedFFN(stacked(first), None, stacked([slot.down.weight for slot in slots]), None)
    each = [(fc1.weight, fc1.bias, fc2.weight, fc2.bias) for fc1, _, fc2 in slots]
    return StackedFFN(*(stacked(list(tensors)) for tensors in zip(*each, strict=True)))


# Rivals map ``(x_TD, weights_TE, mask_TE, ffn)`` to ``y_t = sum of weight_te * ffn_e(x_t)`` over
# the experts in the token's mask, differentiable in the tokens, the weights and the FFNs.

Rival = Callable[[Tensor, Tensor, Tensor, StackedFFN], Tensor]


def naive_loop(
    x_TD: Tensor, weights_TE: Tensor, mask_TE: Tensor, one: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The usual first version: select each expert's tokens by a mask, add ``one(e, rows)``."""
    y_TD = torch.zeros_like(x_TD)
    for e in range(mask_TE.shape[1]):
        token_P = mask_TE[:, e].nonzero().squeeze(1)
        out_PD = one(e, x_TD[token_P]) * weights_TE[token_P, e, None]
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
    "naive loop": lambda x_TD, weights_TE, mask_TE, ffn: naive_loop(
        x_TD, weights_TE, mask_TE, ffn.one
    ),
    "padded": padded,
    "padded_bmm": padded_bmm,
    "dense then mask": dense_then_mask,
}


HF = {f"hf {name}": name for name in ("eager", "grouped_mm", "batched_mm")}
"""Cases of transformers, and its names of them in ``experts_implementation``."""


def transformers_experts(ffn: StackedFFN, implementation: str) -> nn.Module:
    """Return the experts of transformers' Mixtral with the weights of a gated ``ffn``.

    They map tokens [T, D], indices [T, K] and weights [T, K] of the chosen experts to [T, D].
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, dim, hidden = len(ffn.w1_EID), *ffn.w2_EDH.shape[1:]
    config = MixtralConfig(hidden_size=dim, intermediate_size=hidden, num_local_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = nn.Parameter(ffn.w1_EID.detach().clone())
    module.down_proj = nn.Parameter(ffn.w2_EDH.detach().clone())
    return module
