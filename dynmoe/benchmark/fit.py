"""Routing of a chosen amount and skew, from a real router: its thresholds are fitted to the tokens.

Shape suffixes: T tokens, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dynmoe.layers import TopAnyRouter

SKEW = 0.8  # Zipf exponent of the experts' popularity


def zipf_loads(tokens: int, experts: int, k: float) -> Tensor:
    """Tokens of each expert, int64 [E]: popularity rank^-0.8, in total ``round(k * tokens)``.

    No expert gets more than all tokens: what is above goes to the others by popularity.
    """
    share_E = torch.arange(1, experts + 1, dtype=torch.float64) ** -SKEW
    load_E = torch.zeros(experts, dtype=torch.float64)
    free_E = torch.ones(experts, dtype=torch.bool)
    while free_E.any():  # each pass fills at least one expert, or is the last
        left = k * tokens - load_E[~free_E].sum()
        load_E[free_E] = left * share_E[free_E] / share_E[free_E].sum()
        over_E = free_E & (load_E > tokens)
        if not over_E.any():
            break
        load_E[over_E] = tokens
        free_E &= ~over_E
    return load_E.cumsum(0).round().diff(prepend=load_E.new_zeros(1)).long()


@torch.no_grad()
def fit_thresholds(router: TopAnyRouter, live: Sequence[int], x_TD: Tensor, k: float) -> None:
    """Set the thresholds so that ``x_TD`` activates k experts per token on average, Zipf-skewed.

    Expert e's threshold is put between the scores of its last wanted token and the next one.
    Where fp32 cannot tell the two apart after the sigmoid, the load is off by that token.
    """
    scores_TE = router(x_TD, live).scores_TE.sort(dim=0, descending=True).values
    edges_TE = F.pad(F.pad(scores_TE, (0, 0, 1, 0), value=2.0), (0, 0, 0, 1), value=-2.0)
    for e, load in enumerate(zipf_loads(len(x_TD), len(live), k).tolist()):
        router.thresholds[live[e]].copy_(edges_TE[load : load + 2, e].mean())
