"""Classification of texts, and regression on them, measured as GLUE defines it for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dynmoe.data.text.batches import TextBatch
from dynmoe.layers.moe import Routed
from dynmoe.tasks.base import MoETask, Scores


class Head(NamedTuple):
    """The columns of the logits that belong to one task."""

    first: int
    classes: int
    """0: a regression, of one column."""
    metrics: Sequence[str]

    def of(self, logits_BC: Tensor) -> Tensor:
        return logits_BC[:, self.first : self.first + max(1, self.classes)]


class TextClassification(MoETask):
    """Cross-entropy over classes; with ``num_classes=0`` the squared error of one output.

    Every set of ``env_names``, and ``heldout`` where there is one, is measured by ``metrics``,
    whose mean is its ``score`` (GLUE, arXiv 1804.07461, sec. 4), and by the mean loss.

    Several tasks: ``heads``, (first column, classes, metrics) of each, and ``head_of``, the head of
    each set that is evaluated. Then the sets are those of ``head_of``, ``metrics`` is not used, and
    ``num_classes`` counts the classes of all heads for the records of routing, 0 without.
    """

    modality: ClassVar[str] = "text"

    def __init__(
        self,
        metrics: Sequence[str],
        num_classes: int,
        heldout: bool = False,
        heads: Sequence[tuple[int, int, Sequence[str]]] = (),
        head_of: Mapping[str, int] | None = None,
        **task: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **task)
        self.num_classes = num_classes
        self.sets = list(head_of) if head_of else self.sets + ["heldout"] * heldout
        self.heads = [Head(*each) for each in heads] or [Head(0, num_classes, tuple(metrics))]
        self.head_of = dict(head_of or dict.fromkeys(self.sets, 0))
        # Not buffers, as the losses.
        most = max(head.classes for head in self.heads)
        self._confusion = torch.zeros(0, most, most, dtype=torch.long)
        self._pairs: Any = nn.ModuleDict(
            {_key(each): Correlations() for each in self.sets if not self._head(each).classes}
        )

    def _head(self, name: str) -> Head:
        """The head of an evaluated set."""
        return self.heads[self.head_of[name]]

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.tokens)
        if batch.head is None:
            found = self.loss(logits, batch.label)
        else:
            found = self.sample_losses(logits, batch).mean()
        return self.total_loss(batch.weight * found, tape)

    def probe_step(self, batch: TextBatch) -> tuple[Tensor, dict[str, list[Routed]]]:
        logits, tape = self.routed_forward(batch.tokens)
        return self.sample_losses(logits.float(), batch), tape

    def sample_losses(self, logits: Tensor, batch: TextBatch) -> Tensor:
        """Losses [B], each of its own head."""
        if batch.head is None:
            return self.loss(logits, batch.label, "none")
        found = logits.new_zeros(len(logits), dtype=torch.float32)
        for index, head in enumerate(self.heads):
            rows = (batch.head == index).nonzero().squeeze(1)
            of_head = self.loss(logits[rows], batch.label[rows], "none", head)
            found = found.index_put((rows,), of_head.float())
        return found

    def loss(
        self, logits: Tensor, label: Tensor, reduction: str = "mean", head: Head | None = None
    ) -> Tensor:
        head = head or self.heads[0]
        own = head.of(logits)
        if head.classes == 0:
            return F.mse_loss(own.squeeze(1), label.to(own.dtype), reduction=reduction)
        return F.cross_entropy(own, label.long(), reduction=reduction)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        most = self._confusion.shape[1]
        self._confusion = self._confusion.new_zeros(len(self.sets), most, most, device=self.device)
        for each in self._pairs.values():
            each.reset()

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        logits, tape = self.routed_forward(batch.tokens)
        head = self._head(batch.source)
        if head.classes:
            most = self._confusion.shape[1]
            cells = batch.label.long() * most + head.of(logits).argmax(1)
            counts = self._confusion[self.sets.index(batch.source)].view(-1)
            counts += torch.bincount(cells, minlength=len(counts))
        else:
            found = head.of(logits).squeeze(1)
            self._pairs[_key(batch.source)].update(batch.row, found, batch.label)
        losses = self.loss(logits.float(), batch.label, reduction="none", head=head)
        self.count_losses(batch.source, losses)
        if batch.source in self.env_names:
            label = batch.label.long() + head.first if self.num_classes else None
            self.routing.update(batch.source, tape, label)

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
            head = self._head(name)
            if head.classes:
                own_LP = counts_LP[: head.classes, : head.classes]
                values = {metric: CLASSIFICATION[metric](own_LP) for metric in head.metrics}
            else:
                values = dict(zip(head.metrics, self._pairs[_key(name)].compute(), strict=True))
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
