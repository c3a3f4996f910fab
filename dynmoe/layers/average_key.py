"""EMoE's router: experts are chosen by the mean of their keys, and their outputs are summed.

Shape suffixes: T tokens, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.layers.routing import Routing


class AverageKeyRouter(nn.Module):
    """The k experts with the largest ``x . mean key``, each with weight 1. Nothing is trained.

    Qiu et al. (arXiv 2310.10908), sec. 3. An expert's keys are the rows of its first matrix; the
    layer puts their current means into ``keys_ED`` at every forward. Weight 1 is for experts that
    are parts of one FFN (``moe.init=cluster`` or ``random``): all of them together are that FFN.

    Raises:
        ValueError: ``top_k`` is not 1 to ``num_slots``.
    """

    adaptive = False
    keys_ED: Tensor

    def __init__(self, dim: int, num_slots: int, top_k: int = 16) -> None:
        super().__init__()
        if not 1 <= top_k <= num_slots:
            raise ValueError(f"top_k is {top_k}: expected 1 to the number of experts, {num_slots}")
        self.top_k = top_k
        self.register_buffer("keys_ED", torch.zeros(num_slots, dim), persistent=False)

    def forward(
        self, x_TD: Tensor, live: Sequence[int], token_mask_T: Tensor | None = None
    ) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.detach().float(), self.keys_ED)
        choice_TK = scores_TE.topk(self.top_k, dim=1).indices
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, choice_TK, True)
        if token_mask_T is not None:
            mask_TE = mask_TE & token_mask_T[:, None]
        unserved_T = torch.zeros(len(x_TD), dtype=torch.bool, device=x_TD.device)
        aux = scores_TE.new_zeros(())
        return Routing(mask_TE.float(), mask_TE, scores_TE, unserved_T, aux, mask_TE)
