"""What the models of a benchmark work on: images, texts, conversations, and what a sample costs.

Shape suffixes: B samples, N tokens, C channels, H and W pixels.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynmoe.benchmark.candidates import unwrapped
from dynmoe.benchmark.results import DataRow, Facts
from dynmoe.data.base import TaskData
from dynmoe.data.images.batches import ImageBatch
from dynmoe.data.images.module import DomainData
from dynmoe.data.vl.batches import ConversationBatch
from dynmoe.metrics.efficiency import Costs, count
from dynmoe.training.build import build_data

BATCHES = 8
"""They differ, and with them the loads of the experts, as in training."""
CLASSES, CHANNELS = 10, 3
ENDLESS = 10**9
"""Steps of a run that is never evaluated: a loader stops at each evaluation."""


class LabelledBatch(Protocol):
    """A ``ImageBatch`` of images, a ``TextBatch`` or a ``ConversationBatch``."""

    @property
    def inputs(self) -> tuple[Any, ...]: ...
    @property
    def label(self) -> Tensor: ...


B = TypeVar("B", bound=LabelledBatch)


class Workload(NamedTuple):
    """The same for all models of a run."""

    batches: Sequence[LabelledBatch]
    backbone_arguments: dict[str, Any]
    """What a backbone has to know of the data."""
    facts: Facts


def images(cfg: DictConfig, size: int, device: torch.device) -> Workload:
    """Noise: the time of a step depends on loads, not on what is learned."""
    px = cfg.backbone.image_size
    batches = random_batches(size, CHANNELS, px, CLASSES, device)
    arguments = {"num_classes": CLASSES, "in_chans": CHANNELS}
    return Workload(batches, arguments, {"px": px, "batch": size})


def of_data(cfg: DictConfig, data: TaskData, device: torch.device) -> Workload:
    """Training batches of the configured texts or conversations.

    Raises:
        UserError: data that cannot be read.
    """
    batches = training_batches(data, device)
    facts = {
        "data": data.name,
        "max_length": cfg.data.max_length,
        "batch": cfg.data.batch_size,
        **token_facts(batches),
    }
    return Workload(batches, data.backbone_arguments, facts)


def random_batches(
    size: int, channels: int, px: int, classes: int, device: torch.device
) -> list[ImageBatch]:
    torch.manual_seed(1)
    none = torch.zeros(size, dtype=torch.long, device=device)
    return [
        ImageBatch(
            torch.randn(size, channels, px, px).to(device),
            torch.randint(classes, (size,)).to(device),
            env=none,
            split=none,
        )
        for _ in range(BATCHES)
    ]


def data_of(cfg: DictConfig) -> TaskData:
    """The data module of ``cfg``, which reads in this process and is never evaluated on.

    Raises:
        UserError: data that cannot be built.
    """
    if "workers" in cfg.data:
        cfg.data.workers = 0
    return endless_data(cfg)


def endless_data(cfg: DictConfig) -> TaskData:
    """The data module of ``cfg``, whose training batches go on without an evaluation.

    Raises:
        UserError: data that cannot be built.
    """
    with unwrapped():
        return build_data(cfg, steps=ENDLESS, eval_every=ENDLESS, accumulate=1)


def training_batches(data: TaskData, device: torch.device) -> list[Any]:
    """The first batches that are trained on.

    Raises:
        UserError: data that cannot be read.
    """
    data.setup()
    data.repeat_evaluation_of(0)  # go on after step 0, behind which there is an evaluation
    batches = islice(data.train_dataloader(), BATCHES)
    return [move_data_to_device(batch, device) for batch in batches]


def calls_of_sample(batches: Sequence[LabelledBatch]) -> int:
    """How many calls one sample of a time has to consist of, so that all cases do the same work.

    One where all batches have one shape; else a pass over all of them.
    """
    shapes = {tuple(x.shape for x in tree_leaves(batch.inputs)) for batch in batches}
    return 1 if len(shapes) == 1 else len(batches)


def largest(batches: Sequence[B]) -> B:
    """The first of those with most positions: its step needs most memory."""
    return max(batches, key=lambda batch: sum(x.numel() for x in tree_leaves(batch.inputs)))


def token_facts(batches: Sequence[LabelledBatch]) -> Facts:
    """Means over the batches; ``tokens`` are real ones, patches included. Empty for plain images.

    Of conversations also their ``images``, and ``scored``, the tokens that a loss is taken of.
    """
    tokens = tokens_of(batches)
    if tokens is None:
        return {}
    facts: Facts = {"tokens": round(tokens), "padded": round(padded_share(batches), 3)}
    conversations = [batch for batch in batches if isinstance(batch, ConversationBatch)]
    if conversations:
        facts["images"] = round(fmean(len(each.tokens["images"]) for each in conversations), 1)
        facts["scored"] = round(fmean(len(each.scored[0]) for each in conversations))
    return facts


def tokens_of(batches: Sequence[LabelledBatch]) -> float | None:
    """Real tokens of a batch, the mean; None for images."""
    if isinstance(batches[0], ImageBatch):
        return None
    return fmean(int(batch.inputs[0]["attention_mask"].sum()) for batch in batches)


def padded_share(batches: Sequence[LabelledBatch]) -> float:
    """Of the positions that are computed."""
    masks = [batch.inputs[0]["attention_mask"] for batch in batches]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def costs_of_sample(model: nn.Module, batches: Sequence[LabelledBatch]) -> Costs:
    """``efficiency.count`` of a sample, the mean over the ``batches``.

    MoE layers compute real tokens alone, all else computes the padding too.
    """
    tokens = tokens_of(batches)
    if tokens is None:
        return count(model, *tree_map(lambda x: x[:1], batches[0].inputs))
    each = [count(model, *_without_mask(batch.inputs)) for batch in batches]
    if any(costs["flops"] is None for costs in each):
        return {**each[0], "flops": None}
    size = fmean(len(batch.label) for batch in batches)
    flops = each[0]["flops"]
    return {
        **each[0],
        "flops": {
            "other": fmean(costs["flops"]["other"] for costs in each) / size,
            "layers": {
                name: {**of_layer, "tokens": tokens / size}
                for name, of_layer in flops["layers"].items()
            },
        },
    }


def _without_mask(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a model does without one depends on shapes alone."""
    tokens, *others = inputs
    return {k: v for k, v in tokens.items() if k != "attention_mask"}, *others


