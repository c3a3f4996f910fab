"""ReLU routing: every expert with a positive score serves the token.

Shape suffixes: T tokens, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routers import FP32, Router, Routing, StepTotals, hide_padding, one_target


class ReLURouter(Router):
    """Weights are the positive parts of a linear score, as they are (ReMoE, arXiv 2412.14711).

    Any number of experts serves a token, none too: the residual connection carries it. A loss, the
    L1 norm of the weights, makes them fewer; after each step its coefficient lambda is multiplied
    by ``lambda_rate`` where the share of pairs that do not fire is below 1 - target_k / E, else
    divided by it. The first hundred steps or so are nearly dense: until lambda counts.

    - ``target_k``: the mean number of experts that lambda drives at.
    - ``lambda_init``: lambda at the start. The task must not weigh the loss once more:
      ``moe.aux_weight=1``.
    - ``l1``: ``balanced`` weighs each expert's part by its load (the paper's refined loss, and its
      code), ``plain`` does not.
    - ``per_layer``: one lambda for each layer in place of one for the model.

    Weights have no bound: copies of an FFN do not start at its output.

    Raises:
        ValueError: a ``target_k`` out of reach, or a ``lambda_rate`` that moves nothing.
    """

    coefficient: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        target_k: float | Sequence[float] = 2.0,
        lambda_init: float = 1e-8,
        lambda_rate: float = 1.2,
        l1: Literal["balanced", "plain"] = "balanced",
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        target_k = one_target(target_k)
        if not 0 < target_k <= num_slots:
            raise ValueError(
                f"target_k is {target_k:g}: expected more than 0, up to the number of experts, "
                f"{num_slots}"
            )
        if lambda_rate <= 1 or lambda_init <= 0:
            raise ValueError(
                f"lambda_rate is {lambda_rate:g}, lambda_init {lambda_init:g}: expected more than "
                "1, and more than 0"
            )
        self.num_slots = num_slots
        self.target_k = target_k
        self.lambda_rate = lambda_rate
        self.l1 = l1
        self.per_layer = per_layer
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02))
        self.register_buffer("coefficient", torch.tensor(float(lambda_init), dtype=FP32))

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        self.check_pool(live)
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = self.logits(x_TD, live)
            mask_TE = hide_padding(scores_TE > 0, token_mask_T)
            weights_TE = scores_TE * mask_TE
            aux = scores_TE.new_zeros(())
            if self.recorded:
                target_k = self.target_k if self.l1 == "balanced" else None
                aux = self.coefficient * losses.l1(weights_TE, mask_TE, target_k, token_mask_T)
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return scores_TE.relu() * mask_TE

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor:
        return scores_TE.masked_fill(scores_TE <= 0, -torch.inf)

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        layers = [own] if self.per_layer else every
        pairs = torch.stack([each.load_S.sum() for each in layers]).sum()
        tokens = torch.stack([each.k_hist.sum() for each in layers]).sum()
        sparsity = 1 - pairs / (tokens.clamp(min=1) * self.num_slots)
        dense = sparsity < 1 - self.target_k / self.num_slots
        grown, fallen = self.coefficient * self.lambda_rate, self.coefficient / self.lambda_rate
        # Within bounds: from 0 no factor leads back.
        moved = torch.where(dense, grown, fallen).clamp(1e-20, 1e20)
        self.coefficient.copy_(torch.where(tokens > 0, moved, self.coefficient))

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {
            "thresholds": None,
            "target_k": self.target_k,
            "lambda": self.coefficient.item(),
        }

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        return f"k={self.target_k:g} on average of {self.num_slots}, l1={self.l1}"
