"""Fine-tuning with transformers and Lightning alone: what dynmoe-run is measured against.

Run by path it is the script that one writes first; it imports nothing of dynmoe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)


class PlainFineTuning(L.LightningModule):
    """Fine-tuning as one first writes it with transformers and Lightning: the model's own loss,
    AdamW and linear decay."""

    def __init__(self, model: Any, lr: float, weight_decay: float, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        self.settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, **self.settings)
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, self.steps)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def main(folder: Path) -> None:
    """Train on the texts, the tokenizer and the model in ``folder``, as ``starts`` puts them."""
    plan = json.loads((folder / "plan.json").read_text())
    L.seed_everything(plan["seed"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    encoded = tokenizer(*plan["texts"], truncation=True, max_length=plan["max_length"])
    rows = [
        {"label": label, **{key: values[i] for key, values in encoded.items()}}
        for i, label in enumerate(plan["labels"])
    ]
    collate = DataCollatorWithPadding(tokenizer)
    loader: Any = DataLoader(rows, plan["batch"], shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    task = PlainFineTuning(model, plan["lr"], plan["weight_decay"], plan["steps"])
    L.Trainer(max_steps=plan["steps"], precision=plan["precision"], accelerator="cpu").fit(
        task, loader
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
