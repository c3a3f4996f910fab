"""From the names of examples to a padded batch of token ids and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from dynmoe.data.chat import IGNORE, IMAGE, IdArray
from dynmoe.data.text.batches import Key
from dynmoe.data.vl_images import ImageTransform, LoadImage
from dynmoe.data.vl_store import TokenStore
from dynmoe.questions.base import QuestionSet

Tokens = dict[str, Tensor]
"""input_ids and attention_mask [B, N] int64; image_mask [B, N] bool, the positions of the images'
patches, where ids are padding; images [I, 3, H, W] float32, in the order of their positions in the
flattened batch; I may be 0."""


class ConversationBatch(NamedTuple):
    """Conversations to learn from, padded at the right."""

    tokens: Tokens
    label: Tensor
    """[B, N] int64: the token at each position that a loss is taken of, else IGNORE."""
    source: str
    row: Tensor
    """[B] int64, rows of the store."""
    weight: float = 1.0
    """See `text_batches.Key`."""

    @property
    def scored(self) -> tuple[Tensor, Tensor]:
        """Positions [M] of the flattened batch whose next token has a loss, and these tokens."""
        next_T = F.pad(self.label[:, 1:], (0, 1), value=IGNORE).flatten()
        scored_M = (next_T != IGNORE).nonzero().squeeze(1)
        return scored_M, next_T[scored_M]

    @property
    def inputs(self) -> tuple[Tokens, Tensor]:
        """What the backbone is called with in training."""
        return self.tokens, self.scored[0]


class QuestionBatch(NamedTuple):
    """Questions to answer, padded at the left: an answer goes on behind the last position."""

    tokens: Tokens
    label: Tensor
    """[B] int64: indices of the questions' kinds among the sorted kinds of their set."""
    source: str
    row: Tensor
    """[B] int64, places in the set."""

    @property
    def inputs(self) -> tuple[Tokens]:
        """What the backbone is called with."""
        return (self.tokens,)


class Fetched(NamedTuple):
    """Examples of one set, not yet padded."""

    source: str
    rows: list[int]
    ids: list[IdArray]
    labels: list[IdArray]
    """Of conversations those of each token; of questions one array, that of their kinds."""
    images: Tensor
    weight: float


class Conversations(Dataset[Fetched]):
    """All sets of conversations behind one index; a batch is of the set of its first example."""

    def __init__(
        self,
        stores: Mapping[str, TokenStore],
        load_image: Mapping[str, LoadImage],
        transform: ImageTransform,
    ) -> None:
        self.stores = stores
        self.load_image = load_image
        self.transform = transform

    def __getitems__(self, keys: list[Key]) -> Fetched:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        store = self.stores[source]
        ids, labels = zip(*(store.row(row) for row in rows), strict=True)
        names = [name for row in rows for name in store.images(row)]
        images = _pixels(names, self.load_image[source], self.transform)
        return Fetched(source, rows, list(ids), list(labels), images, weight)


class Questions(Dataset[Fetched]):
    """All sets of questions behind one index; `prompts` are their token ids, as `sets` orders them.

    A batch is of the set of its first example.
    """

    def __init__(
        self,
        sets: Mapping[str, QuestionSet],
        prompts: Mapping[str, Sequence[IdArray]],
        transform: ImageTransform,
    ) -> None:
        self.sets = sets
        self.prompts = prompts
        self.transform = transform
        self._kinds = {name: _kinds(each) for name, each in sets.items()}

    def __getitems__(self, keys: list[Key]) -> Fetched:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        questions = self.sets[source]
        names = [name for row in rows for name in questions.questions[row].images]
        images = _pixels(names, questions.load_image, self.transform)
        ids = [self.prompts[source][row] for row in rows]
        return Fetched(source, rows, ids, [self._kinds[source][rows]], images, weight)


def collate_conversations(pad_id: int) -> Callable[[Fetched], ConversationBatch]:
    """Pads the conversations of a batch to the longest of them."""
    return partial(_conversation_batch, pad_id)


def collate_questions(pad_id: int) -> Callable[[Fetched], QuestionBatch]:
    """Pads the prompts of a batch to the longest of them."""
    return partial(_question_batch, pad_id)


def _conversation_batch(pad_id: int, fetched: Fetched) -> ConversationBatch:
    return ConversationBatch(
        tokens=_tokens(fetched, pad_id, "right"),
        label=_padded(fetched.labels, IGNORE, "right"),
        source=fetched.source,
        row=torch.tensor(fetched.rows),
        weight=fetched.weight,
    )


def _question_batch(pad_id: int, fetched: Fetched) -> QuestionBatch:
    (kinds,) = fetched.labels
    return QuestionBatch(
        tokens=_tokens(fetched, pad_id, "left"),
        label=torch.from_numpy(kinds.astype(np.int64)),
        source=fetched.source,
        row=torch.tensor(fetched.rows),
    )


def _tokens(fetched: Fetched, pad_id: int, side: str) -> Tokens:
    ids = _padded(fetched.ids, pad_id, side)
    image_mask = ids == IMAGE
    return {
        "input_ids": ids.masked_fill(image_mask, pad_id),
        "attention_mask": _padded([np.ones_like(each) for each in fetched.ids], 0, side),
        "image_mask": image_mask,
        "images": fetched.images,
    }


def _padded(rows: list[IdArray], value: int, side: str) -> Tensor:
    tensors = [torch.from_numpy(row.astype(np.int64)) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _pixels(names: Sequence[str], load_image: LoadImage, transform: ImageTransform) -> Tensor:
    images = [transform(load_image(name)) for name in names]
    return torch.stack(images) if images else torch.empty(0, 3, transform.size, transform.size)


def _kinds(questions: QuestionSet) -> IdArray:
    kinds = [question.kind for question in questions.questions]
    return np.unique(kinds, return_inverse=True)[1].astype(np.int32)
