"""A router of one's own: experts whose row has a product above `cut` with a token serve it.

PYTHONPATH=docs/examples/own_router dynmoe-run --config-dir docs/examples/own_router \
    task=vit_domainbed moe=my_router trainer=smoke
"""

import torch
from torch import nn

from dynmoe.layers import Router, Routing


class DotRouter(Router):
    adaptive = True  # experts may come and go

    def __init__(self, dim: int, num_slots: int, cut: float = 0.0) -> None:
        super().__init__()
        self.cut = cut
        # One Parameter a slot: an empty one then has no gradient and no optimizer state.
        self.rows = nn.ParameterList(nn.Parameter(torch.randn(dim)) for _ in range(num_slots))

    def forward(self, x_TD, live, token_mask_T=None):
        rows_ED = torch.stack([self.rows[slot] for slot in live])
        scores_TE = x_TD.float() @ rows_ED.t() / x_TD.shape[1] ** 0.5
        mask_TE = scores_TE > self.cut
        unserved_T = ~mask_TE.any(1)
        if token_mask_T is not None:  # padding chooses no expert and is not reported
            mask_TE, unserved_T = mask_TE & token_mask_T[:, None], unserved_T & token_mask_T
        weights_TE = scores_TE.sigmoid() * mask_TE
        aux = (rows_ED.norm(dim=1) - 1).square().mean()
        return Routing(weights_TE, mask_TE, scores_TE, unserved_T, aux, dispatch_TE=mask_TE)

    def slot_parameters(self, slot):
        return [self.rows[slot]]

    @torch.no_grad()
    def point(self, slot, direction_D):
        self.rows[slot].copy_(nn.functional.normalize(direction_D, dim=0))

    def keep(self, slots):
        self.rows = nn.ParameterList(self.rows[slot] for slot in slots)
