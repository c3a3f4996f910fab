"""Soft MoE: experts serve mixtures of a sequence's tokens (arXiv 2308.00951).

Shape suffixes: B sequences, N tokens of a sequence, E experts, P slots of an expert, S = E P slots
of all experts, R = B P rows of an expert, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynmoe.layers.experts import Experts, Init, check_ffn, same_rows, shared_expert, with_shared
from dynmoe.layers.moe import MaskedLayer
from dynmoe.layers.routers import sequence_length
from dynmoe.layers.tokens import check_mask, set_aside


class SoftSlots(nn.Module):
    """Slots, ``slots_per_expert`` of each expert: how tokens are mixed into them, and outputs out
    of them.

    ``norm``: ``l2``, the paper's: the product of unit tokens and unit slots, times a learned scale;
    slots mix the tokens as they are. ``rms``, of lucidrains' port: tokens and slots over their root
    mean square, times learned gains; slots mix the tokens so normalised.

    Raises:
        ValueError: ``slots_per_expert`` below 1.
    """

    sees_batch: ClassVar[bool] = True
    """Refused for causal models: see ``Router.sees_batch``. Here it is a sequence that is seen."""
    hands_on: ClassVar[bool] = False
    """See ``Router.hands_on``."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int = 4,
        norm: Literal["l2", "rms"] = "l2",
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(f"slots_per_expert is {slots_per_expert}: expected 1 or more")
        self.slots_per_expert = slots_per_expert
        self.norm = norm
        self.slots_EPD = nn.Parameter(
            torch.randn(num_experts, slots_per_expert, dim) / math.sqrt(dim)
        )
        if norm == "rms":
            self.token_gain_D = nn.Parameter(torch.ones(dim))
            self.slot_gain_D = nn.Parameter(torch.ones(dim))
        else:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x_BND: Tensor, token_mask_BN: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the tokens that slots mix, [B, N, D], and the weights of the mixtures and of the
        outputs, [B, N, S], all fp32. Dispatch weights sum to 1 over the real tokens of a sequence,
        combine weights over slots."""
        with _fp32(x_BND):
            x_BND, slots_SD = x_BND.float(), self.slots_EPD.float().flatten(0, 1)
            unit_BND, slots_SD = F.normalize(x_BND, dim=2), F.normalize(slots_SD, dim=1)
            if self.norm == "rms":
                root = math.sqrt(x_BND.shape[2])
                x_BND = unit_BND = unit_BND * (self.token_gain_D.float() * root)
                slots_SD = slots_SD * (self.slot_gain_D.float() * root)
            else:
                slots_SD = slots_SD * self.scale.float()
            logits_BNS = F.linear(unit_BND, slots_SD)
            combine_BNS = logits_BNS.softmax(2)
            if token_mask_BN is not None:
                # Finite: a sequence of padding has no NaN.
                lowest = torch.finfo(logits_BNS.dtype).min
                logits_BNS = logits_BNS.masked_fill(~token_mask_BN[..., None], lowest)
            return x_BND, logits_BNS.softmax(1), combine_BNS

    def extra_repr(self) -> str:
        experts = len(self.slots_EPD)
        return f"{experts} experts x {self.slots_per_expert} slots, norm={self.norm}"


class SoftMoELayer(MaskedLayer):
    """Mix a sequence's tokens into slots, compute them, mix the outputs. ``[B, ..., D] -> same``.

    A drop-in for an FFN where tokens may see each other: not in causal models. All experts serve
    every sequence, E P rows of it, so there is no k, no load and no auxiliary loss, and nothing is
    recorded. Padding and tokens that are not finite are in no mixture, and come out as 0.

    ``router`` is called as ``router(dim, num_experts)``; the other arguments are ``MoELayer``'s.
    Experts made as copies of a trained FFN do not start as it: they see mixtures.

    Raises:
        TypeError: ``router`` makes no ``SoftSlots``, or ``mlp`` is no module.
        ValueError: ``mlp`` does not map rows [N, ``dim``] to rows of the same shape and dtype.
    """

    def __init__(
        self,
        mlp: nn.Module,
        dim: int,
        router: Callable[[int, int], SoftSlots],
        num_experts: int,
        init: Init = "copy",
        recompute: bool = False,
        shared_experts: int = 0,
    ) -> None:
        super().__init__()
        check_ffn(mlp, dim)
        self.dim = dim
        self.router = router(dim, num_experts)
        if not isinstance(self.router, SoftSlots):
            raise TypeError(f"router: expected SoftSlots, found {type(self.router).__name__}")
        self.experts = Experts(mlp, num_experts, init)
        self.recompute = recompute
        self.shared = nn.ModuleList(shared_expert(mlp, init) for _ in range(shared_experts))

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """``token_mask`` (bool, x's shape without D) is False on padding; None: the one of
        ``mask_padding`` holds.

        Raises:
            ValueError: x of another width, rows of which it is not known which are of one
                sequence, or a mask of other tokens.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"expected x of shape [..., {self.dim}], found {list(x.shape)}")
        token_mask = self.token_mask if token_mask is None else token_mask
        if token_mask is not None:
            check_mask(token_mask, x)
        length = sequence_length(x.shape[:-1] if token_mask is None else token_mask.shape)
        if length is None:
            raise ValueError(
                f"expected x of shape [B, N, {self.dim}], found {list(x.shape)}: Soft MoE mixes "
                "the tokens of a sequence, and must know which they are. Pass a token_mask [B, N]"
            )
        token_mask_T = None if token_mask is None else token_mask.reshape(-1)
        x_TD, token_mask_T = set_aside(x.reshape(-1, self.dim), token_mask_T)
        mask_BN = None if token_mask_T is None else token_mask_T.view(-1, length)
        x_BND = x_TD.view(-1, length, self.dim)
        tokens_BND, dispatch_BNS, combine_BNS = self.router(x_BND, mask_BN)
        if mask_BN is not None:
            combine_BNS = combine_BNS * mask_BN[..., None]
        with _fp32(x):
            mixed_BSD = (dispatch_BNS.transpose(1, 2) @ tokens_BND).to(x.dtype)
        out_BSD = self._served(mixed_BSD)
        with _fp32(x):
            y_TD = (combine_BNS @ out_BSD.float()).to(out_BSD.dtype).view(-1, self.dim)
        return with_shared(self.shared, y_TD, x_TD, token_mask_T).view(x.shape)

    def _served(self, mixed_BSD: Tensor) -> Tensor:
        """The output of every slot's expert. Equal rows for all: nothing to sort or to count."""
        outs = []
        runs = mixed_BSD.unflatten(1, (len(self.experts.slots), -1)).unbind(1)
        for expert, run_BPD in zip(self.experts.slots, runs, strict=True):
            run_RD = run_BPD.reshape(-1, self.dim)
            if self.recompute and torch.is_grad_enabled():
                out_RD: Any = checkpoint(expert, run_RD, use_reentrant=False)
            else:
                out_RD = expert(run_RD)
            outs.append(same_rows(out_RD, run_RD).view(run_BPD.shape))
        return torch.cat(outs, 1)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, {len(self.experts.slots)} experts"


def _fp32(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast, which shapes without data do not have (``metrics.efficiency``)."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
