"""Training epochs on texts, of several loops that are measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

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

from dynmoe.benchmark.results import EpochRow
from dynmoe.benchmark.timing import Sample, Speed, interleave
from dynmoe.data.protocol import IntArray
from dynmoe.data.text.tokens import EncodedTexts


class Work(NamedTuple):
    """What an epoch consists of."""

    steps: int
    samples: int
    tokens: int
    positions: int
    """Tokens and padding."""

    @classmethod
    def of(cls, batches: Iterable[IntArray]) -> Work:
        """``batches``: the tokens of each text of each batch, which is padded to the longest."""
        sizes = [(1, len(b), int(b.sum()), len(b) * int(b.max())) for b in batches]
        return cls(*(sum(column) for column in zip(*sizes, strict=True)))


def measure_epochs(
    loops: Mapping[str, Callable[[], object]],
    work: Mapping[str, Work],
    rounds: int,
    device: torch.device,
    advance: Callable[[int, int], None],
) -> list[EpochRow]:
    """A row for each of the ``loops``, whose calls are epochs; the first is the reference.

    Speeds are compared by token: the first steps of an epoch are of other texts in each loop.
    """
    reference = next(iter(loops))
    samples = interleave(loops, rounds, device, reference, advance, warm_ups=1)
    per_token = {
        name: [Sample(each.seconds / work[name].tokens, each.contaminated) for each in found]
        for name, found in samples.items()
    }
    rows = []
    for name, own in work.items():
        speed = Speed.of(per_token[name], per_token[reference], 1)
        seconds, low, high = (
            ms / 1e3 * own.tokens for ms in (speed.median_ms, *speed.quartiles_ms)
        )
        rows.append(
            EpochRow(
                case=name,
                steps=own.steps,
                samples=own.samples,
                tokens=own.tokens,
                padded=1 - own.tokens / own.positions,
                seconds=seconds,
                seconds_quartiles=(low, high),
                samples_per_s=own.samples / seconds,
                tokens_per_s=speed.per_s,
                ratio=speed.ratio,
                ratio_quartiles=speed.ratio_quartiles,
                rounds=len(samples[name]),
                contaminated=speed.contaminated,
            )
        )
    return rows


# Fine-tuning as one writes it first with transformers and Lightning, to be compared with.


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

    def __init__(self, encoded: EncodedTexts, labels: np.ndarray) -> None:
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
