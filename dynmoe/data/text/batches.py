"""Which texts make the batch of a step: similarly long ones, by pure functions of (seed, step).

Nothing here has a state to save: a run that was killed continues with the very batches it would
have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from dynmoe.data.mixing import Mixture, Turns
from dynmoe.data.text.sets import LabelArray, TextSet
from dynmoe.data.text.tokens import EncodedTexts, TokenRow
from dynmoe.seeding import IntArray, seed_hash

BUCKET = 50
"""Batches that are drawn together and sorted by length before they are cut."""


class Key(NamedTuple):
    """Names one example: the set it is from, and its row there."""

    source: str
    row: int
    weight: float = 1.0
    """Weight of the loss of its micro-batch: the mean over the micro-batches of a step is that over
    its examples, also where micro-batches are not equally large."""


class TextBatch(NamedTuple):
    """Examples padded to the longest of them, of one set; in training on a mixture of several."""

    tokens: dict[str, Tensor]
    """input_ids and attention_mask [B, N] int64, for some models token_type_ids."""
    label: Tensor
    """[B], int64; float32 for regression."""
    source: str
    """The set of the first example."""
    row: Tensor
    """[B] int64, rows of their sets."""
    weight: float = 1.0
    """See `Key`."""
    head: Tensor | None = None
    """[B] int64: which of several tasks each example is of."""

    @property
    def inputs(self) -> tuple[dict[str, Tensor]]:
        """The backbone's positional arguments."""
        return (self.tokens,)


@dataclass(eq=False)
class EpochDraw:
    """The batch of a step: an epoch sees every example once, the last batch may be smaller.

    Examples are drawn in buckets of `BUCKET` batches, sorted by length within, so that little is
    padded. Part p of a batch has its examples p, p + parts, p + 2 parts, ...: every part gets texts
    of all lengths.

    With `groups` a batch is of one group, but for the remainder of each: these examples share the
    fewest batches they fill (LLaVA's "group by modality length").
    """

    lengths: IntArray
    """Tokens of each example of the training set."""
    batch_size: int
    seed: int
    counts: IntArray | None = None
    """Weight of each example in the mean loss, such as its answer tokens; above 0. None: 1."""
    groups: IntArray | None = None
    """The kind of each example, such as with and without an image. None: all alike."""

    def __post_init__(self) -> None:
        self._kept_epoch = lru_cache(maxsize=1)(self.epoch)  # steps ask for one after the other

    def __call__(self, step: int, parts: int) -> list[list[Key]]:
        epoch, place = divmod(step, steps_per_epoch(len(self.lengths), self.batch_size))
        batch = self._kept_epoch(epoch)[place]
        picks = [("train", row) for row in batch.tolist()]
        return in_parts(picks, None if self.counts is None else self.counts[batch], parts)

    def epoch(self, epoch: int) -> list[IntArray]:
        """The batches of one epoch, as rows of the training set."""
        # NOTE: a function of (seed, epoch), not of the epochs before: a resumed run draws the one
        # it was in again and goes on at its place there.
        rng = np.random.default_rng(seed_hash(self.seed, "epoch", epoch))
        order = rng.permutation(len(self.lengths))
        size = BUCKET * self.batch_size
        batches = []
        for rows in self._apart(order):
            for start in range(0, len(rows), size):
                bucket = rows[start : start + size]
                # Stable: NumPy's default order of equal lengths depends on the CPU.
                bucket = bucket[np.argsort(self.lengths[bucket], kind="stable")]
                batches += np.split(bucket, range(self.batch_size, len(bucket), self.batch_size))
        # Within a bucket short batches come first: shuffle whole batches.
        return [batches[place] for place in rng.permutation(len(batches))]

    def _apart(self, rows: IntArray) -> list[IntArray]:
        """Whole batches of each group, then the rest of all: as many batches as without groups."""
        if self.groups is None:
            return [rows]
        group = self.groups[rows]
        members = [rows[group == each] for each in np.unique(group)]
        cuts = [len(each) - len(each) % self.batch_size for each in members]
        whole = [each[:cut] for each, cut in zip(members, cuts, strict=True)]
        rest = [each[cut:] for each, cut in zip(members, cuts, strict=True)]
        return [*whole, np.concatenate(rest)]


