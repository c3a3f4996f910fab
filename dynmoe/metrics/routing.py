"""Routing statistics of a stretch of training or an evaluation, summed by source and layer.

Shape suffixes: B samples, N tokens of a sample, T all real tokens, E living experts, S slots,
C classes, P parts of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynmoe.layers.moe import MoELayer, Routed, moe_layers

Reduce = Callable[[Tensor], Tensor]

TRAIN = "train"
"""The source of training; every other one is the name of what is evaluated."""

POSITIONS = 1024
"""Token positions with a count each; later ones are left out of ``k_by_position``."""


class _Sums(NamedTuple):
    """Sums of one source and layer, by slot: experts may come and go within a stretch."""

    load_S: Tensor
    k_hist_S: Tensor
    """Tokens by k, 0 to S."""
    position_2N: Tensor
    """Real tokens at each position, and the sum of their k. Evaluations only, like ``class_CS``."""
    class_CS: Tensor
    """Routed tokens of each class."""
    part_PS: Tensor
    """Tokens of each part that each slot served; last, how many there are."""
    free_2: Tensor
    """Choices of experts without an FFN, and tokens of routers that have some."""


class RoutingMeter:
    """Adds up routing by source ("train", "dev", ...) and layer.

    ``classes`` is the number of labels that ``update`` may be given; ``parts`` names the parts of a
    sequence (image, prompt, answer) that are recorded separately.
    """

    def __init__(self, model: nn.Module, classes: int = 0, parts: Sequence[str] = ()) -> None:
        self.watch(model)
        self._classes = classes
        self._parts = tuple(parts)

    def watch(self, model: nn.Module) -> None:
        """Take the layers that the model has now; what was summed over others is dropped."""
        self._layers = moe_layers(model)
        self._sums: dict[tuple[str, str], _Sums] = {}

    def update(
        self,
        source: str,
        tape: Mapping[str, Sequence[Routed]],
        label_B: Tensor | None = None,
        part_BN: Sequence[Tensor] | None = None,
    ) -> None:
        """Add the calls of all layers on a tape of ``record_routing``. Padding and tokens that are
        not finite count nowhere.

        ``label_B``: the classes of the samples, of which the layers saw [B, N, D]; ``part_BN``: for
        each call of a layer the indices in ``parts`` of its tokens.
        """
        for name, calls in tape.items():
            live = list(self._layers[name].live)
            for number, call in enumerate(calls):
                sums = self._sums.get((source, name))
                if sums is None:
                    sums = self._sums[source, name] = self._zeros(source, name)
                sums.load_S[live] += call.stats.load_E
                sums.k_hist_S[: len(call.stats.k_hist)] += call.stats.k_hist
                if call.free is not None:
                    sums.free_2[0] += call.free.sum()
                    sums.free_2[1] += call.stats.k_hist.sum()
                if part_BN is not None:
                    _add_parts(sums.part_PS, call, live, part_BN[number])
                if label_B is None:
                    continue
                k_BN = call.mask[:, :POSITIONS].sum(2)
                real_BN = torch.ones_like(k_BN, dtype=torch.bool)
                if call.token_mask is not None:
                    real_BN = call.token_mask[:, :POSITIONS]
                sums.position_2N[:, : k_BN.shape[1]] += torch.stack([real_BN.sum(0), k_BN.sum(0)])
                load_CE = torch.zeros_like(sums.class_CS[:, live])
                sums.class_CS[:, live] += load_CE.index_add_(0, label_B, call.mask.sum(1))

    def records(self, sources: Sequence[str], reduce: Reduce) -> list[dict[str, Any]]:
        """Return a record for each source and layer, summed over ranks by ``reduce``; start anew.

        Every rank must ask for the same sources, whichever of them it has seen.
        """
        records = []
        for source in sources:
            for name, layer in self._layers.items():
                # NOTE: zeros where a rank has seen nothing, because reduce() needs all ranks.
                own = self._sums.pop((source, name), None) or self._zeros(source, name)
                sums = _Sums(*(reduce(part) if part.numel() else part for part in own))
                record = {"source": source, "layer": name, **_record(layer, sums)}
                if self._details(source):
                    record |= _detailed_record(layer, sums)
                if layer.conflict is not None and source == TRAIN:
                    found = reduce(layer.conflict.take(layer.active_E.device))
                    record |= _conflict_record(*found.tolist())
                if self._parts:
                    record["parts"] = self._parts_record(layer, sums)
                records.append(record)
        return records

    def _parts_record(self, layer: MoELayer, sums: _Sums) -> dict[str, Any]:
        found = {}
        for name, (*load_S, tokens) in zip(self._parts, sums.part_PS.tolist(), strict=True):
            load = [load_S[slot] for slot in layer.live]
            found[name] = {"tokens": tokens, "mean_k": sum(load_S) / max(1, tokens), "load": load}
        return found

    def _details(self, source: str) -> bool:
        return self._classes > 0 and source != TRAIN

    def _zeros(self, source: str, name: str) -> _Sums:
        layer, details = self._layers[name], self._details(source)
        slots = layer.max_experts
        shapes = (
            (slots,),
            (slots + 1,),
            (2, POSITIONS * details),
            (self._classes * details, slots),
            (len(self._parts), slots + 1),
            (2,),
        )
        return _Sums(
            *(
                torch.zeros(shape, dtype=torch.long, device=layer.active_E.device)
                for shape in shapes
            )
        )


def _add_parts(part_PS: Tensor, call: Routed, live: list[int], part_BN: Tensor) -> None:
    # NOTE: tokens that do not count are added as zeros: to take them out, a device would be waited
    # for. Their mask is False already.
    counts = call.token_mask
    real_BN1 = (torch.ones_like(part_BN) if counts is None else counts.to(part_BN.dtype))[..., None]
    rows_TS = torch.cat([call.mask.long(), real_BN1.long()], dim=-1).flatten(0, 1)
    columns = [*live, part_PS.shape[1] - 1]
    added_PS = torch.zeros_like(part_PS[:, columns])
    part_PS[:, columns] += added_PS.index_add_(0, part_BN.flatten(), rows_TS)


def _record(layer: MoELayer, sums: _Sums) -> dict[str, Any]:
    load_S, k_hist = sums.load_S.tolist(), sums.k_hist_S.tolist()
    # Tokens may have chosen more experts earlier in the stretch than are alive at its end.
    while len(k_hist) > len(layer.live) + 1 and k_hist[-1] == 0:
        k_hist.pop()
    tokens = sum(k_hist)
    free, among = sums.free_2.tolist()
    return {
        "slots": list(layer.live),
        "tokens": tokens,
        "mean_k": sum(load_S) / max(1, tokens),
        "k_hist": k_hist,
        "unrouted": k_hist[0] / max(1, tokens),
        "load": [load_S[slot] for slot in layer.live],
        # Choices of experts that cost nothing, beside the k of those with an FFN.
        **({"mean_free": free / among} if among else {}),
        **({"shared_experts": len(layer.shared)} if len(layer.shared) else {}),
        **layer.router.record(layer.live),
    }


def _conflict_record(pairs: float, conflicts: float, cosines: float) -> dict[str, float | None]:
    """Of the backward passes in which the loss counted; None without a pair."""
    return {
        "conflict_share": conflicts / pairs if pairs else None,
        "conflict_cosine": cosines / pairs if pairs else None,
    }


def _detailed_record(layer: MoELayer, sums: _Sums) -> dict[str, Any]:
    tokens, k_sums = sums.position_2N.tolist()
    return {
        "k_by_position": [
            round(k / count, 4) for k, count in zip(k_sums, tokens, strict=True) if count
        ],
        "load_by_class": sums.class_CS[:, list(layer.live)].tolist(),
    }
