"""Routers with a fixed number of experts per token: the settings DynMoE is compared against.

Shape suffixes: T tokens, E experts, D model width, K choices of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.routing import Routing, cosine


class TopKRouter(nn.Module):
    """Softmax over a linear score, the k largest experts per token (GShard, Switch, Mixtral).

    For k > 1 the chosen probabilities are renormalised to sum to 1; at k = 1 they are not, because
    the constant weight 1 would leave the router without a task gradient. Copies of an FFN then
    start at that probability, about 1/E, times its output; for k > 1 they start at its output.

    ``noise`` > 0 adds Gaussian noise of standard deviation noise / E to the logits in training.
    ``aux``: ``load_balance`` (GShard) or ``importance_load`` (needs noise).
    ``weights_sum``: ``one``, or ``k`` for experts that are parts of one FFN, whose outputs add up
    (``moe.init=cluster`` or ``random``).
    ``capacity_factor``: None is dropless; else each expert takes at most
    ``k * int(capacity_factor * ceil(T / E))`` of the T real tokens, the most confident first
    (Tutel's batch-prioritised routing), and the overflow gets nothing from it, in evaluation too.
    """

    adaptive = False

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 2,
        noise: float = 0.0,
        aux: Literal["load_balance", "importance_load"] = "load_balance",
        capacity_factor: float | None = None,
        weights_sum: Literal["one", "k"] = "one",
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_slots:
            raise ValueError(f"top_k is {top_k}: expected 1 to the number of experts, {num_slots}")
        if aux == "importance_load" and noise <= 0:
            raise ValueError("aux=importance_load needs noise > 0: its load term is smoothed by it")
        self.num_slots = num_slots
        self.top_k = top_k
        self.noise = noise
        self.aux = aux
        self.capacity_factor = capacity_factor
        self.weights_sum = weights_sum
        self._build_scorer(dim)

    def _build_scorer(self, dim: int) -> None:
        self.weight = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(self.num_slots, dim), std=0.02)
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        """Scores before noise and softmax, [T, E], fp32."""
        return F.linear(x_TD, self.weight.float())

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        if len(live) != self.num_slots:
            raise ValueError(f"a top-k router has a fixed pool of {self.num_slots}, got {live}")
        with torch.autocast(x_TD.device.type, enabled=False):
            clean_TE = self.logits(x_TD.float())
            noisy_TE = clean_TE
            if self.training and self.noise > 0:
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * (self.noise / self.num_slots)
            probs_TE = noisy_TE.softmax(1)
            choice_TK = probs_TE.topk(self.top_k, dim=1).indices
            mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, choice_TK, True)
            if token_mask_T is not None:
                mask_TE = mask_TE & token_mask_T[:, None]
            weights_TE = probs_TE * mask_TE
            if self.top_k > 1:
                weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-9)
            if self.weights_sum == "k":
                weights_TE = weights_TE * self.top_k
            aux = self._aux(clean_TE, noisy_TE, choice_TK, token_mask_T)
            if self.capacity_factor is not None:
                mask_TE = self._within_capacity(mask_TE, probs_TE, choice_TK, token_mask_T)
                weights_TE = weights_TE * mask_TE
            unserved_T = ~mask_TE.any(1)
            if token_mask_T is not None:
                unserved_T = unserved_T & token_mask_T
        return Routing(weights_TE, mask_TE, probs_TE, unserved_T, aux, mask_TE)

    def _aux(
        self, clean_TE: Tensor, noisy_TE: Tensor, choice_TK: Tensor, token_mask_T: Tensor | None
    ) -> Tensor:
        if token_mask_T is not None:
            clean_TE, noisy_TE, choice_TK = (
                t[token_mask_T] for t in (clean_TE, noisy_TE, choice_TK)
            )
        probs_TE = clean_TE.softmax(1)
        if self.aux == "load_balance":
            first_TE = F.one_hot(choice_TK[:, 0], self.num_slots)
            return losses.load_balance(probs_TE, first_TE, self.num_slots)
        kth_logit_T = noisy_TE.gather(1, choice_TK[:, -1:]).squeeze(1)
        return losses.importance_and_load(probs_TE, kth_logit_T, self.noise / self.num_slots)

    def _within_capacity(
        self, mask_TE: Tensor, probs_TE: Tensor, choice_TK: Tensor, token_mask_T: Tensor | None
    ) -> Tensor:
        """Keep the pairs that find a place: first choices before second ones, and within a choice
        the tokens with the largest probability first."""
        assert self.capacity_factor is not None
        tokens = len(mask_TE) if token_mask_T is None else int(token_mask_T.sum())
        places = self.top_k * int(self.capacity_factor * math.ceil(tokens / self.num_slots))
        order_T = probs_TE.amax(1).argsort(descending=True, stable=True)
        kept_TE = torch.zeros_like(mask_TE)
        taken_E = torch.zeros(self.num_slots, dtype=torch.long, device=mask_TE.device)
        for choice_T in choice_TK.unbind(1):
            wanted_TE = F.one_hot(choice_T[order_T], self.num_slots) * mask_TE[order_T]
            place_TE = taken_E + wanted_TE.cumsum(0)
            kept_TE[order_T] |= (wanted_TE > 0) & (place_TE <= places)
            taken_E = taken_E + wanted_TE.sum(0)
        return kept_TE


class CosineTopKRouter(TopKRouter):
    """GMoE's router: cosine between a projected token and expert embeddings, times a learned scale.

    Li et al. (arXiv 2206.04046), sec. 4; Tutel, ``tutel/gates/cosine_top.py``. The scale starts at
    1 / ``init_temperature`` and is at most 100.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 1,
        noise: float = 1.0,
        aux: Literal["load_balance", "importance_load"] = "importance_load",
        capacity_factor: float | None = None,
        projection: int = 256,
        init_temperature: float = 0.5,
        weights_sum: Literal["one", "k"] = "one",
    ) -> None:
        self.projection = projection
        self.init_temperature = init_temperature
        super().__init__(dim, num_slots, top_k, noise, aux, capacity_factor, weights_sum)

    def _build_scorer(self, dim: int) -> None:
        self.project = nn.Linear(dim, self.projection)
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        self.embeddings = nn.Parameter(torch.randn(self.num_slots, self.projection) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / self.init_temperature)))

    def logits(self, x_TD: Tensor) -> Tensor:
        projected_TP = F.linear(x_TD, self.project.weight.float(), self.project.bias.float())
        scale = self.log_scale.float().clamp(max=math.log(100)).exp()
        return cosine(projected_TP, self.embeddings.float()) * scale
