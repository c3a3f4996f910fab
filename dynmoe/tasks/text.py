"""Classification of texts, and regression on them, measured as GLUE defines it for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy

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
        self.metrics: Any = nn.ModuleDict(
            {
                _key(each): MetricCollection(
                    {name: _metric(name, num_classes) for name in metrics}, compute_groups=False
                )
                for each in self.sets
            }
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
        for each in self.metrics.values():
            each.reset()

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        logits, tape = self.routed_forward(batch.tokens)
        self.metrics[_key(batch.source)].update(self.predicted(logits), batch.label)
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
        """Metrics sum over ranks themselves."""
        samples_S = self.sum_over_ranks(self._losses)[:, 1].tolist()
        found = {}
        for name in (name for name, n in zip(self.sets, samples_S, strict=True) if n):
            computed = self.metrics[_key(name)].compute()
            values = {measure: value.item() for measure, value in computed.items()}
            found[name] = {**values, "score": sum(values.values()) / len(values)}
        return found


def _key(name: str) -> str:
    """The module name of a set's metrics: `type` or `update` alone are taken."""
    return f"set {name}"


def _metric(name: str, num_classes: int) -> Metric:
    made: dict[str, Any] = {
        "accuracy": lambda: MulticlassAccuracy(max(2, num_classes), average="micro"),
        "f1": BinaryF1Score,
        "matthews": BinaryMatthewsCorrCoef,
        "pearson": PearsonCorrCoef,
        "spearman": SpearmanCorrCoef,
    }
    metric: Metric = made[name]()
    return metric
