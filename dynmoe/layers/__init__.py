"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch alone."""

from dynmoe.layers.average_key import AverageKeyRouter
from dynmoe.layers.experts import Experts
from dynmoe.layers.moe import MoELayer, mask_padding, moe_layers, record_routing
from dynmoe.layers.routing import Routing
from dynmoe.layers.top_any import TopAnyRouter
from dynmoe.layers.top_k import CosineTopKRouter, TopKRouter

__all__ = [
    "AverageKeyRouter",
    "CosineTopKRouter",
    "Experts",
    "MoELayer",
    "Routing",
    "TopAnyRouter",
    "TopKRouter",
    "mask_padding",
    "moe_layers",
    "record_routing",
]
