"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch and nothing else."""

from dynmoe.layers.experts import Experts
from dynmoe.layers.moe import MoELayer, moe_layers, record_routing
from dynmoe.layers.router import CosineTopKRouter, Routing, TopAnyRouter, TopKRouter

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
