"""Top-any gating that holds a mean number of experts per token.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers.quantile import BINS, count_distances, distance_to
from dynmoe.layers.routers import (
    FP32,
    Routing,
    StepTotals,
    TopAnyRouter,
    hide_padding,
    one_target,
)


class BudgetTopAnyRouter(TopAnyRouter):
    """Top-any gating whose mean k over real tokens is ``target_k``.

    Expert e serves token x iff cos(x, w_e) > G_e + shift: DynMoE's gate with thresholds that one
    ``shift`` per layer moves together. The shift is a buffer. After each step it goes
    ``budget_rate`` of the way to where the step's tokens would have had ``target_k`` experts on
    average, and further by the ``trend`` of such ways; no gradient moves it. Which tokens get
    more experts than others is learned as ever.

    - ``unserved``: a training token below all thresholds gets ``nothing``, as in the paper, or its
      ``best`` expert, as at evaluation: then mean k is the same number in both.
    - ``weights``: the ``mean`` of the chosen experts, or the ``softmax`` of their scores divided by
      ``temperature``, through which directions have a gradient beside the gate's;
      ``learn_temperature`` trains its logarithm.
    - ``scale``: weights ``sum`` to 1: the output of equal experts does not depend on k. ``norm``:
      their squares sum to 1 / target_k: the output of independent experts does not depend on k.
    - ``gate_grad``: as in ``TopAnyRouter``, or ``none``: thresholds stay, softmax weights and
      auxiliary losses move the directions.
    - ``missing``: the tokens that the adaptation adds an expert for are those below all thresholds
      ``before`` the shift, which the budget did not turn away, or ``after`` it, as the paper.

    Raises:
        ValueError: a ``target_k`` out of reach, or options that leave nothing to train.
    """

    shift: Tensor
    trend: Tensor
    observes = BINS

    def __init__(
        self,
        dim: int,
        num_slots: int,
        target_k: float | Sequence[float] = 2.0,
        budget_rate: float = 0.3,
        unserved: Literal["best", "nothing"] = "best",
        weights: Literal["mean", "softmax"] = "mean",
        temperature: float = 0.1,
        learn_temperature: bool = False,
        scale: Literal["sum", "norm"] = "sum",
        gate_grad: Literal["chosen", "all", "none"] = "chosen",
        missing: Literal["before", "after"] = "before",
        columns: Literal["raw", "normalised"] = "raw",
        simplicity_over: Literal["living", "all"] = "living",
        smoothing: float = 1e-3,
        balance_weight: float = 0.0,
        efficiency_weight: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_slots,
            gate_grad="all" if gate_grad == "all" else "chosen",
            columns=columns,
            simplicity_over=simplicity_over,
            smoothing=smoothing,
            balance_weight=balance_weight,
            efficiency_weight=efficiency_weight,
        )
        target_k = one_target(target_k)
        least = 1 if unserved == "best" else 0
        if not least <= target_k <= num_slots or target_k == 0:
            raise ValueError(
                f"target_k is {target_k:g}: expected {'1' if least else 'more than 0'} to the "
                f"number of slots, {num_slots}; less than 1 needs unserved=nothing"
            )
        if gate_grad == "none" and weights == "mean":
            raise ValueError(
                "gate_grad=none with weights=mean: the task would train no router. Set "
                "weights=softmax, or gate_grad=chosen"
            )
        if gate_grad == "all" and weights == "softmax":
            raise ValueError(
                "gate_grad=all with weights=softmax: experts that were not chosen have no weight. "
                "Set gate_grad=chosen, or weights=mean"
            )
        self.target_k = target_k
        self.budget_rate = budget_rate
        self.unserved = unserved
        self.weights = weights
        self.graded = weights == "softmax"
        self.temperature: float | nn.Parameter = temperature
        if learn_temperature:
            if weights != "softmax":
                raise ValueError("learn_temperature=true needs weights=softmax")
            self.temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.scale = scale
        self.trains_gate = gate_grad != "none"
        self.missing = missing
        self.register_buffer("shift", torch.zeros((), dtype=FP32))
        self.register_buffer("trend", torch.zeros((), dtype=FP32))

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        routing = super().forward(x_TD, live, token_mask_T)
        distance_TE = (routing.scores_TE - self._thresholds(live)).detach()
        if self.missing == "before":
            turned_away_T = (distance_TE + self.shift > 0).any(1)
            routing = routing._replace(unserved_T=routing.unserved_T & ~turned_away_T)
        if not self.training:
            return routing
        if self.unserved == "best":  # one expert serves the token wherever the thresholds are
            best_TE = F.one_hot(distance_TE.argmax(1), len(live)).bool()
            distance_TE = distance_TE.masked_fill(best_TE, torch.inf)
        real_TE = hide_padding(torch.ones_like(routing.mask_TE), token_mask_T)
        counts_B = count_distances(distance_TE.view(-1, 1), real_TE.reshape(-1, 1))[0]
        return routing._replace(observed=counts_B)

    def _thresholds(self, live: Sequence[int]) -> Tensor:
        return super()._thresholds(live) + self.shift

    def _admit(self, scores_TE: Tensor, mask_TE: Tensor, unserved_T: Tensor) -> Tensor:
        if self.training and self.unserved == "nothing":
            return mask_TE
        best_TE = F.one_hot(scores_TE.argmax(1), scores_TE.shape[1]).bool()
        return mask_TE | (best_TE & unserved_T[:, None])

    def _fall_back(
        self, scores_TE: Tensor, mask_TE: Tensor, weights_TE: Tensor, unserved_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        return mask_TE, weights_TE  # admitted above

    def _gate(self, margin_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return super()._gate(margin_TE, mask_TE) if self.trains_gate else mask_TE.float()

    def _weights(self, gate_TE: Tensor, mask_TE: Tensor, scores_TE: Tensor) -> Tensor:
        k_T1 = mask_TE.sum(1, keepdim=True).clamp(min=1)
        if self.weights == "softmax":
            # A row without an expert is all of one value, and the gate makes it 0.
            temperature: float | Tensor = self.temperature
            if isinstance(temperature, nn.Parameter):
                temperature = temperature.exp()
            logits_TE = (scores_TE / temperature).masked_fill(~mask_TE, -1e9)
            share_TE = logits_TE.softmax(1)
            length_T1 = torch.linalg.vector_norm(share_TE, dim=1, keepdim=True)
        else:
            share_TE, length_T1 = 1 / k_T1.float(), k_T1.float().rsqrt()
        if self.scale == "norm":
            share_TE = share_TE / (length_T1 * math.sqrt(self.target_k))
        return gate_TE * share_TE

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        move_shift(self.shift, self.trend, own, self.target_k, self.budget_rate)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {
            "thresholds": self._thresholds(live).tolist(),
            "shift": self.shift.item(),
            "target_k": self.target_k,
        }

    def extra_repr(self) -> str:
        return (
            f"k={self.target_k:g} on average of {len(self.directions)} slots, "
            f"unserved={self.unserved}, weights={self.weights}, scale={self.scale}"
        )


def move_shift(shift: Tensor, trend: Tensor, own: StepTotals, target_k: float, rate: float) -> None:
    """Move ``shift``, and the ``trend`` of its moves, to where mean k would be ``target_k``.

    ``own.observed`` counts scores by their distance from the thresholds (``count_distances``).
    """
    wanted = target_k * own.k_hist.sum()
    distance = distance_to(wanted[None], own.observed[None])[0]
    # NOTE: scores and thresholds move while they are trained: without the second integrator k
    # would be off by what they move in 1 / rate steps. rate^2 / 4 is critical damping. It must
    # not wind up: it sums near the target alone, and where no token is (a layer that did not
    # run) or no way is left (k of 1, or of all experts), nothing moves.
    near = (own.mean_k / target_k - 1).abs() < 0.25
    shift += (rate * distance + trend) * (distance != 0)
    trend += rate**2 / 4 * distance * near
