"""Image classification on several domains at once, measured on each domain apart (DomainBed)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dynmoe.data.images.batches import IN, OUT, ImageBatch
from dynmoe.metrics.routing import TRAIN
from dynmoe.tasks.base import MoETask


class DomainGeneralization(MoETask):
    """Cross-entropy on the concatenated batches of all training domains (DomainBed's ERM).

    Evaluation counts plain accuracy on the in and out split of every environment, and the routing
    of each environment.
    """

    modality: ClassVar[str] = "image"

    def __init__(self, num_envs: int, test_envs: Sequence[int], **task: Any) -> None:
        super().__init__(**task)
        self.num_envs = num_envs
        self.test_envs = list(test_envs)
        # Not a buffer: DDP would overwrite it with rank 0's at every forward.
        self._counts = torch.zeros(num_envs, 2, 2, dtype=torch.long)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.image)
        return self.total_loss(F.cross_entropy(logits, batch.label), tape)

    def on_validation_epoch_start(self) -> None:
        self._counts = torch.zeros(self.num_envs, 2, 2, dtype=torch.long, device=self.device)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """A batch comes from one split of one environment."""
        logits, tape = self.routed_forward(batch.image)
        env, split = int(batch.env[0]), int(batch.split[0])
        correct = (logits.argmax(1) == batch.label).sum()
        self._counts[env, split] += torch.stack([correct, torch.full_like(correct, len(logits))])
        self.routing.update(f"env{env}", tape, batch.label)

    def on_validation_epoch_end(self) -> None:
        self._counts = self._sum_over_ranks(self._counts)
        scores = self.scores()
        outs = [scores[f"env{i}_out_acc"] for i in self.train_envs]
        scores["train_out_acc"] = sum(outs) / len(outs)
        # Already summed over ranks, so every rank has the same numbers.
        self.log_dict({f"val/{k}": v for k, v in scores.items()}, rank_zero_only=True)

    @property
    def train_envs(self) -> list[int]:
        return [i for i in range(self.num_envs) if i not in self.test_envs]

    def scores(self) -> dict[str, float]:
        """``env{i}_in_acc`` and ``env{i}_out_acc``, DomainBed's names."""
        counts = self._counts.tolist()
        return {
            f"env{i}_{name}_acc": counts[i][split][0] / max(1, counts[i][split][1])
            for i in range(self.num_envs)
            for name, split in (("in", IN), ("out", OUT))
        }

    def routing_records(self) -> list[dict[str, Any]]:
        sources = [TRAIN, *(f"env{i}" for i in range(self.num_envs))]
        return self.routing.records(sources, self._sum_over_ranks)

    def _sum_over_ranks(self, counts: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(counts, reduce_op="sum")
