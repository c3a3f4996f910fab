"""Routers that predict from the token how much of the layer it gets: GeMoE a number of experts,
UniF-MoE a share of the blocks of a shared FFN.

Shape suffixes: T tokens, E experts, K residual experts, N blocks of an FFN, J numbers of experts,
D model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routers import Router, Routing, SoftmaxRouter, hide_padding

if TYPE_CHECKING:
    from dynmoe.layers.experts import Experts


class GeMoERouter(SoftmaxRouter):
    """The k_t most probable experts, k_t predicted from the token (GeMoE, arXiv 2606.26287).

    ``k_t = round(sum_j j softmax(A x)_j)``, j = 1 to ``max_k``. The gradient of k_t reaches A
    through the weight of the last expert chosen (ours; the paper says straight-through alone), and
    through the monotone loss: of two tokens the one whose probabilities have the larger entropy, by
    h bits, shall have ``slope`` h experts more.

    - ``renormalise``: the chosen probabilities are divided by their sum.
    - ``monotone_weight``: of the mean hinge over ``pairs`` of tokens: ``all``, whose number is the
      square of the tokens', or ``spread``, those 1, 2, 4, ... tokens apart. It trains A alone
      (ours; in the paper the model around is frozen): equal tokens meet it too, and a model that
      is trained from scratch made all of its tokens equal.
    - ``balance_weight``: of ``losses.pair_balance``. ``z_weight``, ``sequence_weight``: see
      ``SoftmaxRouter``.

    Raises:
        ValueError: a ``max_k`` that the number of experts does not have.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        max_k: int | None = None,
        renormalise: bool = True,
        slope: float = 1.2,
        monotone_weight: float = 1.0,
        pairs: Literal["all", "spread"] = "spread",
        balance_weight: float = 1e-3,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        max_k = num_slots if max_k is None else max_k
        if not 1 <= max_k <= num_slots:
            raise ValueError(f"max_k is {max_k}: expected 1 to the number of experts, {num_slots}")
        self.num_slots = num_slots
        self.max_k = max_k
        self.renormalise = renormalise
        self.slope = slope
        self.monotone_weight = monotone_weight
        self.pairs = pairs
        self.balance_weight = balance_weight
        self.weight = _rows(num_slots, dim)
        self.number_weight = _rows(max_k, dim)

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
            x_TD = x_TD.float()
            logits_TE = self.logits(x_TD, live)
            probs_TE = logits_TE.softmax(1)
            soft_k_T = self._soft_k(x_TD)
            k_T1 = soft_k_T.detach().round().long()[:, None]
            rank_TE = _ranks(probs_TE)
            mask_TE = hide_padding(rank_TE < k_T1, token_mask_T)
            weights_TE = self.weigh(probs_TE, mask_TE)
            through_T1 = 1 + (soft_k_T - soft_k_T.detach())[:, None]  # 1, with the gradient of k
            weights_TE = torch.where(rank_TE == k_T1 - 1, weights_TE * through_T1, weights_TE)
            aux = probs_TE.new_zeros(())
            if self.recorded and not torch.compiler.is_exporting():
                aux = self.balance_weight * losses.pair_balance(probs_TE, mask_TE, token_mask_T)
                if self.monotone_weight:
                    # Once more for its own gradient, if there is one.
                    k_T = self._soft_k(x_TD.detach()) if torch.is_grad_enabled() else soft_k_T
                    hinge = self._hinge(k_T, probs_TE.detach(), token_mask_T)
                    aux = aux + self.monotone_weight * hinge
            aux = self._with_losses(aux, logits_TE, probs_TE, mask_TE, token_mask_T, shape)
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(weights_TE, mask_TE, probs_TE, unserved_T, aux, mask_TE)

    def _soft_k(self, x_TD: Tensor) -> Tensor:
        number_TJ = F.linear(x_TD, self.number_weight.float()).softmax(1)
        numbers_J = torch.arange(1, self.max_k + 1, device=x_TD.device, dtype=x_TD.dtype)
        return (number_TJ * numbers_J).sum(1)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        weights_TE = scores_TE * mask_TE
        if self.renormalise:
            weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-9)
        return weights_TE

    def _hinge(self, k_T: Tensor, probs_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
        """Mean over pairs of what the one of larger entropy lacks."""
        bits_T = torch.special.entr(probs_TE).sum(1) / math.log(2)
        real_T = torch.ones_like(k_T, dtype=torch.bool) if token_mask_T is None else token_mask_T
        lacks, number = k_T.sum() * 0, real_T.sum() * 0
        for one, other in self._pairs(len(k_T)):
            more, k_more = bits_T[one] - bits_T[other], k_T[one] - k_T[other]
            both = real_T[one] & real_T[other]
            # Of the token that has more of it: a pair of equal entropy wants nothing.
            short = torch.relu(self.slope * more.abs() - more.sign() * k_more) * (more != 0)
            lacks, number = lacks + (short * both).sum(), number + both.sum()
        return lacks / number.clamp(min=1)

    def _pairs(self, tokens: int) -> Iterator[tuple[Any, Any]]:
        """Two indices of tokens, which hold each pair once."""
        if self.pairs == "all":
            yield tuple(torch.triu_indices(tokens, tokens, 1))
            return
        apart = 1
        while apart < tokens:
            yield slice(apart, None), slice(None, -apart)
            apart *= 2

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 2 * dim * self.max_k

    def extra_repr(self) -> str:
        return f"k=1 to {self.max_k} of {self.num_slots}, by the token"


class UniFRouter(Router):
    """Blocks of a shared FFN by the token, and residual experts on the rest (UniF-MoE, arXiv
    2608.10392).

    Experts are blocks: parts of ``num_slots / num_blocks`` copies of one FFN
    (``Router.expert_copies``), those of the shared one first. A token gives the shared FFN the
    share alpha, from (N-1)/N^2 to 1 less that, and its round(N alpha) blocks with the largest
    product of the token and their mean key. Of the residual experts it takes the most probable, as
    few as have a mass of 1 - alpha, on the blocks that the shared FFN leaves. The output is
    ``alpha E_0(shared blocks) + sum_i p_i E_i(the other blocks)``.

    The auxiliary loss is ``||W W^T - I||_F`` over the rows of all experts (``smoothing``: see
    ``losses.diversity``). k counts blocks.

    Raises:
        ValueError: slots that are no two or more FFNs of ``num_blocks`` blocks.
    """

    keys_ND: Tensor

    def __init__(
        self, dim: int, num_slots: int, num_blocks: int = 8, smoothing: float = 1e-3
    ) -> None:
        super().__init__()
        copies = num_slots // max(1, num_blocks)
        if num_blocks < 2 or copies < 2 or num_slots % num_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}: expected 2 or more, and {num_slots} experts to be "
                "the blocks of a shared FFN and of one or more residual ones. Set moe.num_experts "
                f"to a multiple, e.g. {max(2, num_blocks) * 5}"
            )
        self.num_blocks = num_blocks
        self.expert_copies = copies
        self.smoothing = smoothing
        # Orthonormal as long as there are no more experts than dimensions.
        rows_ED = F.normalize(nn.init.orthogonal_(torch.empty(copies, dim)), dim=1)
        self.weight = nn.Parameter(rows_ED)
        # Not in checkpoints: it follows from the experts.
        self.register_buffer("keys_ND", torch.zeros(num_blocks, dim), persistent=False)

    def prepare(self, experts: Experts, live: Sequence[int]) -> None:
        self.keys_ND = experts.mean_keys(live[: self.num_blocks])

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        blocks = self.num_blocks
        self.check_pool(live, self.expert_copies * blocks)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, weight_ED = x_TD.float(), self.weight.float()
            logits_TE = F.linear(x_TD, weight_ED)
            least = (blocks - 1) / blocks**2
            alpha_T1 = least + (1 - 2 * least) * logits_TE[:, :1].sigmoid()
            number_T1 = (blocks * alpha_T1.detach()).round()
            shared_TN = _ranks(F.linear(x_TD.detach(), self.keys_ND)) < number_T1
            probs_TK = logits_TE[:, 1:].softmax(1)
            sorted_TK, order_TK = probs_TK.detach().sort(dim=1, descending=True)
            # Kept while those before have not the mass yet.
            kept_TK = sorted_TK.cumsum(1) - sorted_TK < 1 - alpha_T1.detach()
            kept_TK[:, 0] = True
            chosen_TK = torch.zeros_like(kept_TK).scatter_(1, order_TK, kept_TK)
            rest_TKN = chosen_TK[:, :, None] & ~shared_TN[:, None]
            mask = torch.cat([shared_TN, rest_TKN.flatten(1)], 1)
            mask_TE = hide_padding(mask, token_mask_T)
            share_TE = torch.cat([alpha_T1, probs_TK], 1).repeat_interleave(blocks, 1)
            aux = losses.diversity(weight_ED, False, self.smoothing)
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(share_TE * mask_TE, mask_TE, share_TE, unserved_T, aux, mask_TE)

    def flops(self, dim: int) -> tuple[int, int]:
        return 0, 2 * dim * (self.expert_copies + self.num_blocks)

    def extra_repr(self) -> str:
        return f"a shared and {self.expert_copies - 1} residual FFNs of {self.num_blocks} blocks"


def _ranks(scores_TE: Tensor) -> Tensor:
    """The place of each score in its row, 0 for the largest."""
    order_TE = scores_TE.argsort(dim=1, descending=True, stable=True)
    places_TE = torch.arange(scores_TE.shape[1], device=scores_TE.device).expand_as(order_TE)
    return torch.zeros_like(order_TE).scatter_(1, order_TE, places_TE)


def _rows(rows: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(rows, dim), std=0.02))
