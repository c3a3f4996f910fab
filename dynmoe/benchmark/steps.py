"""Whole training steps, and inference, of models that are measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dynmoe.benchmark.memory import Outputs, peak_and_kept
from dynmoe.benchmark.rows import StepRow
from dynmoe.benchmark.timing import Quartiles, clean, interleave, paired
from dynmoe.layers import moe_layers, record_routing
from dynmoe.metrics.efficiency import activated, count, flops

Mode = Literal["train", "inference"]

BATCHES = 8
"""They differ, and with them the loads of the experts, as in training."""


class Batch(NamedTuple):
    images: Tensor
    """[B, C, px, px]"""
    labels: Tensor
    """[B]"""


def random_batches(
    size: int, channels: int, px: int, classes: int, device: torch.device
) -> list[Batch]:
    """Noise, whatever it is: the time of a step depends on loads, not on what is learned."""
    torch.manual_seed(1)
    return [
        Batch(
            torch.randn(size, channels, px, px).to(device),
            torch.randint(classes, (size,)).to(device),
        )
        for _ in range(BATCHES)
    ]


class Training:
    """Calls are optimizer steps: forward, loss, backward, AdamW, zero_grad.

    The learning rate is 0: the same arithmetic, but k stays what it was fitted to.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Batch], aux_weight: float, amp: bool
    ) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        self.aux_weight = aux_weight
        self.amp = amp
        self._next = cycle(batches)

    def forward(self) -> Outputs:
        images, labels = next(self._next)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            with record_routing(self.model) as tape:
                loss = F.cross_entropy(self.model(images), labels)
            for calls in tape.values():
                loss = loss + self.aux_weight * sum(call.aux for call in calls)
        return (loss,)

    def backward(self, outputs: Outputs) -> None:
        outputs[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.backward(self.forward())


class Inference:
    """Calls are forward passes of the model as one would deploy it: compact, without gradients.

    A token that no expert serves takes its best one then, so k is above that of training.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], amp: bool) -> None:
        for name, layer in moe_layers(model).items():
            model.set_submodule(name, layer.compact())
        self.model = model.eval()
        self.amp = amp
        self._next = cycle(batches)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        images, _ = next(self._next)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            logits: Tensor = self.model(images)
        return logits


def measure_steps(
    mode: Mode,
    models: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    aux_weight: float,
    amp: bool,
    rounds: int,
    advance: Callable[[int, int], None],
) -> list[StepRow]:
    """A row for each of the ``models``, one of which is ``dense``.

    ``inference`` changes the models for good, so measure ``train`` before it.
    """
    device = batches[0].images.device
    costs = {name: count(model, batches[0].images[:1]) for name, model in models.items()}
    dense = flops(costs["dense"], {}, {})
    cases: dict[str, Training | Inference] = {
        name: Training(model, batches, aux_weight, amp)
        if mode == "train"
        else Inference(model, batches, amp)
        for name, model in models.items()
    }
    samples = interleave(cases, rounds, device, reference="dense", advance=advance)
    rows = []
    for name, case in cases.items():
        seconds = Quartiles.of(clean(samples[name]))
        ratio = paired(samples["dense"], samples[name])
        k = mean_k(case.model, batches, amp)
        experts = {layer: len(module.live) for layer, module in moe_layers(case.model).items()}
        own = flops(costs[name], experts, k)
        ideal = None if dense is None or own is None else dense / own
        size = len(batches[0].labels)
        rows.append(
            StepRow(
                case=name,
                mode=mode,
                k=float(name.removeprefix("dynmoe ")) if name.startswith("dynmoe ") else None,
                real_k=fmean(k.values()) if k else None,
                samples_per_s=size / seconds.median,
                samples_per_s_quartiles=(size / seconds.high, size / seconds.low),
                median_ms=1e3 * seconds.median,
                ratio=ratio.median,
                ratio_quartiles=(ratio.low, ratio.high),
                ideal=ideal,
                of_ideal=None if ideal is None else ratio.median / ideal,
                parameters=sum(p.numel() for p in case.model.parameters()),
                activated=activated(costs[name], experts, k),
                peak_bytes=peak_and_kept(case.forward, case.backward, device).peak
                if isinstance(case, Training)
                else None,
                rounds=len(samples[name]),
                slow=len(samples[name]) < rounds,
                contaminated=sum(sample.contaminated for sample in samples[name]),
            )
        )
    return rows


@torch.no_grad()
def mean_k(model: nn.Module, batches: Sequence[Batch], amp: bool) -> dict[str, float]:
    """Experts per token of each MoE layer, over all batches."""
    with (
        record_routing(model) as tape,
        torch.autocast(batches[0].images.device.type, torch.bfloat16, enabled=amp),
    ):
        for images, _ in batches:
            model(images)
    pairs = {n: sum(int(c.stats.load_E.sum()) for c in calls) for n, calls in tape.items()}
    tokens = {n: sum(int(c.stats.k_hist.sum()) for c in calls) for n, calls in tape.items()}
    return {name: pairs[name] / tokens[name] for name in pairs}
