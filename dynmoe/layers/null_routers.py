"""Top-k over true experts and null experts, which cost nothing.

Shape suffixes: T tokens, E true experts, N null experts, C = E + N columns, D model width.
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


class NullExpertRouter(SoftmaxRouter):
    """The ``top_k`` largest of one softmax over true and null experts: 0 to k FFNs a token.

    AdaMoE (arXiv 2406.13233): null experts output 0, and weights are shares of the true picks. A
    token without a true pick gets 0; it has k = 0 and is in ``unserved_T`` by its own choice, which
    ``free_T`` shows. LongCat-Flash (arXiv 2509.01322): null experts return their input, weights are
    the probabilities as they are, and biases hold the mean k.

    - ``renorm``: weights are divided by the sum over the ``true_only`` picks, over ``all`` picks,
      or not at all (``none``). With ``true_only`` the logits of null experts cancel out of every
      weight, and the auxiliary loss alone moves them.
    - ``null_output``: null experts output ``zero``, or the token times their weight, ``identity``.
    - ``balance``: ``loss`` is AdaMoE's, in which null experts share one mean load;
      ``plain`` is that of its second experiment's code, where each has its own. ``bias`` has no
      loss: b_e += bias_rate * (target_k / (K E) - load_e / (K T)) after each step for every true
      expert e, added to the probabilities for the choice alone.
    - ``target_k``: the mean number of true experts that ``bias`` holds.
    - ``aux_end``: the auxiliary loss is multiplied by a factor that goes from 1 to this along the
      training.
    - ``z_weight``, ``sequence_weight``: see ``SoftmaxRouter``, over all columns.

    Raises:
        ValueError: ``top_k`` beyond the columns, a ``target_k`` that is missing, without use or out
            of reach, or ``identity`` with weights that leave null experts none.
    """

    bias_E: Tensor
    progress: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        num_null: int = 8,
        top_k: int = 3,
        renorm: Literal["true_only", "all", "none"] = "true_only",
        null_output: Literal["zero", "identity"] = "zero",
        balance: Literal["loss", "plain", "bias"] = "loss",
        bias_rate: float = 1e-3,
        target_k: float | Sequence[float] | None = None,
        aux_end: float = 1.0,
        z_weight: float = 0.0,
        sequence_weight: float = 0.0,
    ) -> None:
        super().__init__(z_weight, sequence_weight)
        if num_null < 0:
            raise ValueError(f"num_null is {num_null}: expected 0 or more null experts")
        if not 1 <= top_k <= num_slots + num_null:
            raise ValueError(
                f"top_k is {top_k}: expected 1 to the number of true and null experts, "
                f"{num_slots} + {num_null}"
            )
        if null_output == "identity" and renorm == "true_only":
            raise ValueError(
                "null_output=identity with renorm=true_only: null experts have no weight. Set "
                "renorm=none (LongCat-Flash) or all"
            )
        target_k = None if target_k is None else one_target(target_k)
        self.target_k = _checked_target(target_k, balance, min(top_k, num_slots))
        self.num_slots = num_slots
        self.num_null = num_null
        self.top_k = top_k
        self.renorm = renorm
        self.null_output = null_output
        self.balance = balance
        self.bias_rate = bias_rate
        self.aux_end = aux_end
        rows_CD = nn.init.trunc_normal_(torch.empty(num_slots + num_null, dim), std=0.02)
        self.weight = nn.Parameter(rows_CD[:num_slots].clone())
        self.null_weight = nn.Parameter(rows_CD[num_slots:].clone())
        self.register_buffer("bias_E", torch.zeros(num_slots, dtype=FP32))
        self.register_buffer("progress", torch.zeros((), dtype=FP32))

    @property
    def has_state(self) -> bool:
        return self.balance == "bias" or self.aux_end != 1

    def logits(self, x_TD: Tensor, live: Sequence[int]) -> Tensor:
        rows_CD = torch.cat([self.weight, self.null_weight]).float()
        return F.linear(x_TD.float(), rows_CD)

    def forward(
        self,
        x_TD: Tensor,
        live: Sequence[int],
        token_mask_T: Tensor | None = None,
        shape: Sequence[int] | None = None,
    ) -> Routing:
        self.check_pool(live)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TC = self.logits(x_TD, live)
            probs_TC = logits_TC.softmax(1)
            biased_TC = probs_TC.detach() + F.pad(self.bias_E, (0, self.num_null))
            picks = biased_TC.topk(self.top_k, dim=1).indices
            picks_TC = torch.zeros_like(probs_TC, dtype=torch.bool).scatter_(1, picks, True)
            picks_TC = hide_padding(picks_TC, token_mask_T)
            mask_TE = picks_TC[:, : self.num_slots]
            weights_TC = self._weights(probs_TC * picks_TC)
            aux = self._aux(probs_TC, picks_TC, token_mask_T)
            aux = self._with_losses(aux, logits_TC, probs_TC, picks_TC, token_mask_T, shape)
            extra_TD = None
            if self.null_output == "identity":
                passed_T1 = weights_TC[:, self.num_slots :].sum(1, keepdim=True)
                extra_TD = x_TD * passed_T1.to(x_TD.dtype)
        return Routing(
            weights_TC[:, : self.num_slots],
            mask_TE,
            probs_TC[:, : self.num_slots],
            hide_padding(~mask_TE.any(1), token_mask_T),
            aux,
            mask_TE,
            extra_TD,
            free_T=picks_TC[:, self.num_slots :].sum(1),
        )

    @property
    def can_weigh(self) -> bool:
        return self.renorm != "all"  # shares of null picks would be others too

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return self._weights(scores_TE * mask_TE)

    def _weights(self, picked_TC: Tensor) -> Tensor:
        if self.renorm == "none":
            return picked_TC
        counted_TC = picked_TC if self.renorm == "all" else picked_TC[:, : self.num_slots]
        sum_T1 = counted_TC.sum(1, keepdim=True)
        # 1 in the place of 0: a token without a pick has weights, and gradients, of exactly 0.
        return picked_TC / torch.where(sum_T1 > 0, sum_T1, 1.0)

    def _aux(self, probs_TC: Tensor, picks_TC: Tensor, token_mask_T: Tensor | None) -> Tensor:
        if self.balance == "bias":
            return probs_TC.new_zeros(())
        load_TC = picks_TC.float()
        if self.balance == "loss" and self.num_null:
            true_TE, null_TN = load_TC[:, : self.num_slots], load_TC[:, self.num_slots :]
            load_TC = torch.cat([true_TE, null_TN.mean(1, keepdim=True).expand_as(null_TN)], 1)
        aux = losses.load_balance(probs_TC, load_TC, load_TC.shape[1], token_mask_T)
        return aux * (1 + (self.aux_end - 1) * self.progress)

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        self.progress.fill_(min(1.0, own.step / own.num_steps))
        if self.balance == "bias" and self.target_k is not None:
            share_E = own.load_S / (self.top_k * own.tokens)
            expected = self.target_k / (self.top_k * self.num_slots)
            ran = own.calls > 0  # a layer that did not run has no load to even out
            self.bias_E += self.bias_rate * (expected - share_E) * ran

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        biases = {"bias": self.bias_E.tolist()} if self.balance == "bias" else {}
        return {"thresholds": None, "target_k": self.target_k, **biases}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 2 * dim * self.num_null

    def extra_repr(self) -> str:
        return (
            f"k=0 to {self.top_k} of {self.num_slots}, {self.num_null} null experts of output "
            f"{self.null_output}, renorm={self.renorm}, balance={self.balance}"
        )


def _checked_target(target_k: float | None, balance: str, most: int) -> float | None:
    if balance != "bias":
        if target_k is not None:
            raise ValueError(
                f"target_k={target_k} needs balance=bias: under a loss, num_null and top_k set k"
            )
        return None
    if target_k is None or not 0 < target_k <= most:
        raise ValueError(f"target_k is {target_k}: expected more than 0, up to {most}, for biases")
    return target_k
