"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch alone."""

from dynmoe.layers.experts import Experts
from dynmoe.layers.moe import MoELayer, moe_layers, record_routing
from dynmoe.layers.routing import Routing
from dynmoe.layers.top_any import TopAnyRouter
from dynmoe.layers.top_k import CosineTopKRouter, TopKRouter

__all__ = [
    "CosineTopKRouter",
    "Experts",
    "MoELayer",
    "Routing",
    "TopAnyRouter",
    "TopKRouter",
    "moe_layers",
    "record_routing",
]
