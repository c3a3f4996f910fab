"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch alone."""

from dynmoe.layers.experts import Experts
from dynmoe.layers.fixed_routers import AverageKeyRouter, CosineTopKRouter, TopKRouter
from dynmoe.layers.moe import MoELayer, aux_loss, mask_padding, moe_layers, record_routing
from dynmoe.layers.routers import Router, Routing, TopAnyRouter

__all__ = [
    "AverageKeyRouter",
    "CosineTopKRouter",
    "Experts",
    "MoELayer",
    "Router",
    "Routing",
    "TopAnyRouter",
    "TopKRouter",
    "aux_loss",
    "mask_padding",
    "moe_layers",
    "record_routing",
]
