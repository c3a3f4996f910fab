"""Prefix routing: a token takes its best experts until their probabilities add up to a share.

Shape suffixes: T tokens, E living experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routers import (
    FP32,
    Routing,
    SoftmaxRouter,
    StepTotals,
    hide_padding,
    one_target,
)


class PrefixRouter(SoftmaxRouter):
    """The most probable experts of each token, as long as the larger probabilities sum to little.

    Top-p (arXiv 2403.07652), XMoE (2403.18926) and the gate of MASS (2512.19765) differ in options;
    DTop-p (2512.13996) controls the share. A token has at least one expert; at a share of 1 it has
    all of them. Without an entropy loss or a controller the router flattens and k grows.

    - ``top_p``: the share; ``boundary``: an expert is taken while the larger probabilities sum to
      less than it (``below``: XMoE, MASS), or to no more (``up_to``: top-p).
    - ``renorm``: weights are probabilities as they are (``none``), or divided by their sum over the
      ``chosen`` ones; ``tutel`` divides if any token of the batch has k > 1, so that a token's
      output depends on its batch mates.
    - ``balance``: the balance loss counts each token's ``first`` choice (Switch, GShard), or the
      share of all chosen ``pairs`` that an expert has; times ``balance_weight``.
    - ``entropy_weight``: of the mean entropy of the probabilities, which sharpens them.
    - ``normalise_logits``: logits are standardised over the experts, times a learned scale.
    - ``target_k``: mean k that a controller holds after each step: p = top_p + kp e + ki sum(e)
      with e = (target_k - mean k) / E, within 0 and 1, one p for all layers or one ``per_layer``.
      The sum stops where p is at an end.
    - ``z_weight``, ``sequence_weight``: see ``SoftmaxRouter``.

    Raises:
        ValueError: a ``target_k`` out of reach.
    """

    adaptive = True

    p: Tensor
    integral: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_p: float = 0.4,
        boundary: Literal["below", "up_to"] = "up_to",
        renorm: Literal["none", "chosen", "tutel"] = "none",
        balance: Literal["first", "pairs"] = "pairs",
        balance_weight: float = 0.01,
        entropy_weight: float = 1e-4,
        normalise_logits: bool = False,
        target_k: float | Sequence[float] | None = None,
        kp: float = 0.5,
        ki: float = 0.2,
        per_layer: bool = False,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        target_k = None if target_k is None else one_target(target_k)
        if target_k is not None and not 1 <= target_k <= num_slots:
            raise ValueError(
                f"target_k is {target_k:g}: expected 1 to the number of experts, {num_slots}: "
                "every token has one"
            )
        self.num_slots = num_slots
        self.top_p = top_p
        self.boundary = boundary
        self.renorm = renorm
        self.balance = balance
        self.balance_weight = balance_weight
        self.entropy_weight = entropy_weight
        self.target_k = target_k
        self.kp = kp
        self.ki = ki
        self.per_layer = per_layer
        rows_SD = nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02)
        self.rows = nn.ParameterList(nn.Parameter(row.clone()) for row in rows_SD)
        self.logit_scale = nn.Parameter(torch.ones(())) if normalise_logits else None
        self.register_buffer("p", torch.tensor(float(top_p), dtype=FP32))
        self.register_buffer("integral", torch.zeros((), dtype=FP32))

    @property
    def has_state(self) -> bool:
        return self.target_k is not None

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        rows_ED = torch.stack([self.rows[slot] for slot in live]).float()
        logits_TE = F.linear(x_TD.float(), rows_ED)
        if self.logit_scale is None:
            return logits_TE
        return self.logit_scale.float() * _standardised(logits_TE)

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        # NOTE: fp32, because the sum of the larger probabilities is compared with the share.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD, live)
            probs_TE = logits_TE.softmax(1)
            mask_TE = hide_padding(self._prefix(probs_TE.detach()), token_mask_T)
            weights_TE = self._weights(probs_TE * mask_TE, mask_TE)
            aux = self._aux(probs_TE, mask_TE, token_mask_T)
            aux = self._with_losses(aux, logits_TE, probs_TE, mask_TE, token_mask_T, shape)
        unserved_T = torch.zeros_like(mask_TE[:, 0])
        return Routing(weights_TE, mask_TE, probs_TE, unserved_T, aux, mask_TE)

    def _prefix(self, probs_TE: Tensor) -> Tensor:
        sorted_TE, order_TE = probs_TE.sort(dim=1, descending=True, stable=True)
        larger_TE = F.pad(sorted_TE.cumsum(1)[:, :-1], (1, 0))
        p = self._share()
        kept_TE = larger_TE < p if self.boundary == "below" else larger_TE <= p
        # Rounding may take the sum to 1 before the last expert.
        kept_TE = kept_TE | (p >= 1)
        kept_TE[:, 0] = True
        return torch.zeros_like(kept_TE).scatter(1, order_TE, kept_TE)

    def _share(self) -> Tensor | float:
        return self.p if self.has_state else self.top_p

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return self._weights(scores_TE * mask_TE, mask_TE)

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor:
        """By how much the share exceeds the sum of the larger probabilities."""
        sorted_TE, order_TE = scores_TE.sort(dim=1, descending=True, stable=True)
        larger_TE = F.pad(sorted_TE.cumsum(1)[:, :-1], (1, 0))
        return torch.zeros_like(scores_TE).scatter(1, order_TE, self._share() - larger_TE)

    def _weights(self, chosen_TE: Tensor, mask_TE: Tensor) -> Tensor:
        if self.renorm == "none":
            return chosen_TE
        # Rows of padding sum to 0.
        shares_TE = chosen_TE / chosen_TE.sum(1, keepdim=True).clamp(min=1e-20)
        if self.renorm == "chosen":
            return shares_TE
        return torch.where((mask_TE.sum(1) > 1).any(), shares_TE, chosen_TE)

    def _aux(self, probs_TE: Tensor, mask_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
        aux = probs_TE.new_zeros(())
        if not self.recorded:
            return aux
        if self.balance_weight:
            if self.balance == "first":
                experts = probs_TE.shape[1]
                first_TE = F.one_hot(probs_TE.argmax(1), experts)
                balance = losses.load_balance(probs_TE, first_TE, experts, token_mask_T)
            else:
                balance = losses.pair_balance(probs_TE, mask_TE, token_mask_T)
            aux = aux + self.balance_weight * balance
        if self.entropy_weight:
            aux = aux + self.entropy_weight * losses.entropy(probs_TE, token_mask_T)
        return aux

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        assert self.target_k is not None
        layers = [own] if self.per_layer else every
        pairs = torch.stack([each.load_S.sum() for each in layers]).sum()
        tokens = torch.stack([each.k_hist.sum() for each in layers]).sum()
        error = (self.target_k - pairs / tokens.clamp(min=1)) / self.num_slots
        error = (error * (tokens > 0)).to(FP32)
        direct = self.top_p + self.kp * error
        integral = self.integral + error
        if self.ki:
            # The sum goes no further than p, and back as soon as the error turns.
            highest = torch.maximum(self.integral, (1 - direct) / self.ki)
            lowest = torch.minimum(self.integral, (0 - direct) / self.ki)
            integral = integral.clamp(lowest, highest)
        p = (direct + self.ki * integral).clamp(0, 1)
        # Without a token there is nothing to control by: p stays where it is.
        self.p.copy_(torch.where(tokens > 0, p, self.p))
        self.integral.copy_(integral)

    def slot_parameters(self, slot: int) -> list[nn.Parameter]:
        """Return the slot's row of the gate."""
        return [self.rows[slot]]

    @torch.no_grad()
    def point(self, slot: int, direction_D: Tensor) -> None:
        """Give a new expert the direction at the mean length of all rows."""
        length = torch.stack([torch.linalg.vector_norm(row.float()) for row in self.rows]).mean()
        direction_D = direction_D.float()
        direction_D = direction_D / direction_D.abs().amax().clamp(min=1e-30)
        self.rows[slot].copy_(length * F.normalize(direction_D, dim=0))

    @torch.no_grad()
    def keep(self, slots: Sequence[int]) -> None:
        self.rows = nn.ParameterList(self.rows[slot] for slot in slots)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        top_p = self.p.item() if self.has_state else self.top_p
        return {"thresholds": None, "top_p": top_p, "target_k": self.target_k}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        held = "" if self.target_k is None else f" (k={self.target_k:g} on average)"
        return (
            f"a prefix of {self.num_slots} slots, top_p={self.top_p:g}{held}, renorm={self.renorm}"
        )


def _standardised(logits_TE: Tensor) -> Tensor:
    centred_TE = logits_TE - logits_TE.mean(1, keepdim=True)
    # A token of equal logits gets zeros, and gradient 0, rather than NaN as from ``std``.
    norm_T1 = torch.linalg.vector_norm(centred_TE, dim=1, keepdim=True)
    return centred_TE / (norm_T1 / logits_TE.shape[1] ** 0.5 + 1e-6)
