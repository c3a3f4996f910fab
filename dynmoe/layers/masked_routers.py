"""Top-k whose choices a second router may leave out.

Shape suffixes: T tokens, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.budget import move_shift
from dynmoe.layers.fixed_routers import TopKRouter
from dynmoe.layers.quantile import BINS, count_distances
from dynmoe.layers.routers import FP32, Routing, StepTotals, hide_padding, one_target


class MaskedTopKRouter(TopKRouter):
    """Top-k, and a binary mask over its choices: 0 to k experts a token (BEAM, arXiv 2605.14438).

    A choice stays iff sigmoid(x . m_e) reaches 1/2. The mask router m starts at zero, where all
    choices stay, so that a top-k model starts as it is. The mask is hard, with the sigmoid's
    gradient; the weights of the choices that stay are not divided by their sum anew.

    - ``balance_weight``: of top-k's balance loss over the choices.
    - ``mask_weight``: of the mean share of choices that stay, which makes them fewer.
    - ``gate_grad``: the task's gradient reaches the masks of ``all`` choices, every one of which is
      computed in training, or of the ``chosen`` ones that stay, at their cost.
    - ``target_k``: mean k that a shift of all masks' thresholds holds, as
      ``BudgetTopAnyRouter``'s does, with ``budget_rate``; None: the losses decide.

    Raises:
        ValueError: ``top_k`` beyond the experts, or a ``target_k`` beyond ``top_k``.
    """

    shift: Tensor
    trend: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 2,
        balance_weight: float = 0.01,
        mask_weight: float = 0.01,
        gate_grad: Literal["all", "chosen"] = "all",
        target_k: float | Sequence[float] | None = None,
        budget_rate: float = 0.3,
    ) -> None:
        super().__init__(dim, num_slots, top_k)
        target_k = None if target_k is None else one_target(target_k)
        if target_k is not None and not 0 < target_k <= top_k:
            raise ValueError(
                f"target_k is {target_k:g}: expected more than 0, up to top_k, {top_k}"
            )
        self.balance_weight = balance_weight
        self.mask_weight = mask_weight
        self.gate_grad = gate_grad
        self.target_k = target_k
        self.budget_rate = budget_rate
        self.observes = 0 if target_k is None else BINS
        self.mask_weights = nn.Parameter(torch.zeros(num_slots, dim))
        self.register_buffer("shift", torch.zeros((), dtype=FP32))
        self.register_buffer("trend", torch.zeros((), dtype=FP32))

    @property
    def has_state(self) -> bool:
        return self.target_k is not None

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        top_k = super().forward(x_TD, live, token_mask_T, shape)
        choice_TE = top_k.mask_TE
        with torch.autocast(x_TD.device.type, enabled=False):
            margin_TE = F.linear(x_TD.float(), self.mask_weights.float()) - self.shift
            mask_TE = choice_TE & (margin_TE >= 0)
            soft_TE = margin_TE.sigmoid()
            through_TE = soft_TE - soft_TE.detach()
            reached_TE = mask_TE if self.gate_grad == "chosen" else choice_TE
            weights_TE = top_k.weights_TE * (mask_TE + through_TE * reached_TE)
            aux = self.balance_weight * top_k.aux
            if self.recorded:
                stay = losses.mean_k(mask_TE + through_TE, choice_TE, token_mask_T) / self.top_k
                aux = aux + self.mask_weight * stay
            observed = None
            if self.observes and self.training:
                observed = count_distances(margin_TE.view(-1, 1), choice_TE.reshape(-1, 1))[0]
        return Routing(
            weights_TE,
            mask_TE,
            top_k.scores_TE,
            hide_padding(~mask_TE.any(1), token_mask_T),
            aux,
            reached_TE if self.training else mask_TE,
            observed=observed,
        )

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        best = scores_TE.topk(self.top_k, dim=1).indices
        choice_TE = torch.zeros_like(mask_TE).scatter_(1, best, True)
        return super().weigh(scores_TE, choice_TE) * mask_TE

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        assert self.target_k is not None
        move_shift(self.shift, self.trend, own, self.target_k, self.budget_rate)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": None, "target_k": self.target_k, "shift": self.shift.item()}

    def flops(self, dim: int) -> tuple[int, int]:
        return 4 * dim, 0

    def extra_repr(self) -> str:
        return f"k=0 to {self.top_k} of {self.num_slots}, gate_grad={self.gate_grad}"
