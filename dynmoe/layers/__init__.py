"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch alone."""

from dynmoe.layers.biased_routers import BiasedTopKRouter
from dynmoe.layers.budget import BudgetTopAnyRouter
from dynmoe.layers.expert_choice import ExpertChoiceRouter, ExpertThresholdRouter
from dynmoe.layers.experts import Experts
from dynmoe.layers.fixed_routers import AverageKeyRouter, CosineTopKRouter, TopKRouter
from dynmoe.layers.masked_routers import MaskedTopKRouter
from dynmoe.layers.moe import (
    MoELayer,
    aux_loss,
    constant_weights,
    mask_padding,
    moe_layers,
    record_routing,
)
from dynmoe.layers.null_routers import NullExpertRouter
from dynmoe.layers.prefix_routers import PrefixRouter
from dynmoe.layers.relu_routers import ReLURouter
from dynmoe.layers.routers import Router, Routing, StepTotals, TopAnyRouter

__all__ = [
    "AverageKeyRouter",
    "BiasedTopKRouter",
    "BudgetTopAnyRouter",
    "CosineTopKRouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "Experts",
    "MaskedTopKRouter",
    "MoELayer",
    "NullExpertRouter",
    "PrefixRouter",
    "ReLURouter",
    "Router",
    "Routing",
    "StepTotals",
    "TopAnyRouter",
    "TopKRouter",
    "aux_loss",
    "constant_weights",
    "mask_padding",
    "moe_layers",
    "record_routing",
]
