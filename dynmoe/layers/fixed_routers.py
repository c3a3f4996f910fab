"""Routers of a fixed pool, in which every token takes k experts: the settings that DynMoE is
compared against.

Top-k over a linear or a cosine score, and the average of an expert's keys (EMoE); with a capacity,
experts drop what is beyond it. Scores, gates and losses are fp32 under any autocast.

Shape suffixes: T tokens, E experts, D model width, K choices of a token, P width of a projected
token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers import losses
from dynmoe.layers.ffn import is_plain_linear
from dynmoe.layers.routers import Router, Routing, SoftmaxRouter, cosine, hide_padding

if TYPE_CHECKING:
    from dynmoe.layers.experts import Experts


class TopKRouter(SoftmaxRouter):
    """Softmax over a linear score, the k largest experts per token (GShard, Switch, Mixtral).

    For k > 1 the chosen probabilities are renormalised to sum to 1; at k = 1 they are not, because
    the constant weight 1 would leave the router without a task gradient. Copies of an FFN then
    start at that probability, about 1/E, times its output; for k > 1 they start at its output.
    ``renormalise``: true or false says it for every k (OLMoE: false). ``scale`` multiplies the
    weights (DeepSeek-V2's ``routed_scaling_factor``).

    ``noise`` > 0 adds Gaussian noise of standard deviation noise / E to the logits in training.
    ``aux``: ``load_balance`` (GShard) or ``importance_load`` (needs noise).
    ``weights_sum``: ``one``, or ``k`` for experts that are parts of one FFN, whose outputs add up
    (``moe.init=cluster`` or ``random``).
    ``capacity_factor``: None is dropless; else each expert takes at most
    ``k * int(capacity_factor * ceil(T / E))`` of the T real tokens, the most confident first
    (Tutel's batch-prioritised routing), and the overflow gets nothing from it, in evaluation too.
    ``min_capacity``: it takes at least so many, however few tokens there are (DeepSpeed's is 4).
    ``forced_balance``: experts take turns whatever the scores, for benchmarks; weights are still
    those of the scores.
    ``z_weight``, ``sequence_weight``: see ``SoftmaxRouter``.
    """

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 2,
        noise: float = 0.0,
        aux: Literal["load_balance", "importance_load"] = "load_balance",
        capacity_factor: float | None = None,
        weights_sum: Literal["one", "k"] = "one",
        min_capacity: int = 0,
        forced_balance: bool = False,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
        renormalise: bool | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        _check_top_k(top_k, num_slots)
        _check_capacity(capacity_factor, min_capacity)
        if aux == "importance_load" and noise <= 0:
            raise ValueError("aux=importance_load needs noise > 0: its load term is smoothed by it")
        self.num_slots = num_slots
        self.top_k = top_k
        self.noise = noise
        self.aux = aux
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity
        self.weights_sum = weights_sum
        self.forced_balance = forced_balance
        self.renormalise = top_k > 1 if renormalise is None else renormalise
        self.scale = scale
        self._build_scorer(dim)

    def _build_scorer(self, dim: int) -> None:
        self.weight = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(self.num_slots, dim), std=0.02)
        )

    def logits(self, x_TD: Tensor, live: Sequence[int] = ()) -> Tensor:
        """Scores before noise and softmax, [T, E], fp32."""
        return F.linear(x_TD, self.weight.float())

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        self.check_pool(live)
        with torch.autocast(x_TD.device.type, enabled=False):
            clean_TE = self.logits(x_TD.float())
            noisy_TE = clean_TE
            if self.training and self.noise > 0:
                noisy_TE = clean_TE + torch.randn_like(clean_TE) * (self.noise / self.num_slots)
            probs_TE = noisy_TE.softmax(1)
            if self.forced_balance:
                choice_TK = in_turn(probs_TE, self.top_k, token_mask_T)
            else:
                choice_TK = probs_TE.topk(self.top_k, dim=1).indices
            mask_TE = _chosen(choice_TK, probs_TE, token_mask_T)
            weights_TE = self.weigh(probs_TE, mask_TE)
            # NOTE: the loss sees the choices before places are given: an expert that many tokens
            # want must not look balanced because the overflow was dropped.
            aux = probs_TE.new_zeros(())
            if self.recorded:
                aux = self._aux(clean_TE, noisy_TE, choice_TK, token_mask_T)
            if self.adds_losses:
                probs = clean_TE.softmax(1)
                aux = self._with_losses(aux, clean_TE, probs, mask_TE, token_mask_T, shape)
            if self.capacity_factor is not None:
                places = capacity(
                    choice_TK, self.num_slots, self.capacity_factor, self.min_capacity, token_mask_T
                )
                mask_TE = within_capacity(mask_TE, probs_TE.amax(1), choice_TK, places)
                weights_TE = weights_TE * mask_TE
            unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(weights_TE, mask_TE, probs_TE, unserved_T, aux, mask_TE)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        weights_TE = scores_TE * mask_TE
        if self.renormalise:
            # Rows of padding sum to 0.
            weights_TE = weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1e-9)
        if self.weights_sum == "k":
            weights_TE = weights_TE * mask_TE.sum(1, keepdim=True)
        return weights_TE if self.scale == 1 else weights_TE * self.scale

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def _aux(
        self, clean_TE: Tensor, noisy_TE: Tensor, choice_TK: Tensor, token_mask_T: Tensor | None
    ) -> Tensor:
        probs_TE = clean_TE.softmax(1)
        if self.aux == "load_balance":
            first_TE = F.one_hot(choice_TK[:, 0], self.num_slots)
            return losses.load_balance(probs_TE, first_TE, self.num_slots, token_mask_T)
        kth_logit_T = noisy_TE.gather(1, choice_TK[:, -1:]).squeeze(1)
        std = self.noise / self.num_slots
        return losses.importance_and_load(probs_TE, kth_logit_T, std, token_mask_T)

    def extra_repr(self) -> str:
        return f"k={self.top_k} of {self.num_slots}" + _capacity_repr(self)


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
        min_capacity: int = 0,
        forced_balance: bool = False,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
    ) -> None:
        self.projection = projection
        self.init_temperature = init_temperature
        super().__init__(
            dim,
            num_slots,
            top_k,
            noise,
            aux,
            capacity_factor,
            weights_sum,
            min_capacity,
            forced_balance,
            z_weight,
            sequence_weight,
        )

    def _build_scorer(self, dim: int) -> None:
        self.project = nn.Linear(dim, self.projection)
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        self.embeddings = nn.Parameter(torch.randn(self.num_slots, self.projection) * 0.01)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / self.init_temperature)))

    def logits(self, x_TD: Tensor, live: Sequence[int] = ()) -> Tensor:
        if is_plain_linear(self.project):
            weight_PD, bias_P = self.project.weight.float(), self.project.bias.float()
            projected_TP = F.linear(x_TD, weight_PD, bias_P)
        else:  # an adapter around it, quantised weights: it alone knows what it computes
            projected_TP = self.project(x_TD.to(self.project.weight.dtype)).float()
        scale = self.log_scale.float().clamp(max=math.log(100)).exp()
        return cosine(projected_TP, self.embeddings.float()) * scale

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * self.projection, 2 * dim * self.projection


class AverageKeyRouter(Router):
    """The k experts with the largest ``x . mean key``, equally weighted. Nothing is trained.

    EMoE (Qiu et al., arXiv 2310.10908), sec. 3. An expert's keys are the rows of its first matrix.
    ``weights_sum``: EMoE's is ``k``, weight 1 each, for experts that are parts of one FFN
    (``moe.init=cluster`` or ``random``): all of them together are that FFN.

    Its code passes two more settings of Tutel on, which are off here: ``noise`` = 1 adds Gaussian
    noise of standard deviation noise / E to the scores in training, and ``capacity_factor`` = 1.5
    drops tokens beyond it; this and ``min_capacity`` are ``TopKRouter``'s.

    Raises:
        ValueError: ``top_k`` is not 1 to ``num_slots``, or a capacity is impossible.
    """

    graded = False

    keys_ED: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        top_k: int = 16,
        weights_sum: Literal["one", "k"] = "one",
        noise: float = 0.0,
        capacity_factor: float | None = None,
        min_capacity: int = 0,
    ) -> None:
        super().__init__()
        _check_top_k(top_k, num_slots)
        _check_capacity(capacity_factor, min_capacity)
        self.num_slots = num_slots
        self.top_k = top_k
        self.weights_sum = weights_sum
        self.noise = noise
        self.capacity_factor = capacity_factor
        self.min_capacity = min_capacity
        # Not in checkpoints: it follows from the experts.
        self.register_buffer("keys_ED", torch.zeros(num_slots, dim), persistent=False)

    def prepare(self, experts: Experts, live: Sequence[int]) -> None:
        # NOTE: at every forward, because the keys are trained with their experts. No gradient.
        with torch.no_grad():
            self.keys_ED = self.made_once("keys", experts.mean_keys, live)

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            # Detached: scores only rank the experts, no gradient of the weights could use them.
            scores_TE = F.linear(x_TD.detach().float(), self.keys_ED)
            if self.training and self.noise > 0:
                scores_TE = scores_TE + torch.randn_like(scores_TE) * (self.noise / self.num_slots)
        choice_TK = scores_TE.topk(self.top_k, dim=1).indices
        mask_TE = _chosen(choice_TK, scores_TE, token_mask_T)
        if self.capacity_factor is not None:
            places = capacity(
                choice_TK, self.num_slots, self.capacity_factor, self.min_capacity, token_mask_T
            )
            # Tutel's confidence is the largest probability, of a softmax over all scores.
            confidence_T = scores_TE.softmax(1).amax(1)
            mask_TE = within_capacity(mask_TE, confidence_T, choice_TK, places)
        # NOTE: not ``mask / k``: the type of an integer division follows the default type, which is
        # bf16 in runs of ``trainer.precision=bf16-true``.
        weights_TE = mask_TE.float() if self.weights_sum == "k" else mask_TE.float() / self.top_k
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        aux = scores_TE.new_zeros(())
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE)

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        weights_TE = mask_TE.float()
        if self.weights_sum == "k":
            return weights_TE
        return weights_TE / weights_TE.sum(1, keepdim=True).clamp(min=1)

    def extra_repr(self) -> str:
        return f"k={self.top_k} of {self.num_slots}" + _capacity_repr(self)

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0


def _check_top_k(top_k: int, num_slots: int) -> None:
    if not 1 <= top_k <= num_slots:
        raise ValueError(f"top_k is {top_k}: expected 1 to the number of experts, {num_slots}")


def _check_capacity(factor: float | None, least: int) -> None:
    if factor is not None and not factor > 0:
        raise ValueError(f"capacity_factor is {factor}: expected a number > 0, or null: dropless")
    if least < 0:
        raise ValueError(f"min_capacity is {least}: expected 0 or more tokens")
    if least and factor is None:
        raise ValueError(
            f"min_capacity={least} needs a capacity_factor: without it none is dropped"
        )


def _capacity_repr(router: Any) -> str:
    if router.capacity_factor is None:
        return ""
    least = f", min_capacity={router.min_capacity}" if router.min_capacity else ""
    return f", capacity_factor={router.capacity_factor}{least}"


def capacity(
    choice_TK: Tensor, num_experts: int, factor: float, least: int, token_mask_T: Tensor | None
) -> int | Tensor:
    """Return how many tokens an expert takes: ``K * int(factor * ceil(T / E))``, or ``least``."""
    tokens, top_k = choice_TK.shape
    if token_mask_T is None:
        return max(least, top_k * int(factor * math.ceil(tokens / num_experts)))
    # NOTE: on the device, which counts the real tokens without being waited for.
    share = (token_mask_T.sum() + num_experts - 1) // num_experts
    # Apple's GPUs have no float64, in which int() above computes.
    precise = share.float() if share.device.type == "mps" else share.double()
    return (top_k * (factor * precise).long()).clamp(min=least)


def within_capacity(
    mask_TE: Tensor, confidence_T: Tensor, choice_TK: Tensor, places: int | Tensor
) -> Tensor:
    """Keep the pairs that find a place: first choices before second ones, and within a choice the
    tokens with the largest confidence first."""
    order_T = confidence_T.argsort(descending=True, stable=True)
    kept_TE = torch.zeros_like(mask_TE)
    taken_E = torch.zeros(mask_TE.shape[1], dtype=torch.long, device=mask_TE.device)
    for choice_T in choice_TK.unbind(1):
        wanted_TE = F.one_hot(choice_T[order_T], mask_TE.shape[1]) * mask_TE[order_T]
        place_TE = taken_E + wanted_TE.cumsum(0)
        kept_TE[order_T] |= (wanted_TE > 0) & (place_TE <= places)
        # Choices without a place count too, which changes nothing: that expert is full.
        taken_E = taken_E + wanted_TE.sum(0)
    return kept_TE


def _chosen(choice_TK: Tensor, scores_TE: Tensor, token_mask_T: Tensor | None) -> Tensor:
    """Return the mask of the real tokens' choices."""
    mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, choice_TK, True)
    return hide_padding(mask_TE, token_mask_T)


def in_turn(scores_TE: Tensor, top_k: int, token_mask_T: Tensor | None) -> Tensor:
    """Return k experts of each token, of which every real token takes the next ones, [T, K]."""
    real_T = scores_TE.new_ones(len(scores_TE)) if token_mask_T is None else token_mask_T
    first_T1 = (real_T.cumsum(0)[:, None].long() - 1).clamp(min=0) * top_k
    turn_TK = first_T1 + torch.arange(top_k, device=scores_TE.device)
    return turn_TK % scores_TE.shape[1]
