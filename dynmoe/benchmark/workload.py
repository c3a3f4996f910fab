"""What the models of a benchmark work on: batches of images or texts, and what a sample costs.

Shape suffixes: B samples, N tokens, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from lightning.fabric.utilities import move_data_to_device
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from dynmoe.benchmark.configured import built
from dynmoe.benchmark.results import Facts
from dynmoe.data.sampling import Batch
from dynmoe.data.task_data import TaskData
from dynmoe.data.text_batches import TextBatch
from dynmoe.metrics.efficiency import Costs, count

BATCHES = 8
"""They differ, and with them the loads of the experts, as in training."""
CLASSES, CHANNELS = 10, 3
ENDLESS = 10**9
"""Steps of a run that is never evaluated: a loader stops at each evaluation."""


class LabelledBatch(Protocol):
    """A ``TextBatch``, or a ``Batch`` of images."""

    @property
    def inputs(self) -> tuple[Any, ...]: ...
    @property
    def label(self) -> Tensor: ...


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


def texts(cfg: DictConfig, size: int | None, device: torch.device) -> Workload:
    """Training batches of the configured data, of ``size`` texts if that is given.

    Raises:
        UserError: data that cannot be read.
    """
    if size is not None:
        cfg.data.batch_size = size
    data, batches = training_batches(cfg.data, device)
    facts = {
        "data": data.name,
        "max_length": cfg.data.max_length,
        "batch": cfg.data.batch_size,
        "tokens": round(tokens_of(batches) or 0),
        "padded": round(padded_share(batches), 3),
    }
    return Workload(batches, data.backbone_arguments, facts)


def random_batches(
    size: int, channels: int, px: int, classes: int, device: torch.device
) -> list[Batch]:
    torch.manual_seed(1)
    none = torch.zeros(size, dtype=torch.long, device=device)
    return [
        Batch(
            torch.randn(size, channels, px, px).to(device),
            torch.randint(classes, (size,)).to(device),
            env=none,
            split=none,
        )
        for _ in range(BATCHES)
    ]


def training_batches(node: DictConfig, device: torch.device) -> tuple[TaskData, list[Any]]:
    """The data module of ``node``, set up, and the first batches it trains on.

    Raises:
        UserError: data that cannot be read.
    """
    node.update(steps=ENDLESS, eval_every=ENDLESS, accumulate=1)
    if "workers" in node:
        node.workers = 0
    data: TaskData = built(node)
    data.setup()
    data.repeat_evaluation_of(0)  # go on after step 0, behind which there is an evaluation
    batches = islice(data.train_dataloader(), BATCHES)
    return data, [move_data_to_device(batch, device) for batch in batches]


def calls_of_sample(batches: Sequence[LabelledBatch]) -> int:
    """How many calls one sample of a time has to consist of, so that all cases do the same work.

    One where all batches have one shape; else a pass over all of them.
    """
    shapes = {tuple(x.shape for x in tree_leaves(batch.inputs)) for batch in batches}
    return 1 if len(shapes) == 1 else len(batches)


def largest(batches: Sequence[LabelledBatch]) -> LabelledBatch:
    """The first of those with most positions: its step needs most memory."""
    return max(batches, key=lambda batch: sum(x.numel() for x in tree_leaves(batch.inputs)))


def tokens_of(batches: Sequence[LabelledBatch]) -> float | None:
    """Real tokens of a batch, the mean; None for images."""
    counts = [int(b.tokens["attention_mask"].sum()) for b in batches if isinstance(b, TextBatch)]
    return sum(counts) / len(counts) if counts else None


def padded_share(batches: Sequence[TextBatch]) -> float:
    """Of the positions that are computed."""
    masks = [batch.tokens["attention_mask"] for batch in batches]
    return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def costs_of_sample(model: nn.Module, batches: Sequence[LabelledBatch]) -> Costs:
    """``efficiency.count`` of a sample, the mean over the ``batches``.

    MoE layers compute real tokens alone, all else computes the padding too.
    """
    if not isinstance(batches[0], TextBatch):
        return count(model, *tree_map(lambda x: x[:1], batches[0].inputs))
    lengths = [batch.inputs[0]["input_ids"].shape[1] for batch in batches]
    # Without a mask nothing depends on data.
    by_length = {
        n: count(model, {"input_ids": torch.zeros(1, n, dtype=torch.long)}) for n in set(lengths)
    }
    costs = by_length[lengths[0]]
    if any(each["flops"] is None for each in by_length.values()):
        return {**costs, "flops": None}
    sizes = [len(batch.label) for batch in batches]
    outside = sum(
        size * by_length[n]["flops"]["other"] for size, n in zip(sizes, lengths, strict=True)
    )
    real = (tokens_of(batches) or 0) * len(batches) / sum(sizes)
    layers = {name: {**each, "tokens": real} for name, each in costs["flops"]["layers"].items()}
    return {**costs, "flops": {"other": outside / sum(sizes), "layers": layers}}


def model_name(backbone: DictConfig) -> str:
    """A folder's name, a name of timm or of the hub, or an architecture."""
    path = backbone.get("path")
    return Path(path).name if path else backbone.model or backbone.architecture
