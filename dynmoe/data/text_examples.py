"""From the names of examples to a padded batch: what a loader of texts fetches and collates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dynmoe.data.text_batches import Key, TextBatch
from dynmoe.data.text_sets import LabelArray, TextSet
from dynmoe.data.tokens import Encoded, Row


class Fetched(NamedTuple):
    """Examples of one set, not yet padded."""

    source: str
    rows: list[int]
    texts: list[Row]
    label: LabelArray
    weight: float


class Examples(Dataset[Fetched]):
    """All sets behind one index. A batch is fetched at once, from the set of its first example."""

    def __init__(self, sets: Mapping[str, TextSet], encoded: Mapping[str, Encoded]) -> None:
        self.sets = sets
        self.encoded = encoded

    def __getitems__(self, keys: list[Key]) -> Fetched:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        texts, label = self.encoded[source].rows(rows), self.sets[source].label[rows]
        return Fetched(source, rows, texts, label, weight)


class Collate:
    """Pads the texts of a batch to the longest of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, fetched: Fetched) -> TextBatch:
        return TextBatch(
            tokens=dict(self.pad(fetched.texts)),
            label=torch.as_tensor(fetched.label),
            source=fetched.source,
            row=torch.as_tensor(fetched.rows),
            weight=fetched.weight,
        )
