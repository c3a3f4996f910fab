"""Documents as one stream of tokens for each set, cut into blocks of equal length.

    <end> document 1 <end> document 2 <end> ... document N <end>

Every token but the first is predicted once: a block begins with the token that the block before
ends with. So the losses of a set add up to the code length of its documents and their ends. The
last block alone is shorter, and is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dynmoe.data.cache import chunks, kept_or_made, opened, written
from dynmoe.data.text.batches import Key
from dynmoe.data.text.tokens import (
    BATCH,
    PLAIN,
    Special,
    check_fast,
    fingerprint,
    id_lists,
    lists,
    write_lists,
)
from dynmoe.errors import ConfigError
from dynmoe.seeding import IntArray

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Ids = npt.NDArray[np.int32]

END = "<|endoftext|>"
BYTE_PAIRS = Special({"eos": END, "pad": END})
IGNORE = -100
"""A label without a loss, as cross_entropy knows it."""
LEARNT = 50_000_000
"""Characters of documents that a vocabulary is learnt from, at most."""


# The tokenizer.


def byte_pair_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` tokens (GPT-2's kind), learnt from the first texts.

    Nothing is unknown to it, since every byte is a token: no text is lost, and bits per byte are
    those of the text as it is. The only special token, `END`, is number 0.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read = 0

    def wanted(text: str) -> bool:
        nonlocal read
        read += len(text)
        return read - len(text) < LEARNT

    made.train_from_iterator(takewhile(wanted, texts), trainer)
    return BYTE_PAIRS.wrapped(made)


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document.

    Raises:
        ConfigError: there is none.
    """
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id)
    found = next((each for each in ends if each is not None), None)
    if found is None:
        raise ConfigError(
            "data: its tokenizer has no token for the end of a document. Set tokenizer.eos_token "
            "and save it: backbone.path=FOLDER"
        )
    return int(found)


# A stream.


class Stream:
    """The tokens of a set that are predicted: those of all documents, each with its end.

    `ids` [T] int32, mapped from a file where there is a cache.
    """

    def __init__(self, table: pyarrow.Table) -> None:
        self.ids: Ids = lists(table, "ids").values.to_numpy()

    def __len__(self) -> int:
        return len(self.ids)

    def counts(self, length: int) -> IntArray:
        """Predicted tokens of each block."""
        starts = np.arange(0, len(self.ids), length)
        found: IntArray = np.minimum(len(self.ids) - starts, length)
        return found

    def block(self, row: int, length: int, end: int) -> tuple[Ids, Ids]:
        """Tokens that are read, and those that are predicted after each of them."""
        first, last = row * length, min((row + 1) * length, len(self.ids))
        before = self.ids[first - 1 : first] if first else np.array([end], dtype=np.int32)
        read: Ids = np.concatenate([before, self.ids[first : last - 1]])
        return read, self.ids[first:last]


def encoded(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, digest: str, cache: Path | None
) -> Stream:
    """The stream of documents; `digest` tells them from others.

    `cache` is a folder: the file in it is named after the documents and the tokenizer. Processes
    that ask for the same file wait for the first; a damaged file is made anew.

    Raises:
        DataError: a tokenizer without a tokenizer.json.
        ConfigError: `cache` cannot be written, or the tokenizer has no end token.
    """
    check_fast(tokenizer)
    write = partial(_write, documents, tokenizer, end_of(tokenizer))

    def make(file: Path | None) -> Stream:
        return Stream(written(file, write))

    if cache is None:
        return make(None)
    name = f"stream-{fingerprint(tokenizer, [digest, end_of(tokenizer), PLAIN])}.arrow"
    return kept_or_made(cache / name, lambda file: Stream(opened(file)), make)


def _write(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, end: int, sink: Any
) -> None:
    parts = []
    for chunk in chunks(documents, BATCH, "documents tokenized"):
        made = tokenizer(chunk, add_special_tokens=False, truncation=False, verbose=False, **PLAIN)[
            "input_ids"
        ]
        parts.append(id_lists([[*ids, end] for ids in made]))
    write_lists({"ids": parts}, sink)


# Batches of blocks.


class TokenBatch(NamedTuple):
    """Blocks of one set."""

    tokens: dict[str, Tensor]
    """input_ids [B, N] int64; attention_mask [B, N] int64 where there is padding."""
    label: Tensor
    """[B, N] int64: the token after each; IGNORE at padding."""
    source: str
    row: Tensor
    """[B] int64, numbers of the blocks."""
    weight: float = 1.0
    """See `batches.Key`."""

    @property
    def inputs(self) -> tuple[dict[str, Tensor]]:
        """The backbone's positional arguments."""
        return (self.tokens,)


class Blocks(Dataset[TokenBatch]):
    """The blocks of all sets, fetched as batches, padded with the token `end`."""

    def __init__(self, streams: dict[str, Stream], length: int, end: int) -> None:
        self.streams = streams
        self.length, self.end = length, end

    def __getitems__(self, keys: list[Key]) -> TokenBatch:
        source, _, weight = keys[0]
        rows = [key.row for key in keys]
        found = [self.streams[source].block(row, self.length, self.end) for row in rows]
        most = max(len(read) for read, _ in found)
        ids = np.full((len(rows), most), self.end, dtype=np.int64)
        label = np.full((len(rows), most), IGNORE, dtype=np.int64)
        for place, (read, predicted) in enumerate(found):
            ids[place, : len(read)], label[place, : len(read)] = read, predicted
        tokens = {"input_ids": torch.from_numpy(ids)}
        if (label == IGNORE).any():
            tokens["attention_mask"] = torch.from_numpy((label != IGNORE).astype(np.int64))
        return TokenBatch(tokens, torch.from_numpy(label), source, torch.tensor(rows), weight)


def as_fetched(batch: TokenBatch) -> TokenBatch:
    """What a loader collates is whole already."""
    return batch
