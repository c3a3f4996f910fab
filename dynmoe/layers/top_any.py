"""Top-any gating: every token decides by thresholds how many experts it activates.

Shape suffixes: T tokens, E living experts, S slots, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routing import Routing, cosine


class TopAnyRouter(nn.Module):
    """Top-any gating: expert e serves token x iff sigmoid(cos(x, w_e)) > sigmoid(G_e).

    DynMoE (arXiv 2405.14297), Eq. 2-6. The gate is hard with a straight-through gradient, the
    output the plain mean of the chosen experts. In training a token may choose none: it then gets
    exactly 0 and is reported in ``unserved_T``; at evaluation it falls back to its best expert.

    Each slot has its own direction and threshold Parameter, so that a slot without an expert has no
    gradient and no optimizer pass, and a new expert starts with fresh optimizer state.

    Options name the points where the paper and its two code bases differ:

    - ``gate_grad``: task gradient of the gate reaches the ``chosen`` experts only (both code bases
      have a ReLU before the straight-through sign), or ``all`` living ones. The latter needs every
      expert's output for every token in training: dense cost.
    - ``combine``: weight 1/k with ``constant_k`` (a token with k = 1 still teaches its gate), with
      the gradient ``through_k`` (it does not), or as the ``tutel`` code base does: through k if any
      token of the batch has k > 1, else the raw gate; at evaluation its fallback weight is the raw
      sigmoid score in a batch without any k > 1, so a token's output depends on its batch mates.
    - ``aux``: ``diverse_simple`` (Eq. 7) or ``gshard`` (the tutel vision runs' default);
      ``columns``: ``raw`` as in Eq. 7, or ``normalised`` as in both code bases;
      ``simplicity_over``: ``living`` experts or ``all`` slots (both code bases);
      ``smoothing``: see ``losses.diversity``; ``balance_weight`` and ``efficiency_weight``: the two
      terms that the DeepSpeed code base added in January 2025.
    """

    adaptive = True

    def __init__(
        self,
        dim: int,
        num_slots: int,
        gate_grad: Literal["chosen", "all"] = "chosen",
        combine: Literal["constant_k", "through_k", "tutel"] = "constant_k",
        aux: Literal["diverse_simple", "gshard"] = "diverse_simple",
        columns: Literal["raw", "normalised"] = "raw",
        simplicity_over: Literal["living", "all"] = "living",
        smoothing: float = 1e-3,
        balance_weight: float = 0.0,
        efficiency_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_grad = gate_grad
        self.combine = combine
        self.aux = aux
        self.columns = columns
        self.simplicity_over = simplicity_over
        self.smoothing = smoothing
        self.balance_weight = balance_weight
        self.efficiency_weight = efficiency_weight
        # Orthonormal as long as there are no more slots than dimensions; unit vectors always.
        rows_SD = F.normalize(nn.init.orthogonal_(torch.empty(num_slots, dim)), dim=1)
        self.directions = nn.ParameterList(nn.Parameter(row.clone()) for row in rows_SD)
        self.thresholds = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in rows_SD)

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            directions_ED = torch.stack([self.directions[slot] for slot in live]).float()
            thresholds_E = torch.stack([self.thresholds[slot] for slot in live]).float()
            scores_TE = cosine(x_TD, directions_ED)
            margin_TE = scores_TE.sigmoid() - thresholds_E.sigmoid()
            mask_TE = margin_TE > 0
            if token_mask_T is not None:
                mask_TE = mask_TE & token_mask_T[:, None]
            unserved_T = ~mask_TE.any(1)
            if token_mask_T is not None:
                unserved_T = unserved_T & token_mask_T

            # Straight-through: the value of the hard gate, the gradient of the margin.
            through_TE = margin_TE if self.gate_grad == "all" else margin_TE * mask_TE
            gate_TE = mask_TE + (through_TE - through_TE.detach())
            aux = self._aux(gate_TE, mask_TE, directions_ED, token_mask_T)
            weights_TE = self._weights(gate_TE, mask_TE)
            if not self.training:
                mask_TE, weights_TE = self._fall_back(scores_TE, mask_TE, weights_TE, unserved_T)
            dispatch_TE = mask_TE
            if self.training and self.gate_grad == "all":
                dispatch_TE = mask_TE.any(1, keepdim=True) | unserved_T[:, None]  # real tokens
                dispatch_TE = dispatch_TE.expand_as(mask_TE)
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, dispatch_TE)

    def _weights(self, gate_TE: Tensor, mask_TE: Tensor) -> Tensor:
        k_T1 = mask_TE.sum(1, keepdim=True)
        if self.combine == "constant_k":
            return gate_TE / k_T1.clamp(min=1)
        through_TE = gate_TE / torch.where(k_T1 > 0, gate_TE.sum(1, keepdim=True), 1.0)
        if self.combine == "through_k":
            return through_TE
        return torch.where((k_T1 > 1).any(), through_TE, gate_TE)

    def _fall_back(
        self, scores_TE: Tensor, mask_TE: Tensor, weights_TE: Tensor, unserved_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A token nobody serves takes its best expert by score, with weight 1 (DynMoE, Eq. 5)."""
        best_TE = F.one_hot(scores_TE.argmax(1), scores_TE.shape[1]).bool() & unserved_T[:, None]
        weight_TE = best_TE.to(weights_TE.dtype)
        if self.combine == "tutel":
            raw_TE = weight_TE * scores_TE.sigmoid()
            weight_TE = torch.where((mask_TE.sum(1) > 1).any(), weight_TE, raw_TE)
        return mask_TE | best_TE, torch.where(unserved_T[:, None], weight_TE, weights_TE)

    def _aux(
        self, gate_TE: Tensor, mask_TE: Tensor, directions_ED: Tensor, token_mask_T: Tensor | None
    ) -> Tensor:
        num_slots = len(self.directions)
        if token_mask_T is not None:
            gate_TE, mask_TE = gate_TE[token_mask_T], mask_TE[token_mask_T]
        if self.aux == "gshard":
            first_TE = mask_TE & (mask_TE.cumsum(1) == 1)
            return losses.load_balance(gate_TE, first_TE, num_experts=gate_TE.shape[1])
        normalised = self.columns == "normalised"
        every_SD = (
            directions_ED
            if self.simplicity_over == "living"
            else torch.stack(list(self.directions)).float()
        )
        aux = losses.diversity(directions_ED, normalised, self.smoothing)
        aux = aux + losses.simplicity(every_SD)
        if self.balance_weight:
            aux = aux + self.balance_weight * losses.top_any_balance(gate_TE, mask_TE, num_slots)
        if self.efficiency_weight:
            aux = aux + self.efficiency_weight * losses.efficiency(gate_TE, num_slots)
        return aux

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """The parameters that belong to one slot alone."""
        return [self.directions[slot], self.thresholds[slot]]

    @torch.no_grad()
    def point(self, slot: int, direction_D: Tensor) -> None:
        """Give a new expert the unit vector of ``direction_D`` and threshold 0 (Algorithm 1)."""
        self.directions[slot].copy_(F.normalize(direction_D.float(), dim=0))
        self.thresholds[slot].zero_()

    @torch.no_grad()
    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots for good; slot ``slots[i]`` becomes slot i."""
        self.directions = nn.ParameterList(self.directions[slot] for slot in slots)
        self.thresholds = nn.ParameterList(self.thresholds[slot] for slot in slots)
