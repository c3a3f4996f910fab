"""Token gradient conflict: a loss for tokens whose gradient opposes that of their expert's others.

STGC (arXiv 2406.19905), as its reviews tell it: no code was released. Pair (t, e) conflicts if the
cosine of its gradient with the mean over the expert's pairs is below a threshold. The loss is the
mean of ``-log softmax(-z_t)[e]`` over conflicting pairs, z the router's logits: it lowers z_te.

Gradients of pairs are there in the backward pass alone, and so is the loss. In the forward pass it
is a 0, through which the backward pass learns how the loss is weighed and scaled; one pass makes
all gradients.

Shape suffixes: T tokens, E living experts, C columns of the logits (E first), P pairs sorted by
token, R rows sorted by expert, D model width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dynmoe.errors import ConfigError
from dynmoe.layers.dispatch import Pairs, sum_by_token


class ConflictLoss:
    """The loss of one layer: its options, and what was found since ``take``.

    - ``weight``: of the loss, beta in the paper; 0 is no loss, and costs nothing.
    - ``threshold``: pairs with a cosine below it conflict, tau in the paper.
    - ``every``, ``start``: the loss counts in every so many optimizer steps, from step ``start``.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self, weight: float = 1.0, threshold: float = 0.0, every: int = 1, start: int = 0
    ) -> None:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ConfigError(f"moe.conflict.weight: expected 0 or more, found {weight}")
        if not -1 <= threshold <= 1:
            raise ConfigError(
                f"moe.conflict.threshold: expected a cosine, -1 to 1, found {threshold}"
            )
        if every < 1 or start < 0:
            raise ConfigError(
                f"moe.conflict: expected every of 1 or more and start of 0 or more, found "
                f"every={every}, start={start}"
            )
        self.weight = weight
        self.threshold = threshold
        self.every = every
        self.start = start
        # Not a buffer: DDP would overwrite it with rank 0's at every forward.
        self._found_3: Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Whether the loss counts in the optimizer step after ``step`` others."""
        return step >= self.start and (step - self.start) % self.every == 0

    def add(self, found_3: Tensor) -> None:
        before = self._found_3
        self._found_3 = found_3 if before is None else before.to(found_3.device) + found_3

    def take(self, device: torch.device) -> Tensor:
        """Return the number of pairs and of conflicting ones and the sum of cosines, and forget
        them; float64."""
        found_3, self._found_3 = self._found_3, None
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=device) if found_3 is None else found_3.to(device)


class Conflict:
    """One call of a layer: finds the conflicts among its pairs in the backward pass."""

    def __init__(self, of: ConflictLoss, logits_TC: Tensor) -> None:
        self.of = of
        self.logits_TC = logits_TC
        self.loss: Tensor | None = None
        """A scalar 0, whose gradient is that of the loss; fp32. None where no expert ran."""

    def watch(self, out_RD: Tensor, p: Pairs, mask_TE: Tensor) -> Tensor:
        """Return ``out_RD``, the outputs of the pairs, as they are."""
        out_RD, self.loss = _Watched.apply(out_RD, self.logits_TC, p, mask_TE, self.of)
        return out_RD


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out_RD: Tensor, logits_TC: Tensor, p: Pairs, mask_TE: Tensor, of: ConflictLoss
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        real_P = mask_TE[p.token_P, p.expert_P]  # pairs computed for a gradient alone are none
        ctx.save_for_backward(logits_TC, p.end_E, p.token_P, p.expert_P, p.row_P, real_P)
        ctx.of = of
        return out_RD.view_as(out_RD), logits_TC.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_RD, factor = grads
        if grad_RD is None or factor is None:  # the loss is not asked for
            return grad_RD, None, None, None, None
        logits_TC, end_E, token_P, expert_P, row_P, real_P = ctx.saved_tensors
        start_E = F.pad(end_E[:-1], (1, 0))
        cosine_P, counts_P = cosines(grad_RD, start_E, expert_P, row_P)
        counts_P = counts_P & real_P
        flags_P = counts_P & (cosine_P < ctx.of.threshold)
        ctx.of.add(
            torch.stack(
                [counts_P.sum(), flags_P.sum(), torch.where(counts_P, cosine_P, 0).sum()]
            ).to(torch.float32 if grad_RD.device.type == "mps" else torch.float64)
        )
        flags_TC = torch.zeros_like(logits_TC)
        flags_TC[token_P, expert_P] = flags_P.to(flags_TC.dtype)
        return grad_RD, factor * gradient(logits_TC, flags_TC), None, None, None


def cosines(
    grad_RD: Tensor, start_E: Tensor, expert_P: Tensor, row_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the cosine of every pair's gradient with the mean of its expert's, fp32, [P], and
    which pairs have one: those whose gradients are neither 0 nor infinite."""
    grad_RD = grad_RD.float()
    rows_R = torch.arange(len(grad_RD), device=grad_RD.device)
    sum_ED = sum_by_token(grad_RD, rows_R, start_E)  # of the direction of the mean
    dot_P = (grad_RD @ sum_ED.t())[row_P, expert_P]
    norm_P = torch.linalg.vector_norm(grad_RD, dim=1)[row_P]
    norm_P = norm_P * torch.linalg.vector_norm(sum_ED, dim=1)[expert_P]
    cosine_P = dot_P / norm_P
    return cosine_P, (norm_P > 0) & cosine_P.isfinite()


def gradient(logits_TC: Tensor, flags_TC: Tensor) -> Tensor:
    """The gradient of the loss by the logits, [T, C]; 0 without a conflicting pair."""
    share_TC = (-logits_TC).softmax(1)
    number = flags_TC.sum().clamp(min=1)
    return (flags_TC - flags_TC.sum(1, keepdim=True) * share_TC) / number