def in_parts(
    picks: Sequence[tuple[str, int]], counts: IntArray | None, parts: int
) -> list[list[Key]]:
    """The batch of a step, (set, row) of each example, as `parts` micro-batches.

    `counts`: weight of each example in the mean loss; None: 1.
    """
    size = len(picks)
    counts = np.ones(size, dtype=np.int64) if counts is None else counts
    total = int(counts.sum())
    # NOTE: no part may be empty, since every rank has to run every micro-batch. Of a last batch
    # with fewer examples than parts some come again, with weight 0.
    places = np.resize(np.arange(size), max(size, parts))
    micro_batches = []
    for part in range(parts):
        own = places[part::parts]
        # Parts differ in size, and the trainer takes their plain mean: see Key.weight.
        weight = int(counts[own].sum()) * parts / total if part < size else 0.0
        examples = (picks[place] for place in own.tolist())
        micro_batches.append([Key(source, row, weight) for source, row in examples])
    return micro_batches


@dataclass(eq=False)
class MixedDraw:
    """The batch of a step: of each source as many examples as the weights of `mixture` say.

    The examples of a source come in turn, each once before any comes again.
    """

    mixture: Mixture
    rows: Mapping[str, IntArray]
    """Rows of each source that are trained on."""
    seed: int
    sets: Mapping[str, str]
    """The name of each source's set in the keys."""
    counts: Mapping[str, IntArray] | None = None
    """As `EpochDraw.counts`, for all rows of each source."""

    def __post_init__(self) -> None:
        self._turns = {name: Turns(rows, self.seed, name) for name, rows in self.rows.items()}

    def __call__(self, step: int, parts: int) -> list[list[Key]]:
        drawn, now = self.mixture.drawn_before(step), self.mixture.counts_at(step)
        picks: list[tuple[str, int]] = []
        counts: list[IntArray] = []
        for source, start, count in zip(self.mixture.names, drawn, now, strict=True):
            own = self._turns[source].drawn(int(start), int(count))
            picks += [(self.sets[source], row) for row in own.tolist()]
            counts += [] if self.counts is None else [self.counts[source][own]]
        return in_parts(picks, np.concatenate(counts) if counts else None, parts)


@dataclass(frozen=True, eq=False)
class EvalBatches(Sampler[list[Key]]):
    """Every example of every set once, long ones first, sets never mixed in a batch.

    Rank r takes examples r, r + world_size, ... of each set.
    """

    lengths: dict[str, IntArray]
    """Tokens of the examples of each set."""
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
            # The longest first: a batch too large for the memory fails at once, not at the end.
            order = np.argsort(-lengths, kind="stable")[self.rank :: self.world_size].tolist()
            # NOTE: counted by the ranks with fewest examples, so that all ranks have equally many
            # batches (sharded models need every rank in each); some have one example more in the
            # last.
            starts = list(range(0, len(lengths) // self.world_size, self.batch_size)) or [0]
            for start, end in pairwise([*starts, None]):
                if rows := order[start:end]:
                    batches.append([Key(source, row) for row in rows])
        return batches


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


# From the keys of examples to a padded batch: what a loader of texts fetches and collates.


class FetchedTexts(NamedTuple):
    """Examples not yet padded."""

    source: str
    rows: list[int]
    texts: list[TokenRow]
    label: LabelArray
    weight: float
    head: list[int] | None


class TextExamples(Dataset[FetchedTexts]):
    """All sets in one dataset. A batch is fetched at once; its examples of one set follow one
    another.

    `heads`: the number of each set's task, where there are several.
    """

    def __init__(
        self,
        sets: Mapping[str, TextSet],
        encoded: Mapping[str, EncodedTexts],
        heads: Mapping[str, int] | None = None,
    ) -> None:
        self.sets = sets
        self.encoded = encoded
        self.heads = heads

    def __getitems__(self, keys: list[Key]) -> FetchedTexts:
        (source, _, weight), rows = keys[0], [key.row for key in keys]
        texts: list[TokenRow] = []
        labels: list[LabelArray] = []
        for name, own in groupby(keys, key=lambda key: key.source):
            of_set = [key.row for key in own]
            texts += self.encoded[name].rows(of_set)
            labels.append(self.sets[name].label[of_set])
        label: Any = labels[0] if len(labels) == 1 else np.concatenate(labels)
        head = None if self.heads is None else [self.heads[key.source] for key in keys]
        return FetchedTexts(source, rows, texts, label, weight, head)


class Collate:
    """Pads the texts of a batch to the longest of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, fetched: FetchedTexts) -> TextBatch:
        return TextBatch(
            tokens=dict(self.pad(fetched.texts)),
            label=torch.as_tensor(fetched.label),
            source=fetched.source,
            row=torch.as_tensor(fetched.rows),
            weight=fetched.weight,
            head=None if fetched.head is None else torch.tensor(fetched.head),
        )
