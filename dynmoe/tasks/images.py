"""Image classification on several domains at once, measured on each domain separately."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynmoe.data.images.batches import IN, OUT, ImageBatch
from dynmoe.layers.moe import Routed
from dynmoe.tasks.base import MoETask, Scores

SPLITS = {IN: "in", OUT: "out"}


class DomainGeneralization(MoETask):
    """Cross-entropy on the concatenated batches of all training domains (DomainBed's ERM).

    Evaluation measures plain accuracy and mean cross-entropy on the two splits ``<env>/in`` and
    ``<env>/out`` of every environment, and the routing of each environment.
    """

    modality: ClassVar[str] = "image"

    def __init__(self, **task: Any) -> None:
        super().__init__(**task)
        self.sets = [f"{env}/{split}" for env in self.env_names for split in SPLITS.values()]
        # Not a buffer, as the losses.
        self._counts = torch.zeros(0, 2, dtype=torch.long)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.image)
        return self.total_loss(F.cross_entropy(logits, batch.label), tape)

    def probe_step(self, batch: ImageBatch) -> tuple[Tensor, dict[str, list[Routed]]]:
        logits, tape = self.routed_forward(batch.image)
        return F.cross_entropy(logits.float(), batch.label, reduction="none"), tape

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._counts = torch.zeros(len(self.sets), 2, dtype=torch.long, device=self.device)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """A batch comes from one split of one environment."""
        logits, tape = self.routed_forward(batch.image)
        env = self.source_of(batch)
        name = f"{env}/{SPLITS[int(batch.split[0])]}"
        correct = (logits.argmax(1) == batch.label).sum()
        counts = torch.stack([correct, torch.full_like(correct, len(logits))])
        self._counts[self.sets.index(name)] += counts
        self.count_losses(name, F.cross_entropy(logits.float(), batch.label, reduction="none"))
        self.routing.update(env, tape, batch.label)

    def source_of(self, batch: ImageBatch) -> str:
        return self.env_names[int(batch.env[0])]

    def measures(self) -> Scores:
        counts = self.sum_over_ranks(self._counts).tolist()
        return {
            name: {"accuracy": correct / total}
            for name, (correct, total) in zip(self.sets, counts, strict=True)
            if total
        }

    def result(self) -> dict[str, Any]:
        """The scores, and their accuracies again under DomainBed's names (``env0_in_acc``)."""
        scores = self.scores()
        names = {
            f"env{index}_{split}_acc": f"{env}/{split}"
            for index, env in enumerate(self.env_names)
            for split in SPLITS.values()
        }
        accuracies = {
            key: scores.get(name, {}).get("accuracy", math.nan) for key, name in names.items()
        }
        return {"scores": scores, **accuracies}
