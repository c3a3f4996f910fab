"""Training steps and inference of trained models, on batches of their own data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dynmoe.benchmark.rows import TrainedRow
from dynmoe.benchmark.steps import Inference, Mode, Training, mean_k
from dynmoe.benchmark.timing import Speed, interleave
from dynmoe.benchmark.workload import LabelledBatch, calls_of_sample, largest


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
