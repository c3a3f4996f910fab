"""Which texts make the batch of a step: about equally long ones, by pure functions of (seed, step).

Nothing here has a state to save: a run that was killed continues with the very batches it would
have had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dynmoe.data.protocol import IntArray
from dynmoe.data.text.sets import LabelArray, TextSet
from dynmoe.data.text.tokens import EncodedTexts, TokenRow
from dynmoe.seeding import seed_hash

BUCKET = 50
"""Batches that are drawn together and sorted by length before they are cut."""


class Key(NamedTuple):
    """Names one example: the set it is from, and its row there."""

    source: str
    row: int
    weight: float = 1.0
    """Of the loss of its micro-batch, such that the mean over the parts of a step's batch is that
    of its examples, also where the parts are not equally large."""


class TextBatch(NamedTuple):
    """Examples of one set, padded to the longest of them."""

    tokens: dict[str, Tensor]
    """input_ids and attention_mask [B, N] int64, for some models token_type_ids."""
    label: Tensor
    """[B], int64; float32 for regression."""
    source: str
    row: Tensor
    """[B] int64, rows of the set."""
    weight: float = 1.0
    """See `Key`."""

    @property
    def inputs(self) -> tuple[dict[str, Tensor]]:
        """What the backbone is called with."""
        return (self.tokens,)


@dataclass(frozen=True, eq=False)
class TrainBatches(Sampler[list[Key]]):
    """Micro-batches of the steps from `next_step()` up to the next evaluation.

    An epoch sees every example once, in `steps_per_epoch` batches, the last of which may be
    smaller. Examples are drawn in buckets of `BUCKET` batches, sorted by length within, so that
    little is padded. Micro-batch m of rank r takes examples m * world_size + r, + parts, + 2 parts
    ... of a step's batch: all get texts of all its lengths. None goes empty: of a last batch with
    fewer examples than parts some come again, with weight 0. It has no length, for the stretch
    between evaluations varies.

    With `groups` a batch is of one group, but for what is left of each: these examples share the
    fewest batches they fill (LLaVA's "group by modality length").
    """

    lengths: IntArray
    """Tokens of each example of the training set."""
    batch_size: int
    seed: int
    steps: int
    eval_every: int
    next_step: Callable[[], int]
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    counts: IntArray | None = None
    """What each example counts in the mean loss, such as its answer tokens; above 0. None: 1."""
    groups: IntArray | None = None
    """The kind of each example, such as with and without an image. None: all alike."""

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.next_step()
        last = next_eval_step(first, self.steps, self.eval_every)
        parts = self.accumulate * self.world_size
        epoch_of = lru_cache(maxsize=1)(self.epoch)
        for step in range(first, last + 1):
            epoch, place = divmod(step, steps_per_epoch(len(self.lengths), self.batch_size))
            batch = epoch_of(epoch)[place]
            size, total = len(batch), self._count(batch)
            batch = np.resize(batch, max(size, parts))
            for micro in range(self.accumulate):
                part = micro * self.world_size + self.rank
                own = batch[part::parts]
                weight = self._count(own) * parts / total if part < size else 0.0
                yield [Key("train", row, weight) for row in own.tolist()]

    def epoch(self, epoch: int) -> list[IntArray]:
        """The batches of one epoch, as rows of the training set."""
        rng = np.random.default_rng(seed_hash(self.seed, "epoch", epoch))
        order = rng.permutation(len(self.lengths))
        size = BUCKET * self.batch_size
        batches = []
        for rows in self._apart(order):
            for start in range(0, len(rows), size):
                bucket = rows[start : start + size]
                bucket = bucket[np.argsort(self.lengths[bucket], kind="stable")]
                batches += np.split(bucket, range(self.batch_size, len(bucket), self.batch_size))
        return [batches[place] for place in rng.permutation(len(batches))]

    def _apart(self, rows: IntArray) -> list[IntArray]:
        """Whole batches of each group, then what is left of all: as many batches as ungrouped."""
        if self.groups is None:
            return [rows]
        group = self.groups[rows]
        members = [rows[group == each] for each in np.unique(group)]
        cuts = [len(each) - len(each) % self.batch_size for each in members]
        whole = [each[:cut] for each, cut in zip(members, cuts, strict=True)]
        rest = [each[cut:] for each, cut in zip(members, cuts, strict=True)]
        return [*whole, np.concatenate(rest)]

    def _count(self, rows: IntArray) -> int:
        return len(rows) if self.counts is None else int(self.counts[rows].sum())


@dataclass(frozen=True, eq=False)
class EvalBatches(Sampler[list[Key]]):
    """Every example of every set once, long ones first, sets never mixed in a batch.

    Rank r takes every world_size-th example of each set. Where each has one, all have as many
    batches, the last of them with one example more on some: sharded models need every rank.
    """

    lengths: dict[str, IntArray]
    """Of each set the tokens of its examples."""
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[Key]]:
        yield from self._batches()

    def _batches(self) -> list[list[Key]]:
        batches = []
        for source, lengths in self.lengths.items():
            order = np.argsort(-lengths, kind="stable")[self.rank :: self.world_size].tolist()
            starts = list(range(0, len(lengths) // self.world_size, self.batch_size)) or [0]
            for start, end in pairwise([*starts, None]):
                if rows := order[start:end]:
                    batches.append([Key(source, row) for row in rows])
        return batches


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def next_eval_step(step: int, steps: int, every: int) -> int:
    """The first step, not before `step`, that an evaluation follows: every-th ones and the last."""
    return min((step // every + 1) * every, steps) - 1


# From the names of examples to a padded batch: what a loader of texts fetches and collates.


class Fetched(NamedTuple):
    """Examples of one set, not yet padded."""

    source: str
    rows: list[int]
    texts: list[TokenRow]
    label: LabelArray
    weight: float


class Examples(Dataset[Fetched]):
    """All sets behind one index. A batch is fetched at once, from the set of its first example."""

    def __init__(self, sets: Mapping[str, TextSet], encoded: Mapping[str, EncodedTexts]) -> None:
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
