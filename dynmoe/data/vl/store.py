"""The token ids of all conversations of a source, made once and kept in a file of the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.compute

from dynmoe.data.cache import chunks, kept_or_made, opened, written
from dynmoe.data.text.tokens import fingerprint
from dynmoe.data.vl.chat import (
    IGNORE,
    IMAGE,
    TEMPLATES,
    EncodedConversation,
    checked,
    encode_all,
    has_controls,
)
from dynmoe.data.vl.conversations import Conversation, ConversationSource
from dynmoe.errors import DataError
from dynmoe.seeding import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 500  # conversations in memory at once
COLUMNS = pyarrow.schema(
    {
        "ids": pyarrow.list_(pyarrow.int32()),  # an image is one `IMAGE`
        "labels": pyarrow.list_(pyarrow.int32()),
        "images": pyarrow.list_(pyarrow.string()),
        "length": pyarrow.int64(),  # an image is all its positions
        "answer_tokens": pyarrow.int64(),
        "controls": pyarrow.bool_(),  # a text of it was changed: `without_controls`
    }
)
"""A conversation that is left out is a row of nulls."""

Row = dict[str, Any]
RowsOf = Callable[[list[Conversation]], list[Row]]


class TokenStore:
    """Conversations as token ids and labels, and the keys of their images: a table of `COLUMNS`.

    The table of a `file` is mapped into memory, not read.
    """

    lengths: IntArray
    """[C] tokens of each conversation."""
    answer_tokens: IntArray
    """[C] labels other than `IGNORE`, at least 1."""
    num_images: IntArray
    """[C]"""
    controls: int
    """Conversations in whose texts control tokens were made plain text."""
    left_out: int
    """Conversations of the source whose images, or any answer, did not fit in the length."""

    def __init__(self, table: pyarrow.Table, image_tokens: int, file: Path | None = None) -> None:
        self._table = table
        self._image_tokens = image_tokens
        self._file = file
        self._rows = np.flatnonzero(table["ids"].is_valid())
        self.left_out = len(table) - len(self._rows)
        self.controls = pyarrow.compute.sum(table["controls"]).as_py() or 0
        images = pyarrow.compute.list_value_length(table["images"])
        columns = table["length"], table["answer_tokens"], images
        self.lengths, self.answer_tokens, self.num_images = (
            column.drop_null().to_numpy().astype(np.int64) for column in columns
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> EncodedConversation:
        """Ids and labels of conversation `index`."""
        row = int(self._rows[index])
        ids, labels = (self._table[name][row].values.to_numpy() for name in ("ids", "labels"))
        repeats = np.where(ids == IMAGE, self._image_tokens, 1)
        return EncodedConversation(np.repeat(ids, repeats), np.repeat(labels, repeats))

    def images(self, index: int) -> list[str]:
        """Keys of the images of conversation `index`, in the order of their places."""
        keys: list[str] = self._table["images"][int(self._rows[index])].as_py()
        return keys

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the file again; a pickled table would be a copy of it."""
        if self._file is None:
            return TokenStore, (self._table, self._image_tokens)
        return _opened, (self._image_tokens, self._file)


def tokenized(
    source: ConversationSource,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_tokens: int,
    max_length: int,
    cache: Path | None,
) -> TokenStore:
    """The conversations of `source` as `chat.encode_all` writes them.

    `cache` is a folder: the file in it is named after the source, the tokenizer and the other
    arguments, and written while the source is read, so that memory does not grow with the source.
    Processes that ask for the same file wait for the first; a damaged file is made anew. Without
    `cache` all is kept in memory.

    Raises:
        ConfigError: `template` and `tokenizer` do not fit together, or `cache` cannot be written.
        DataError: no conversation fits in `max_length`.
    """
    checked(tokenizer, template)
    rows_of = partial(
        _rows,
        tokenizer=tokenizer,
        template=template,
        image_tokens=image_tokens,
        max_length=max_length,
    )
    write = partial(_write, source, rows_of, image_tokens)
    if cache is None:
        return TokenStore(written(None, write), image_tokens)
    marks = [tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    settings = [repr(TEMPLATES[template]), image_tokens, max_length, str(COLUMNS)]
    name = f"conversations-{fingerprint(tokenizer, [source.digest, marks, settings])}.arrow"

    def make(file: Path) -> TokenStore:
        return TokenStore(written(file, write), image_tokens, file)

    return kept_or_made(cache / name, partial(_opened, image_tokens), make)


def _opened(image_tokens: int, file: Path) -> TokenStore:
    """Raises OSError or ValueError: no such file, or a damaged one."""
    return TokenStore(opened(file), image_tokens, file)


def _write(source: ConversationSource, rows_of: RowsOf, image_tokens: int, sink: Any) -> None:
    total = left_out = 0
    with pyarrow.ipc.new_file(sink, COLUMNS) as file:
        for chunk in chunks(source, CHUNK, f"conversations of {source.name} tokenized"):
            rows = rows_of(chunk)
            file.write_batch(pyarrow.RecordBatch.from_pylist(rows, COLUMNS))
            left_out += rows.count({})
            total += len(rows)
    if not total:
        raise DataError(f"data {source.name}: no conversations to train on.")
    if left_out == total:
        raise DataError(
            f"data {source.name}: none of its {left_out} conversations fits. An image alone is "
            f"{image_tokens} tokens: raise data.max_length."
        )


def _rows(
    conversations: list[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    image_tokens: int,
    max_length: int,
) -> list[Row]:
    """A row of `COLUMNS` for each conversation, {} for one that does not fit."""
    encoded = encode_all(conversations, tokenizer, template, image_tokens, max_length)
    return [
        {**_row(each, found, image_tokens), "controls": has_controls(each, tokenizer)}
        if found
        else {}
        for each, found in zip(conversations, encoded, strict=True)
    ]


def _row(conversation: Conversation, encoded: EncodedConversation, image_tokens: int) -> Row:
    ids, labels = encoded
    repeated = np.flatnonzero(ids == IMAGE).reshape(-1, image_tokens)[:, 1:]
    return {
        "ids": np.delete(ids, repeated),
        "labels": np.delete(labels, repeated),
        "images": list(conversation.images),
        "length": len(ids),
        "answer_tokens": int(np.count_nonzero(labels != IGNORE)),
    }