def model_name(backbone: DictConfig) -> str:
    """A folder's name, a name of timm or of the hub, or an architecture."""
    path = backbone.get("path")
    return Path(path).name if path else backbone.model or backbone.architecture


# How fast the training loader of a data module gives images, with nobody waiting for a model.

WARM_UP = 3
"""Batches: workers start, transforms are set up."""


def measure_loader(data: DomainData, seconds: float) -> DataRow:
    """Iterate the training loader for so many ``seconds`` after a warm-up.

    ``data`` is ``endless_data`` that has been set up.
    """
    data.repeat_evaluation_of(0)  # go on after step 0, behind which there is an evaluation
    batches: Iterator[ImageBatch] = iter(data.train_dataloader())
    for _ in range(WARM_UP):
        next(batches)
    images, cpu, start = 0, _cpu_seconds(), time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        images += len(next(batches).label)
    used = _cpu_seconds()
    return DataRow(
        workers=data.num_workers,
        images=images,
        seconds=passed,
        images_per_s=images / passed,
        ms_per_image=1e3 * passed / images,
        cpu_ms_per_image=None if cpu is None or used is None else 1e3 * (used - cpu) / images,
    )


def _cpu_seconds() -> float | None:
    """CPU time of this process and, by /proc/<pid>/stat, its living children, the workers.

    resource.getrusage counts children only after they ended, and then their warm-up too.
    """
    total = time.process_time()
    for child in multiprocessing.active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        if not stat.exists():
            return None
        # utime and stime are fields 14 and 15 (proc_pid_stat(5)); field 2 may contain spaces.
        fields = stat.read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
