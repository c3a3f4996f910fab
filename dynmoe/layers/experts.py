"""The pool of expert FFNs, one module per slot, and the naive loop that specifies what it computes.

One module (hence one set of Parameters) per slot and not one stacked tensor: a slot without an
expert then has ``grad is None``, so it costs no compute, no optimizer pass and no weight decay.

Shape suffixes: T tokens, E living experts, P routed pairs, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dynmoe.layers import dispatch
from dynmoe.layers.routing import Routing

Init = Literal["upcycle", "fresh"]


class Experts(nn.Module):
    """``num_slots`` FFNs made from one: copies of it (``upcycle``) or newly drawn (``fresh``).

    ``mlp`` is any module that maps rows [N, D] to rows [N, D], each row by itself.
    """

    def __init__(self, mlp: nn.Module, num_slots: int, init: Init = "upcycle") -> None:
        super().__init__()
        self.slots = nn.ModuleList(copy.deepcopy(mlp) for _ in range(num_slots))
        if init == "fresh":
            for slot in self.slots:
                redraw(slot)

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        """Weighted sum of expert outputs for every token, [T, D]. Cost: one FFN row per pair."""
        p = dispatch.pairs(routing.dispatch_TE)
        if not any(p.counts):
            return torch.zeros_like(x_TD)
        rows = dispatch.gather(x_TD, p).split(p.counts)
        out_PD = torch.cat(
            [self.slots[slot](row) for slot, row in zip(live, rows, strict=True) if len(row)]
        )
        weight_P = routing.weights_TE[p.token_P, p.expert_P].to(out_PD.dtype)
        return dispatch.combine(out_PD, weight_P, p)

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots for good; slot ``slots[i]`` becomes slot i."""
        self.slots = nn.ModuleList(self.slots[slot] for slot in slots)


def naive_forward(experts: Experts, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
    """What ``Experts.forward`` must compute, token by token. For tests: slow and obvious."""
    y_TD = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for e, slot in enumerate(live):
            if routing.dispatch_TE[t, e]:
                out_D = experts.slots[slot](x_D[None])[0]
                y_D = y_D + routing.weights_TE[t, e].to(out_D.dtype) * out_D
        y_TD.append(y_D)
    return torch.stack(y_TD)


@torch.no_grad()
def redraw(mlp: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw an FFN anew, as timm's ViTs do: truncated normal weights of std 0.02, zero biases."""
    for module in mlp.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
