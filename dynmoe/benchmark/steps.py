"""Whole training steps, and inference, of models that are measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from dynmoe.benchmark.results import StepRow, TrainedRow
from dynmoe.benchmark.timing import Outputs, Speed, interleave, peak_and_kept
from dynmoe.benchmark.workload import LabelledBatch, calls_of_sample, largest, tokens_of
from dynmoe.data.vl.batches import ConversationBatch
from dynmoe.layers import moe_layers, record_routing
from dynmoe.metrics.efficiency import Costs, activated, flops

Mode = Literal["train", "inference"]


class Training:
    """Calls are optimizer steps: forward with its loss, backward, optimizer, zero_grad.

    The learning rate becomes 0: the same arithmetic, but the routing stays what it is.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any], Tensor],
        optimizer: Optimizer,
        batches: Sequence[LabelledBatch],
        amp: bool,
    ) -> None:
        self.model = model.train()
        self.loss = loss
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        self.amp = amp
        self._next = cycle(batches)

    def forward(self, batch: LabelledBatch) -> Outputs:
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            return (self.loss(batch),)

    def backward(self, outputs: Outputs) -> None:
        outputs[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self) -> None:
        self.backward(self.forward(next(self._next)))

    def peak_bytes(self, batch: LabelledBatch) -> int:
        """Of a step, beyond weights and optimizer state."""
        forward = partial(self.forward, batch)
        return peak_and_kept(forward, self.backward, batch.label.device).peak


def classification(
    model: nn.Module, batches: Sequence[LabelledBatch], aux_weight: float, amp: bool
) -> Training:
    """Cross-entropy, of numbers the squared error, and the auxiliary losses, AdamW."""

    def loss(batch: LabelledBatch) -> Tensor:
        with record_routing(model) as tape:
            output = model(*batch.inputs)
        if isinstance(batch, ConversationBatch):
            value = F.cross_entropy(output.float(), batch.scored[1])
        elif batch.label.is_floating_point():
            value = F.mse_loss(output.squeeze(1), batch.label)
        else:
            value = F.cross_entropy(output, batch.label)
        for calls in tape.values():
            value = value + aux_weight * sum(call.aux for call in calls)
        return value

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return Training(model, loss, optimizer, batches, amp)


class Inference:
    """Calls are forward passes of the model as one would deploy it: compact, without gradients.

    A token that no expert serves takes its best one then, so k is above that of training.
    """

    def __init__(self, model: nn.Module, batches: Sequence[LabelledBatch], amp: bool) -> None:
        self.model = deployed(model)
        self.amp = amp
        self._next = cycle(batches)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        batch = next(self._next)
        with torch.autocast(batch.label.device.type, torch.bfloat16, enabled=self.amp):
            logits: Tensor = self.model(*batch.inputs)
        return logits


