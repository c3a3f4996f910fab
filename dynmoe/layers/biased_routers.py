"""Top-k with a bias per expert that balances their load without a loss.

Shape suffixes: T tokens, E experts, D model width, K choices of a token, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers.quantile import BINS, count_distances, distance_to
from dynmoe.layers.routers import FP32, Routing, SoftmaxRouter, StepTotals, hide_padding


class BiasedTopKRouter(SoftmaxRouter):
    """The k experts with the largest score + bias, weighed by the score alone (DeepSeek-V3).

    Loss-free balancing (arXiv 2408.15664): after each step the bias of an expert with less than the
    mean load rises, that of one with more falls. The gradient never sees the bias.

    - ``score``: ``sigmoid`` or ``softmax`` of the logits; ``renormalise``: the chosen scores are
      divided by their sum; ``route_scale`` multiplies them.
    - ``bias_update``: ``sign`` moves by ``bias_rate`` (the paper); ``centred_sign`` subtracts the
      mean over experts from the step (torchtitan); ``quantile`` goes ``bias_rate`` of the way to
      the bias with which just k/E of the step's tokens would choose the expert, the others' biases
      as they are.
    - ``num_groups``: the experts are in so many groups, and a token chooses within the
      ``limited_groups`` whose two best biased scores have the largest sum (DeepSeek-V3).
    - ``z_weight``, ``sequence_weight``: see ``SoftmaxRouter``; the latter is DeepSeek-V3's, of
      scores that sum to 1 and the k largest of them without bias.

    Raises:
        ValueError: ``top_k`` or groups that the number of experts does not have.
    """

    bias_E: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 2,
        score: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalise: bool = True,
        route_scale: float = 1.0,
        bias_update: Literal["sign", "centred_sign", "quantile"] = "sign",
        bias_rate: float = 1e-3,
        num_groups: int | None = None,
        limited_groups: int | None = None,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        if not 1 <= top_k <= num_slots:
            raise ValueError(f"top_k is {top_k}: expected 1 to the number of experts, {num_slots}")
        _check_groups(num_slots, top_k, num_groups, limited_groups)
        self.num_slots = num_slots
        self.top_k = top_k
        self.score = score
        self.renormalise = renormalise
        self.route_scale = route_scale
        self.bias_update = bias_update
        self.bias_rate = bias_rate
        self.num_groups = num_groups
        self.limited_groups = limited_groups
        self.observes = num_slots * BINS if bias_update == "quantile" else 0
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02))
        self.register_buffer("bias_E", torch.zeros(num_slots, dtype=FP32))

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        return F.linear(x_TD.float(), self.weight.float())

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        self.check_pool(live)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = self.logits(x_TD, live)
            softmax = self.score == "softmax"
            scores_TE = logits_TE.softmax(1) if softmax else logits_TE.sigmoid()
            biased_TE = self._within_groups(scores_TE.detach() + self.bias_E)
            chosen_TK = biased_TE.topk(self.top_k, dim=1).indices
            mask_TE = torch.zeros_like(biased_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
            mask_TE = hide_padding(mask_TE, token_mask_T)
            weights_TE = self.weigh(scores_TE, mask_TE)
            aux = scores_TE.new_zeros(())
            if self.adds_losses:
                best = scores_TE.topk(self.top_k, dim=1).indices
                best_TE = torch.zeros_like(mask_TE).scatter_(1, best, True)
                share_TE = scores_TE / scores_TE.sum(1, keepdim=True)
                aux = self._with_losses(aux, logits_TE, share_TE, best_TE, token_mask_T, shape)
            observed = None
            if self.observes and self.training:
                real_TE = hide_padding(torch.ones_like(mask_TE), token_mask_T)
                observed = count_distances(self._margin(biased_TE), real_TE).flatten()
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE, observed=observed)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        weights_TE = scores_TE * mask_TE
        if self.renormalise:
            weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-20)
        return weights_TE * self.route_scale

    def _within_groups(self, biased_TE: Tensor) -> Tensor:
        """Put -inf outside of each token's groups."""
        if self.num_groups is None:
            return biased_TE
        size = self.num_slots // self.num_groups
        best_TG = biased_TE.unflatten(1, (-1, size)).topk(min(2, size), dim=2).values.sum(2)
        kept = best_TG.topk(self.limited_groups or self.num_groups, dim=1).indices
        kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter_(1, kept, True)
        return biased_TE.masked_fill(~kept_TG.repeat_interleave(size, 1), -torch.inf)

    def _margin(self, biased_TE: Tensor) -> Tensor:
        """By how much each biased score beats the k-th largest of the other experts'."""
        if self.top_k == self.num_slots:
            return torch.full_like(biased_TE, torch.inf)
        best = biased_TE.topk(self.top_k + 1, dim=1).values
        # For an expert among the k best the k-th largest of the others is the one after them.
        is_chosen_TE = biased_TE >= best[:, -2:-1]
        margin_TE = biased_TE - torch.where(is_chosen_TE, best[:, -1:], best[:, -2:-1])
        # Outside of the token's groups no bias helps.
        return margin_TE.nan_to_num(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf)

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        if self.bias_update == "quantile":
            counts_EB = own.observed.view(self.num_slots, BINS)
            share = self.top_k / self.num_slots
            self.bias_E -= self.bias_rate * distance_to(counts_EB.sum(1) * share, counts_EB)
            return
        step_E = (own.load_S.mean() - own.load_S).sign()
        if self.bias_update == "centred_sign":
            step_E = step_E - step_E.mean()
        self.bias_E += self.bias_rate * step_E

    def record(self, live: Sequence[int]) -> dict[str, object]:
        return {"thresholds": None, "bias": self.bias_E.tolist()}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        return f"k={self.top_k} of {self.num_slots}, bias_update={self.bias_update}"


def _check_groups(experts: int, top_k: int, groups: int | None, limited: int | None) -> None:
    if groups is None:
        if limited is not None:
            raise ValueError(f"limited_groups={limited} needs num_groups")
        return
    if groups < 1 or experts % groups:
        raise ValueError(f"num_groups is {groups}: expected a divisor of {experts} experts")
    if limited is not None and not 1 <= limited <= groups:
        raise ValueError(f"limited_groups is {limited}: expected 1 to num_groups, {groups}")
    if top_k > (limited or groups) * (experts // groups):
        raise ValueError(
            f"top_k is {top_k}: {limited} groups have {(limited or 0) * (experts // groups)} "
            "experts. Raise limited_groups"
        )
