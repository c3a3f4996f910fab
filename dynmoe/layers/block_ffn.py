"""BlockFFN's router: ReLU scores, and losses that let neighbouring tokens share experts.

Shape suffixes: T tokens, B sequences, N tokens of a sequence, J chunks of a sequence, L tokens of a
chunk, E living experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers.routers import (
    FP32,
    Router,
    Routing,
    StepTotals,
    hide_padding,
    sequence_length,
)


class BlockFFNRouter(Router):
    """Experts with a positive score; weights are the scores over their root mean square, times a
    learned gain (BlockFFN, arXiv 2507.08771). k is free, 0 included.

    - ``chunk_weight``: of the share of experts that a chunk of ``chunk_length`` tokens activates,
      ``chunk_activation``. ``locality_weight``: of ``locality``, with its ``steepness``.
    - ``schedule_every``: the chunk loss is multiplied by a factor, one for all layers, that starts
      at 1 and from step ``schedule_start`` on follows the loss: within the next so many steps it
      moves by the ratio of the last so many steps' mean loss to that of those before, never above
      1. 0: constant.
    - ``eps``: below the root.

    Chunks and neighbours are of one sequence (``Router.takes_shape``).

    Raises:
        ValueError: a ``chunk_length`` below 1.
    """

    factor: Tensor
    goal: Tensor
    window: Tensor
    before: Tensor

    def __init__(
        self,
        dim: int,
        num_slots: int,
        chunk_length: int = 64,
        chunk_weight: float = 5e-2,
        locality_weight: float = 1e-3,
        steepness: float = 100.0,
        schedule_every: int = 100,
        schedule_start: int = 1000,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if chunk_length < 1:
            raise ValueError(f"chunk_length is {chunk_length}: expected 1 or more tokens")
        self.num_slots = num_slots
        self.chunk_length = chunk_length
        self.chunk_weight = chunk_weight
        self.locality_weight = locality_weight
        self.steepness = steepness
        self.schedule_every = schedule_every
        self.schedule_start = schedule_start
        self.eps = eps
        self.takes_shape = chunk_weight > 0 or locality_weight > 0
        self.observes = 2 if self.has_state else 0
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_slots, dim), std=0.02))
        self.gain_E = nn.Parameter(torch.ones(num_slots))
        self.register_buffer("factor", torch.ones((), dtype=FP32))
        self.register_buffer("goal", torch.ones((), dtype=FP32))
        self.register_buffer("window", torch.zeros(2, dtype=FP32))
        self.register_buffer("before", torch.zeros((), dtype=FP32))

    @property
    def has_state(self) -> bool:
        return self.chunk_weight > 0 and self.schedule_every > 0

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
            raw_TE = self.logits(x_TD, live)
            scores_TE = raw_TE.relu()
            mask_TE = hide_padding(scores_TE > 0, token_mask_T)
            normed_TE = self._normed(scores_TE)
            weights_TE = normed_TE * self.gain_E.float() * mask_TE
            aux, observed, length = raw_TE.new_zeros(()), None, sequence_length(shape)
            exporting = torch.compiler.is_exporting()  # not trained, of any number of sequences
            if self.chunk_weight and self.recorded and not exporting:
                share_TE = normed_TE / (normed_TE.sum(1, keepdim=True) + 1e-5)
                counts = chunk_activation(share_TE, self.chunk_length, length, token_mask_T)
                aux = self.chunk_weight * self.factor * counts[0] / counts[1].clamp(min=1)
                if self.training and self.has_state:
                    observed = counts.detach()
            if self.locality_weight and self.recorded and not exporting:
                near = locality(raw_TE * self.steepness, length, token_mask_T)
                aux = aux + self.locality_weight * near
        unserved_T = hide_padding(~mask_TE.any(1), token_mask_T)
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, mask_TE, observed=observed)

    def _normed(self, scores_TE: Tensor) -> Tensor:
        return scores_TE * (scores_TE.square().mean(1, keepdim=True) + self.eps).rsqrt()

    def weigh(self, scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
        return self._normed(scores_TE) * self.gain_E.float() * mask_TE

    def margins(self, scores_TE: Tensor, live: Sequence[int]) -> Tensor:
        return scores_TE.masked_fill(scores_TE <= 0, -torch.inf)

    def update(self, own: StepTotals, every: Sequence[StepTotals]) -> None:
        # Sums of all layers: they share one factor.
        self.window += torch.stack([each.observed for each in every]).sum(0).to(FP32)
        left = self.schedule_every - own.step % self.schedule_every
        if left == self.schedule_every:  # the last step of a window
            mean = self.window[0] / self.window[1].clamp(min=1)
            ratio = torch.where(self.before > 0, mean / self.before.clamp(min=1e-9), 1.0)
            self.factor.copy_(self.goal)
            if own.step >= self.schedule_start:
                self.goal.copy_((self.factor * ratio).clamp(max=1))
            self.before.copy_(mean)
            self.window.zero_()
        else:
            self.factor += (self.goal - self.factor) / (left + 1)

    def record(self, live: Sequence[int]) -> dict[str, Any]:
        return {"thresholds": None, **({"factor": self.factor.item()} if self.has_state else {})}

    def flops(self, dim: int) -> tuple[int, int]:
        return 2 * dim, 0

    def extra_repr(self) -> str:
        return f"k=any of {self.num_slots}, chunks of {self.chunk_length}"


def chunk_activation(
    share_TE: Tensor, chunk: int, length: int | None = None, real_T: Tensor | None = None
) -> Tensor:
    """Return the sum over chunks of the share of experts that they activate, and their number, [2].

    A chunk activates expert e with the probability ``1 - prod_t (1 - share_te)`` over its tokens.
    The last chunk of a sequence may be shorter. Chunks of padding do not count.
    """
    if not len(share_TE):
        return torch.stack([share_TE.sum(), share_TE.sum()])
    length = length or len(share_TE)
    if real_T is None:
        real_T = torch.ones_like(share_TE[:, 0], dtype=torch.bool)
    kept_TE = torch.cat([share_TE * real_T[:, None], real_T[:, None].float()], 1)
    more = -length % chunk  # tokens with a share of 0 make the last chunk full
    kept_BNE = F.pad(kept_TE.view(-1, length, kept_TE.shape[1]), (0, 0, 0, more))
    kept_JLE = kept_BNE.reshape(-1, chunk, kept_TE.shape[1])
    idle_JE = (1 - kept_JLE[..., :-1] + 1e-5).log().sum(1).exp()
    real_J = kept_JLE[..., -1].sum(1) > 0
    return torch.stack([((1 - idle_JE.mean(1)) * real_J).sum(), real_J.sum().float()])


def locality(logits_TE: Tensor, length: int | None = None, real_T: Tensor | None = None) -> Tensor:
    """Mean binary cross-entropy between the activations of neighbours in a sequence.

    The token before has the logits, the token after it the targets, which have a gradient too.
    """
    if not len(logits_TE):
        return logits_TE.sum()
    length = length or len(logits_TE)
    logits_BNE = logits_TE.view(-1, length, logits_TE.shape[1])
    left, right = logits_BNE[:, :-1], logits_BNE[:, 1:]
    loss_BN = F.binary_cross_entropy_with_logits(left, right.sigmoid(), reduction="none").mean(2)
    if real_T is None:
        return loss_BN.sum() / max(1, loss_BN.numel())
    real_BN = real_T.view(-1, length)
    both_BN = real_BN[:, :-1] & real_BN[:, 1:]
    return (loss_BN * both_BN).sum() / both_BN.sum().clamp(min=1)