def deployed(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, its MoE layers compact from now on."""
    for name, layer in moe_layers(model).items():
        model.set_submodule(name, layer.compact())
    return model.eval()


def measure_steps(
    mode: Mode,
    models: Mapping[str, nn.Module],
    costs: Mapping[str, Costs],
    batches: Sequence[LabelledBatch],
    aux_weight: float,
    amp: bool,
    rounds: int,
    advance: Callable[[int, int], None],
) -> list[StepRow]:
    """A row for each of the ``models``, one of which is ``dense``, and its ``costs_of_sample``.

    ``inference`` changes the models for good, so measure ``train`` before it.
    """
    device, whole, tokens = batches[0].label.device, calls_of_sample(batches), tokens_of(batches)
    size = fmean(len(batch.label) for batch in batches)
    dense = flops(costs["dense"], {}, {})
    cases: dict[str, Training | Inference] = {
        name: classification(model, batches, aux_weight, amp)
        if mode == "train"
        else Inference(model, batches, amp)
        for name, model in models.items()
    }
    samples = interleave(cases, rounds, device, "dense", advance, whole)
    rows = []
    for name, case in cases.items():
        speed = Speed.of(samples[name], samples["dense"], size)
        k = mean_k(case.model, batches, amp)
        experts = {layer: len(module.live) for layer, module in moe_layers(case.model).items()}
        own = flops(costs[name], experts, k)
        ideal = None if dense is None or own is None else dense / own
        rows.append(
            StepRow(
                case=name,
                mode=mode,
                k=float(name.removeprefix("dynmoe ")) if name.startswith("dynmoe ") else None,
                real_k=fmean(k.values()) if k else None,
                samples_per_s=speed.per_s,
                samples_per_s_quartiles=speed.per_s_quartiles,
                median_ms=speed.median_ms,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                ideal=ideal,
                of_ideal=None if ideal is None else speed.ratio / ideal,
                parameters=sum(p.numel() for p in case.model.parameters()),
                activated=activated(costs[name], experts, k),
                peak_bytes=case.peak_bytes(largest(batches))
                if isinstance(case, Training)
                else None,
                rounds=len(samples[name]),
                slow=len(samples[name]) < rounds,
                contaminated=speed.contaminated,
                tokens_per_s=None if tokens is None else 1e3 * tokens / speed.median_ms,
            )
        )
    return rows


@torch.no_grad()
def mean_k(model: nn.Module, batches: Sequence[LabelledBatch], amp: bool) -> dict[str, float]:
    """Experts per token of each MoE layer, over all batches."""
    with (
        record_routing(model) as tape,
        torch.autocast(batches[0].label.device.type, torch.bfloat16, enabled=amp),
    ):
        for batch in batches:
            model(*batch.inputs)
    pairs = {n: sum(int(c.stats.load_E.sum()) for c in calls) for n, calls in tape.items()}
    tokens = {n: sum(int(c.stats.k_hist.sum()) for c in calls) for n, calls in tape.items()}
    return {name: pairs[name] / tokens[name] for name in pairs}


# Training steps and inference of trained models, on batches of their own data.


@dataclass(frozen=True)
class Trained:
    """The model of a finished run, and what its training step consists of."""

    run: str
    setting: str
    environment: str
    model: nn.Module
    loss: Callable[[Any], Tensor]
    optimizer: Optimizer


def measure_trained(
    mode: Mode,
    problem: str,
    models: Sequence[Trained],
    batches: Sequence[LabelledBatch],
    amp: bool,
    rounds: int,
    advance: Callable[[int, int], None],
) -> list[TrainedRow]:
    """A row for each of the ``models``, the first of which is the reference.

    ``inference`` changes the models for good, so measure ``train`` before it.
    """
    device, whole = batches[0].label.device, calls_of_sample(batches)
    sizes = [len(batch.label) for batch in batches]
    cases: dict[str, Training | Inference] = {
        each.setting: Training(each.model, each.loss, each.optimizer, batches, amp)
        if mode == "train"
        else Inference(each.model, batches, amp)
        for each in models
    }
    reference = models[0].setting
    samples = interleave(cases, rounds, device, reference, advance, whole)
    rows = []
    for each in models:
        case, own = cases[each.setting], samples[each.setting]
        speed = Speed.of(own, samples[reference], fmean(sizes))
        k = mean_k(each.model, batches, amp)
        rows.append(
            TrainedRow(
                run=each.run,
                problem=problem,
                setting=each.setting,
                environment=each.environment,
                mode=mode,
                batch=max(sizes),
                median_ms=speed.median_ms,
                quartiles_ms=speed.quartiles_ms,
                samples_per_s=speed.per_s,
                samples_per_s_quartiles=speed.per_s_quartiles,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                mean_k=fmean(k.values()) if k else None,
                peak_bytes=case.peak_bytes(largest(batches))
                if isinstance(case, Training)
                else None,
                rounds=len(own),
                contaminated=speed.contaminated,
            )
        )
    return rows
