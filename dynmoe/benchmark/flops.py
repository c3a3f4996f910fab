"""What a model with MoE layers costs beside the dense model it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dynmoe.layers import moe_layers


@dataclass(frozen=True)
class Flops:
    """FLOPs of the dense model's forward pass on one batch. A backward pass is twice as much."""

    total: int
    modules: dict[str, int]
    """By dotted name."""

    @classmethod
    @torch.no_grad()
    def of(cls, dense: nn.Module, images: Tensor) -> Flops:
        with FlopCounterMode(display=False) as counter:
            dense(images)
        prefix = f"{type(dense).__name__}."
        counts = {name: sum(each.values()) for name, each in counter.get_flop_counts().items()}
        modules = {name.removeprefix(prefix): count for name, count in counts.items()}
        return cls(modules["Global"], modules)

    def with_moe(self, model: nn.Module, k: Mapping[str, float], tokens: int) -> float:
        """The same with the MoE layers of ``model``, by their mean k, on ``tokens`` in the batch.

        An FFN that became an MoE layer counts k times; its router has one product [T, D] x [D, E].
        """
        total = float(self.total)
        for name, layer in moe_layers(model).items():
            total += (k[name] - 1) * self.modules[name] + 2 * tokens * layer.dim * len(layer.live)
        return total
