"""A trained model as it is used: adapters merged, empty slots of MoE layers dropped."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynmoe.layers.moe import moe_layers


def merge_adapters(model: Any) -> None:
    """Add the products of LoRA's matrices to the weights that they adapt, in place."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            model.set_submodule(name, module.base_layer)


def compact_layers(model: nn.Module) -> None:
    """Put a compact copy in the place of each MoE layer: equal outputs, no empty slots."""
    for name, layer in moe_layers(model).items():
        model.set_submodule(name, layer.compact())
