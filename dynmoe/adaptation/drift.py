"""Drift of an expert's gradient, and how its copy shares it (MASS): statistics and pure functions.

Sources: arXiv 2512.19765 and its code, ``tutel/impls/moe_layer_mass.py``.

Shape suffixes: H hidden neurons, D model width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Split = Literal["projection_full", "projection_both"]


class Drift:
    """The gradient norms of one expert, whose upward drift a z test finds.

    The standard scores of the last ``window`` norms are kept, from the ``warmup``-th norm on.
    """

    def __init__(self, warmup: int, window: int) -> None:
        self.warmup = warmup
        self.count = 0
        """Norms since the expert was last split; the windows keep those before."""
        self.norms: deque[float] = deque(maxlen=window)
        self.scores: deque[float] = deque(maxlen=window)

    def add(self, norm: float) -> None:
        self.count += 1
        self.norms.append(norm)
        if self.count >= self.warmup:
            self.scores.append(standard_score(self.norms))

    @property
    def may_test(self) -> bool:
        return self.count >= self.warmup and len(self.norms) == self.norms.maxlen

    @property
    def p_value(self) -> float:
        assert self.norms.maxlen is not None
        return p_value(self.scores, self.norms.maxlen)

    def state_dict(self) -> dict[str, Any]:
        # As tensors: plain numbers, which a checkpoint reads without trusting its pickles.
        return {
            "count": self.count,
            "norms": torch.tensor([*self.norms], dtype=torch.float64),
            "scores": torch.tensor([*self.scores], dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        for kept, values in ((self.norms, state["norms"]), (self.scores, state["scores"])):
            kept.clear()
            kept.extend(values.tolist())


def standard_score(norms: Iterable[float]) -> float:
    """Return how many standard deviations the last norm is above the mean of all of them.

    In fp32, as the code. 0 where all are equal: the norms of an expert without tokens are.
    """
    window = torch.tensor([*norms], dtype=torch.float32)
    deviation, mean = window.std(), window.mean()
    if not deviation > 1e-6 * mean:  # rounding of the mean
        return 0.0
    return float((window[-1] - mean) / deviation)


def p_value(scores: Iterable[float], window: int) -> float:
    """Return how likely a sum of scores this large is by chance: 1 - Phi(sum / sqrt(window)).

    ``window`` is that of a full one, however many scores there are yet.
    """
    return math.erfc(sum(scores) / math.sqrt(window) / math.sqrt(2)) / 2


def cosine(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Return the cosine of weights and their gradients, each seen as one long vector."""
    w, g = (torch.cat([t.float().flatten() for t in part]) for part in (weights, gradients))
    return F.cosine_similarity(w, g, dim=0)


def projection(gradient_HD: Tensor, weight_HD: Tensor) -> Tensor:
    """Return the part of a gradient along its weight, row by row; a vector is one row."""
    g_HD, w_HD = gradient_HD.float(), weight_HD.float()
    share_H1 = (g_HD * w_HD).sum(-1, keepdim=True) / (w_HD.square().sum(-1, keepdim=True) + 1e-12)
    return (share_H1 * w_HD).to(gradient_HD.dtype)


def split_gradient(gradient: Tensor, weight: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """Return the gradients of an expert and of its copy, which has its weight.

    The expert gets the projection on the weight. The copy gets the whole gradient, as the paper
    means; with ``projection_both`` the projection too, as the code does: it keeps a view of the
    gradient that it then overwrites.
    """
    along = projection(gradient, weight)
    return along, gradient.clone() if split == "projection_full" else along.clone()
