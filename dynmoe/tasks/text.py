"""Classification of texts, and regression on them, measured as GLUE defines it for each task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, BinaryMatthewsCorrCoef, MulticlassAccuracy

from dynmoe.data.text.batches import TextBatch
from dynmoe.metrics.routing import TRAIN
from dynmoe.tasks.base import MoETask


class TextClassification(MoETask):
    """Cross-entropy over classes; with ``num_classes=0`` the squared error of one output.

    Every set of ``env_names``, and ``heldout`` where there is one, is measured by ``metrics``,
    whose mean is its score (GLUE, arXiv 1804.07461, sec. 4).
    """

    modality: ClassVar[str] = "text"

    def __init__(
        self,
        metrics: Sequence[str],
        env_names: Sequence[str],
        num_classes: int,
        heldout: bool = False,
        **task: Any,
    ) -> None:
        super().__init__(num_classes=num_classes, **task)
        self.env_names = list(env_names)
        self.num_classes = num_classes
        sets = [*env_names, "heldout"] if heldout else list(env_names)
        self.measures: Any = nn.ModuleDict(
            {
                _key(each): MetricCollection(
                    {name: _metric(name, num_classes) for name in metrics}, compute_groups=False
                )
                for each in sets
            }
        )
        self._scores: dict[str, float] = {}

    def training_step(self, batch: TextBatch, batch_idx: int) -> dict[str, Any]:
        logits, tape = self.routed_forward(batch.tokens)
        return self.total_loss(batch.weight * self.loss(logits, batch.label), tape)

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        if self.num_classes == 0:
            return F.mse_loss(logits.squeeze(1), label)
        return F.cross_entropy(logits, label)

    def on_validation_epoch_start(self) -> None:
        for metrics in self.measures.values():
            metrics.reset()

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """A batch comes from one set."""
        logits, tape = self.routed_forward(batch.tokens)
        self.measures[_key(batch.source)].update(self.predicted(logits), batch.label)
        if batch.source in self.env_names:
            source = f"env{self.env_names.index(batch.source)}"
            self.routing.update(source, tape, batch.label if self.num_classes else None)

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The rows of a test set and what is predicted for them."""
        return batch.row, self.predicted(self.backbone(batch.tokens))

    def predicted(self, logits: Tensor) -> Tensor:
        """Classes [B], or the predicted numbers."""
        return logits.argmax(1) if self.num_classes else logits.squeeze(1).float()

    def on_validation_epoch_end(self) -> None:
        self._scores = {}
        for key, metrics in self.measures.items():
            each = key.removeprefix(_key(""))
            values = {name: value.item() for name, value in metrics.compute().items()}
            self._scores |= {f"{each}_{name}": value for name, value in values.items()}
            self._scores[f"{each}_score"] = sum(values.values()) / len(values)
        # Metrics sum over ranks themselves, so every rank has the same numbers.
        self.log_dict({f"val/{k}": v for k, v in self._scores.items()})

    def scores(self) -> dict[str, float]:
        """``<set>_<metric>`` and ``<set>_score``, of the last evaluation."""
        return dict(self._scores)

    def routing_records(self) -> list[dict[str, Any]]:
        sources = [TRAIN, *(f"env{i}" for i in range(len(self.env_names)))]
        return self.routing.records(
            sources, lambda counts: self.trainer.strategy.reduce(counts, reduce_op="sum")
        )


def _key(name: str) -> str:
    """A set's name as that of a module: `type` or `update` alone are taken."""
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
