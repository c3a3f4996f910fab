"""What a model costs: parameters, by where they stand."""

from __future__ import annotations

from typing import Any

from torch import nn

from dynmoe.layers.moe import moe_layers


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """``{"other": n, "layers": {name: {"expert", "router", "router_fixed"}}}``.

    ``other``: all parameters outside MoE layers. Of a layer: those of one expert, the router's for
    each living expert, and the router's shared ones. A token activates ``other`` and in each layer
    ``mean k * expert + living experts * router + router_fixed``: every living expert is scored.
    """
    layers = {}
    inside = 0
    for name, layer in moe_layers(model).items():
        inside += sum(p.numel() for p in layer.parameters())
        router = sum(p.numel() for p in layer.router.parameters())
        per_expert = 0
        if layer.adaptive:
            first = layer.live[0]
            per_expert = sum(p.numel() for p in layer.router.slot_parameters(first))  # type: ignore[operator]
        layers[name] = {
            "expert": sum(p.numel() for p in layer.experts.slots[0].parameters()),
            "router": per_expert,
            "router_fixed": router - per_expert * layer.max_experts,
        }
    total = sum(p.numel() for p in model.parameters())
    return {"other": total - inside, "layers": layers}
