"""Fine-tuning as one writes it first with transformers and Lightning, to be compared with."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from dynmoe.data.text.tokens import Encoded


class PlainFineTuning(L.LightningModule):
    """A sequence classifier of transformers with its own loss, AdamW and linear decay."""

    def __init__(self, model: Any, lr: float, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.model = model
        self.lr = lr
        self.weight_decay = weight_decay
        self.steps = steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            (p for p in self.parameters() if p.requires_grad),
            lr=self.lr,
            weight_decay=self.weight_decay,
            fused=True,
        )
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class LabelledTexts(Dataset[dict[str, Any]]):
    """Tokens and label of each example; a batch is fetched at once."""

    def __init__(self, encoded: Encoded, labels: np.ndarray) -> None:
        self.encoded = encoded
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        texts = self.encoded.rows(indices)
        labels = self.labels[indices].tolist()
        return [{**text, "label": label} for text, label in zip(texts, labels, strict=True)]


def plain_loader(
    texts: LabelledTexts, tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> DataLoader[Any]:
    """Shuffled, the same way each time it is made."""
    return DataLoader(
        texts,
        batch_size,
        shuffle=True,
        collate_fn=DataCollatorWithPadding(tokenizer),
        generator=torch.Generator().manual_seed(seed),
    )
