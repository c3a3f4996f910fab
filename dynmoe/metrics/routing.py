"""Routing statistics of a stretch of training or an evaluation, summed by source and layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynmoe.layers.moe import MoELayer, Routed, moe_layers
from dynmoe.layers.top_any import TopAnyRouter

Reduce = Callable[[Tensor], Tensor]


class RoutingMeter:
    """Adds up routing by source ("train", "env0", ...) and layer.

    Sums are kept by slot, since experts may come and go within a stretch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = moe_layers(model)
        self._sums: dict[tuple[str, str], Tensor] = {}

    def update(self, source: str, tape: Mapping[str, Sequence[Routed]]) -> None:
        for name, calls in tape.items():
            layer = self._layers[name]
            for call in calls:
                sums = self._sums.get((source, name))
                if sums is None:
                    sums = self._sums[source, name] = _zeros(layer, call.stats.load_E.device)
                sums[0, list(layer.live)] += call.stats.load_E
                sums[1, : len(call.stats.k_hist)] += call.stats.k_hist

    def records(self, sources: Sequence[str], reduce: Reduce) -> list[dict[str, Any]]:
        """One record for each source and layer, summed over ranks by ``reduce``; then starts anew.

        Every rank must ask for the same sources, whichever of them it has seen.
        """
        records = []
        for source in sources:
            for name, layer in self._layers.items():
                device = layer.active_E.device
                sums = reduce(self._sums.pop((source, name), _zeros(layer, device)))
                records.append({"source": source, "layer": name, **_record(layer, sums)})
        return records


def _zeros(layer: MoELayer, device: torch.device) -> Tensor:
    """Row 0: tokens by slot; row 1: tokens by k."""
    return torch.zeros(2, layer.max_experts + 1, dtype=torch.long, device=device)


def _record(layer: MoELayer, sums: Tensor) -> dict[str, Any]:
    load_S, k_hist = sums.tolist()
    while len(k_hist) > len(layer.live) + 1 and k_hist[-1] == 0:
        k_hist.pop()
    tokens = sum(k_hist)
    router = layer.router
    return {
        "slots": list(layer.live),
        "tokens": tokens,
        "mean_k": sum(load_S) / max(1, tokens),
        "k_hist": k_hist,
        "unrouted": k_hist[0] / max(1, tokens),
        "load": [load_S[slot] for slot in layer.live],
        "thresholds": (
            [router.thresholds[slot].item() for slot in layer.live]
            if isinstance(router, TopAnyRouter)
            else None
        ),
    }
