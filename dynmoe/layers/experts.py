"""The pool of expert FFNs, one module per slot, and the naive loop that specifies what it computes.

One module (hence one set of Parameters) per slot and not one stacked tensor: a slot without an
expert then has ``grad is None``, so it costs no compute, no optimizer pass and no weight decay.

Shape suffixes: T tokens, E living experts, R rows of routed pairs, N rows of one expert, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dynmoe.layers import dispatch
from dynmoe.layers.ffn import read_ffn
from dynmoe.layers.grouped import compute_dtype, grouped_ffn, row_multiple
from dynmoe.layers.routing import Routing
from dynmoe.layers.split import linears, split_ffn

Init = Literal["copy", "cluster", "random", "fresh"]


class Experts(nn.Module):
    """``num_slots`` FFNs made from one.

    ``init``: ``copy`` for full copies of it, ``cluster`` or ``random`` for shares of its hidden
    neurons (``split.py``), ``fresh`` for newly drawn ones of its size.

    ``mlp`` is any module that maps rows [N, D] to rows [N, D], each row by itself. FFNs of two
    plain linear layers (``ffn.read_ffn``) take the fast path of ``grouped.py``, where ``recompute``
    holds; others are called one after the other.

    Raises:
        ConfigError: ``cluster`` or ``random`` of an FFN that cannot be split so (``split_ffn``).
    """

    def __init__(
        self, mlp: nn.Module, num_slots: int, init: Init = "copy", recompute: bool = False
    ) -> None:
        super().__init__()
        if init == "cluster" or init == "random":
            self.slots = nn.ModuleList(split_ffn(mlp, num_slots, init))
        else:
            self.slots = nn.ModuleList(copy.deepcopy(mlp) for _ in range(num_slots))
        self.recompute = recompute
        if init == "fresh":
            for slot in self.slots:
                redraw(slot)

    def forward(self, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
        """Weighted sum of expert outputs for every token, [T, D]. Cost: one FFN row per pair."""
        experts = [self.slots[slot] for slot in live]
        if torch.compiler.is_exporting():
            return _traceable_forward(experts, x_TD, routing)
        return _sparse_forward(experts, x_TD, routing, self.recompute)

    @torch.no_grad()
    def mean_keys(self, live: Sequence[int]) -> Tensor:
        """The mean row of each expert's first matrix, fp32, [E, D]."""
        return torch.stack([linears(self.slots[slot])[0].weight.float().mean(0) for slot in live])

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots for good; slot ``slots[i]`` becomes slot i."""
        self.slots = nn.ModuleList(self.slots[slot] for slot in slots)


# Loads are new in every step: compiled code would be specialised on them, and compiled again.
@torch.compiler.disable
def _sparse_forward(
    experts: Sequence[nn.Module], x_TD: Tensor, routing: Routing, recompute: bool
) -> Tensor:
    ffns = [ffn for expert in experts if (ffn := read_ffn(expert)) is not None]
    grouped = len(ffns) == len(experts) and len({ffn.kind for ffn in ffns}) == 1
    p = dispatch.pairs(routing.dispatch_TE, row_multiple(x_TD) if grouped else 1)
    if not any(p.counts):  # zeros that backward() can start from
        return torch.zeros_like(x_TD, dtype=compute_dtype(x_TD)) + x_TD[:0].sum()
    if grouped:
        out_RD = grouped_ffn(x_TD, p, ffns, recompute)
    else:
        runs = dispatch.gather(x_TD, p).split(p.counts)
        out_RD = torch.cat(
            [expert(run) for expert, run in zip(experts, runs, strict=True) if len(run)]
        )
    return dispatch.combine(out_RD, routing.weights_TE, p)


def _traceable_forward(experts: Sequence[nn.Module], x_TD: Tensor, routing: Routing) -> Tensor:
    """The same in operations that ``torch.export`` and ONNX know, for any number of rows."""
    y_TD = torch.zeros_like(x_TD, dtype=compute_dtype(x_TD))
    for e, expert in enumerate(experts):
        token_N = routing.dispatch_TE[:, e].nonzero().squeeze(1)
        out_ND = expert(x_TD.index_select(0, token_N))
        weight_N1 = routing.weights_TE[:, e].index_select(0, token_N)[:, None]
        y_TD = y_TD.index_add(0, token_N, (weight_N1 * out_ND).to(y_TD.dtype))
    return y_TD


def naive_forward(experts: Experts, x_TD: Tensor, routing: Routing, live: Sequence[int]) -> Tensor:
    """What ``Experts.forward`` must compute, token by token. For tests: slow and obvious."""
    y_TD = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D) + x_D[:0].sum()  # backward() can start from it
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
