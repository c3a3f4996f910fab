"""The MoE layer: routers, experts, dispatch and auxiliary losses. Needs PyTorch alone."""

from dynmoe.layers.biased_routers import BiasedTopKRouter
from dynmoe.layers.block_ffn import BlockFFNRouter
from dynmoe.layers.budget import BudgetTopAnyRouter
from dynmoe.layers.conflict import ConflictLoss
from dynmoe.layers.expert_choice import ExpertChoiceRouter, ExpertThresholdRouter
from dynmoe.layers.experts import Experts
from dynmoe.layers.fixed_routers import AverageKeyRouter, CosineTopKRouter, TopKRouter
from dynmoe.layers.masked_routers import MaskedTopKRouter
from dynmoe.layers.moe import (
    MoELayer,
    aux_loss,
    conflict_loss,
    constant_weights,
    mask_padding,
    moe_layers,
    record_routing,
)
from dynmoe.layers.null_routers import NullExpertRouter
from dynmoe.layers.predicted_routers import GeMoERouter, UniFRouter
from dynmoe.layers.prefix_routers import PrefixRouter
from dynmoe.layers.relu_routers import ReLURouter
from dynmoe.layers.routers import Router, Routing, StepTotals, TopAnyRouter
from dynmoe.layers.soft import SoftMoELayer, SoftSlots
from dynmoe.layers.zero_cost_routers import ZeroCostRouter

__all__ = [
    "AverageKeyRouter",
    "BiasedTopKRouter",
    "BlockFFNRouter",
    "BudgetTopAnyRouter",
    "ConflictLoss",
    "CosineTopKRouter",
    "ExpertChoiceRouter",
    "ExpertThresholdRouter",
    "Experts",
    "GeMoERouter",
    "MaskedTopKRouter",
    "MoELayer",
    "NullExpertRouter",
    "PrefixRouter",
    "ReLURouter",
    "Router",
    "Routing",
    "SoftMoELayer",
    "SoftSlots",
    "StepTotals",
    "TopAnyRouter",
    "TopKRouter",
    "UniFRouter",
    "ZeroCostRouter",
    "aux_loss",
    "conflict_loss",
    "constant_weights",
    "mask_padding",
    "moe_layers",
    "record_routing",
]
