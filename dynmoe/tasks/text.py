"""Classification of texts, and regression on them, measured as GLUE defines it for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dynmoe.data.text.batches import TextBatch
from dynmoe.tasks.base import MoETask, Scores


class TextClassification(MoETask):
    """Cross-entropy over classes; with ``num_classes=0`` the squared error of one output.

    Every set of ``env_names``, and ``heldout`` where there is one, is measured by ``metrics``,
    whose mean is its ``score`` (GLUE, arXiv 1804.07461, sec. 4), and by the mean loss.
    """

    modality: ClassVar[str] = "text"

    def __init__(
        self,
        metrics: Sequence[str],
        num_classes: int,
        heldout: bool = False,
        **task: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **task)
        self.num_classes = num_classes
        self.sets += ["heldout"] if heldout else []
        self.metrics = list(metrics)
        # Not buffers, as the losses.
        self._confusion = torch.zeros(0, num_classes, num_classes, dtype=torch.long)
        self._pairs: Any = nn.ModuleDict(
            {_key(each): Correlations() for each in self.sets if not num_classes}
        )

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.tokens)
        return self.total_loss(batch.weight * self.loss(logits, batch.label), tape)

    def loss(self, logits: Tensor, label: Tensor, reduction: str = "mean") -> Tensor:
        if self.num_classes == 0:
            return F.mse_loss(logits.squeeze(1), label, reduction=reduction)
        return F.cross_entropy(logits, label, reduction=reduction)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._confusion = self._confusion.new_zeros(
            len(self.sets), self.num_classes, self.num_classes, device=self.device
        )
        for each in self._pairs.values():
            each.reset()

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        logits, tape = self.routed_forward(batch.tokens)
        if self.num_classes:
            cells = batch.label * self.num_classes + self.predicted(logits)
            counts = self._confusion[self.sets.index(batch.source)].view(-1)
            counts += torch.bincount(cells, minlength=len(counts))
        else:
            self._pairs[_key(batch.source)].update(batch.row, logits.squeeze(1), batch.label)
        self.count_losses(batch.source, self.loss(logits.float(), batch.label, reduction="none"))
        if batch.source in self.env_names:
            self.routing.update(batch.source, tape, batch.label if self.num_classes else None)

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The rows of a test set and what is predicted for them."""
        return batch.row, self.predicted(self.backbone(batch.tokens))

    def predicted(self, logits: Tensor) -> Tensor:
        """Classes [B], or the predicted numbers."""
        return logits.argmax(1) if self.num_classes else logits.squeeze(1).float()

    def measures(self) -> Scores:
        samples = self.sum_over_ranks(self._losses)[:, 1].tolist()
        confusion = self.sum_over_ranks(self._confusion).cpu().numpy()
        found = {}
        for name, count, counts_LP in zip(self.sets, samples, confusion, strict=True):
            if not count:
                continue
            if self.num_classes:
                values = {metric: CLASSIFICATION[metric](counts_LP) for metric in self.metrics}
            else:
                values = dict(zip(self.metrics, self._pairs[_key(name)].compute(), strict=True))
            found[name] = {**values, "score": sum(values.values()) / len(values)}
        return found


def _key(name: str) -> str:
    """The module name of a set's metrics: `type` or `update` alone are taken."""
    return f"set {name}"


# Metrics of GLUE, from counts and sums that do not depend on how a set is cut into batches. Where
# a prediction is constant they are 0, as GLUE's and scikit-learn's are.
#
# L labels, P predictions, both classes.


Counts = npt.NDArray[np.int64]


def accuracy(counts_LP: Counts) -> float:
    return float(np.trace(counts_LP) / max(1, counts_LP.sum()))


def f1(counts_LP: Counts) -> float:
    """F1 of class 1 of two; 0 where it is neither a label nor predicted."""
    (_, false_positive), (false_negative, positive) = counts_LP.tolist()
    return 2 * positive / max(1, 2 * positive + false_positive + false_negative)


def matthews(counts_LP: Counts) -> float:
    """Matthews correlation (Gorodkin 2004, which is R_K for any number of classes).

    NOTE: torchmetrics adds a small number to a denominator of 0, and so gives a constant prediction
    up to 0.03 of either sign on CoLA (its issue 3355).
    """
    labels, predictions = counts_LP.sum(1).tolist(), counts_LP.sum(0).tolist()
    total = sum(labels)
    covariance = int(np.trace(counts_LP)) * total - sum(map(int.__mul__, labels, predictions))
    spread = [total**2 - sum(n**2 for n in numbers) for numbers in (labels, predictions)]
    return covariance / (spread[0] * spread[1]) ** 0.5 if all(spread) else 0.0


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}


class Correlations(Metric):
    """Predicted and true numbers of a set over all ranks, for Pearson's and Spearman's correlation.

    They are compared in the order of the set's rows. Predictions that differ by rounding alone
    count as constant: their correlation would be that of the noise, which changes with the batch.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.rounding = 0.0

    def update(self, row: Tensor, predicted: Tensor, label: Tensor) -> None:
        """All [B]."""
        self.rounding = max(1e-5, 2 * torch.finfo(predicted.dtype).eps)
        self.rows.append(torch.stack([row.float(), predicted.float(), label.float()], 1))

    def compute(self) -> tuple[float, float]:
        """Pearson's and Spearman's correlation; 0 where one side is constant."""
        found = dim_zero_cat(self.rows).double().cpu().numpy()
        _, predicted, label = found[np.argsort(found[:, 0], kind="stable")].T
        constant = np.ptp(predicted) <= self.rounding * np.abs(predicted).max()
        if constant or np.ptp(label) == 0:
            return 0.0, 0.0
        spearman = np.corrcoef(_ranks(predicted), _ranks(label))[0, 1]
        return float(np.corrcoef(predicted, label)[0, 1]), float(spearman)


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: npt.NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks
