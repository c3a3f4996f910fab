"""Experts that choose their tokens: the best of a batch, or those above a remembered cut.

Shape suffixes: T tokens, E experts, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers.routers import FP32, Router, Routing, StepTotals, hide_padding, one_target


class ExpertChoiceRouter(Router):
    """Every expert takes its most probable tokens of the batch (Zhou et al., arXiv 2202.09368).

    Each takes ``target_k`` T / E of the T real tokens, rounded down, and at least one: all loads
    are equal, and mean k is ``target_k``, the paper's capacity factor. A token has any number of
    experts, none too; its weights are probabilities as they are. There is no loss.

    A token's experts depend on the tokens beside it, in evaluation too: the score of a set depends
    on its batches, and a language model would see what follows.

    Raises:
        ValueError: a ``target_k`` out of reach.
    """

    sees_batch = True

    def __init__(self, dim: int, num_slots: int, target_k: float | Sequence[float] = 2.0) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.target_k = _target(target_k, num_slots)
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02))

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        self.check_pool(live)
        with torch.autocast(x_TD.device.type, enabled=False):
            probs_TE = self.logits(x_TD, live).softmax(1)
            tokens = _real_tokens(x_TD, token_mask_T)
            share = _part(self.target_k / self.num_slots, tokens).clamp(min=1)
            order_ET = _ranked(probs_TE, token_mask_T)[1]
            mask_TE = hide_padding(_first(order_ET, share.expand(len(live))), token_mask_T)
            weights_TE = probs_TE * mask_TE
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        aux = probs_TE.new_zeros(())
        return Routing(weights_TE, mask_TE, probs_TE, unserved_T, aux, mask_TE)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return scores_TE * mask_TE

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": None, "target_k": self.target_k}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        return f"k={self.target_k:g} on average of {self.num_slots}"


class ExpertThresholdRouter(Router):
    """Expert choice with memory: an expert serves the tokens whose score reaches its cut.

    Expert threshold routing (arXiv 2603.11535). The cut is an average over steps of the score with
    which a token would have been the last that the expert takes of a batch; so mean k is
    ``target_k``, loads are level without a loss, and in evaluation a token's experts depend on it
    alone. Weights are the sigmoids of the scores.

    - ``ema``: how much of the average stays at each step; it is free of the bias of its start.
    - ``warm_up``: steps at the start, or a share of the training if below 1, in which experts
      choose among the tokens of the batch: without it some starve.
    - ``slack``: in training an expert takes at least 1 - this, at most 1 + this times its
      share of the batch, best first; None: as many as reach the cut.

    Raises:
        ValueError: a ``target_k`` out of reach.
    """

    raw_E: Tensor
    cutoff_E: Tensor
    updates: Tensor
    warming: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        target_k: float | Sequence[float] = 2.0,
        ema: float = 0.99,
        warm_up: float = 0.1,
        slack: float | None = None,
    ) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.target_k = _target(target_k, num_slots)
        self.ema = ema
        self.warm_up = warm_up
        self.slack = slack
        self.observes = num_slots + 1
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02))
        self.register_buffer("raw_E", torch.zeros(num_slots, dtype=FP32))
        self.register_buffer("cutoff_E", torch.zeros(num_slots, dtype=FP32))
        self.register_buffer("updates", torch.zeros((), dtype=FP32))
        self.register_buffer("warming", torch.tensor(float(warm_up > 0), dtype=FP32))

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        self.check_pool(live)
        observed = None
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = self.logits(x_TD, live)
            mask_TE = hide_padding(scores_TE >= self.cutoff_E, token_mask_T)
            if self.training:
                mask_TE, observed = self._of_batch(scores_TE, mask_TE, token_mask_T)
            weights_TE = scores_TE.sigmoid() * mask_TE
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        aux = scores_TE.new_zeros(())
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE, observed=observed)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return scores_TE.sigmoid() * mask_TE

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor:
        return scores_TE - self.cutoff_E

    def _of_batch(
        self, scores_TE: Tensor, reach_TE: Tensor, token_mask_T: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The mask of a training batch; the cuts that it would have, and 1 if it has a token."""
        tokens = _real_tokens(scores_TE, token_mask_T)
        share = _part(self.target_k / self.num_slots, tokens, nearest=True).clamp(min=1)
        if not len(scores_TE):
            return reach_TE, scores_TE.new_zeros(self.observes)
        sorted_ET, order_ET = _ranked(scores_TE, token_mask_T)
        cut_E = sorted_ET.index_select(1, (share - 1)[None])[:, 0]
        observed = F.pad(cut_E, (0, 1), value=1.0)
        observed = torch.where(tokens > 0, observed, 0.0)
        number_E = reach_TE.sum(0)
        if self.slack is not None:
            lowest = _part(1 - self.slack, share)
            number_E = number_E.clamp(lowest, _part(1 + self.slack, share))
        number_E = torch.where(self.warming > 0, share, number_E)
        return hide_padding(_first(order_ET, number_E), token_mask_T), observed

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        batches = own.observed[-1]
        cut_E = own.observed[:-1] / batches.clamp(min=1)
        ran = batches > 0
        raw_E = self.ema * self.raw_E + (1 - self.ema) * cut_E
        self.raw_E.copy_(torch.where(ran, raw_E, self.raw_E))
        self.updates += ran
        # 1 - ema^n, without the rounding of a difference of numbers near 1.
        weight = -torch.expm1(self.updates * math.log(self.ema)) if self.ema else 1.0
        self.cutoff_E.copy_(torch.where(ran, self.raw_E / weight, self.cutoff_E))
        is_share = 0 < self.warm_up < 1
        steps = self.warm_up * own.num_steps if is_share else self.warm_up
        self.warming.fill_(float(own.step < steps))

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": self.cutoff_E.tolist(), "target_k": self.target_k}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        return f"k={self.target_k:g} on average of {self.num_slots}, ema={self.ema:g}"


def _target(target_k: float | Sequence[float], num_slots: int) -> float:
    target_k = one_target(target_k)
    if not 0 < target_k <= num_slots:
        raise ValueError(
            f"target_k is {target_k:g}: expected more than 0, up to the number of experts, "
            f"{num_slots}"
        )
    return target_k


def _real_tokens(x_TD: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """The number of tokens that are no padding, on the device."""
    if token_mask_T is not None:
        return token_mask_T.sum()
    return torch.full((), len(x_TD), device=x_TD.device)


def _part(share: float, of: Tensor, nearest: bool = False) -> Tensor:
    """``share`` times a whole number, rounded down or to the ``nearest`` one, on the device.

    In whole numbers: 0.6 x 5 is 3, not 2.9999 and so 2.
    """
    ratio = Fraction(share).limit_denominator(10**6)
    half = ratio.denominator // 2 if nearest else 0
    return (of * ratio.numerator + half) // ratio.denominator


def _ranked(scores_TE: Tensor, token_mask_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each expert's scores from the highest, and whose they are; padding comes last."""
    scores_TE = scores_TE.detach()
    if token_mask_T is not None:
        scores_TE = scores_TE.masked_fill(~token_mask_T[:, None], -torch.inf)
    sorted_ET, order_ET = scores_TE.t().contiguous().sort(dim=1, descending=True)
    return sorted_ET, order_ET


def _first(order_ET: Tensor, number_E: Tensor) -> Tensor:
    """Mark the first ``number_E`` tokens of each expert's order; bool, [T, E]."""
    ranks_T = torch.arange(order_ET.shape[1], device=order_ET.device)
    taken_ET = ranks_T < number_E[:, None]
    return torch.zeros_like(taken_ET).scatter(1, order_ET, taken_ET).t()
