"""Texts as token ids, made once and kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynmoe.data.cache import chunks, kept_or_made, opened, written
from dynmoe.data.text.sets import TextSet
from dynmoe.errors import ConfigError, DataError
from dynmoe.network import go_offline_if_unreachable
from dynmoe.seeding import IntArray

if TYPE_CHECKING:
    import pyarrow
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

BATCH = 1000  # texts handed to the tokenizer at once

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep")

TokenRow = dict[str, list[int]]
PLAIN = {"split_special_tokens": True}
"""[SEP] or </s> in a text is text: it does not divide sentences, nor end them."""


class EncodedTexts:
    """Token ids of every example, not padded; `lengths` [N] counts them."""

    def __init__(self, table: pyarrow.Table) -> None:
        parts = {name: lists(table, name) for name in table.column_names}
        self._columns = {name: each.values.to_numpy() for name, each in parts.items()}
        self._starts = next(iter(parts.values())).offsets.to_numpy()
        self.lengths: IntArray = np.diff(self._starts).astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, indices: list[int]) -> list[TokenRow]:
        """The tokenizer's output for each: input_ids, attention_mask, maybe token_type_ids."""
        ends = [(self._starts[index], self._starts[index + 1]) for index in indices]
        return [
            {name: values[start:end].tolist() for name, values in self._columns.items()}
            for start, end in ends
        ]


def encode(
    texts: TextSet, tokenizer: PreTrainedTokenizerBase, max_length: int, cache: Path | None
) -> EncodedTexts:
    """Token ids of at most `max_length` per example, cut from the longer text of a pair.

    `cache` is a folder: the file in it is named after the texts, the tokenizer and `max_length`.
    Processes that ask for the same file wait for the first; a damaged file is made anew.

    Raises:
        DataError: a tokenizer without a tokenizer.json.
        ConfigError: `cache` cannot be written.
    """
    check_fast(tokenizer)
    make = partial(_tokenized, texts, tokenizer, max_length)
    if cache is None:
        return make(None)
    settings = [tokenizer.model_input_names, tokenizer.truncation_side, max_length, PLAIN]
    name = f"tokens-{fingerprint(tokenizer, [texts.digest, settings])}.arrow"
    return kept_or_made(cache / name, partial(_kept, len(texts)), make)


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError if it is one of Python alone."""
    if not tokenizer.is_fast:
        raise DataError(
            f"backbone.path: {type(tokenizer).__name__} has no tokenizer.json. Save one there with "
            "transformers' save_pretrained, or take a backbone with a fast tokenizer."
        )


def check_max_length(tokenizer: PreTrainedTokenizerBase, texts: int, max_length: int) -> None:
    """Raises ConfigError if no token of one of an example's `texts` (1 or 2) would be left."""
    special = tokenizer.num_special_tokens_to_add(pair=texts > 1)
    if max_length < special + texts:
        raise ConfigError(
            f"data.max_length={max_length}: expected {special + texts} or more, since {special} "
            f"special tokens stand around {texts} text{'s' * (texts > 1)}."
        )


def count_cut(
    texts: TextSet, encoded: EncodedTexts, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> int:
    """The number of examples that `encode` has cut; those of full length are tokenized again."""
    full = np.flatnonzero(encoded.lengths >= max_length)
    cut = 0
    for start in range(0, len(full), BATCH):
        chosen = texts.subset(full[start : start + BATCH])
        columns = [chosen.first, *([] if chosen.second is None else [chosen.second])]
        rows = tokenizer(*columns, truncation=False, verbose=False, **PLAIN)["input_ids"]
        cut += sum(len(row) > max_length for row in rows)
    return cut


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Embeddings that a model needs for the tokens: the largest id and 1, as ids may have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase, content: Any) -> str:
    """16 hexadecimal digits that change with the tokenizer and with `content`, which is JSON."""
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for changed_by_use in ("truncation", "padding"):
        state.pop(changed_by_use)
    text = json.dumps([content, state], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_tokenizer(path: str | None, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, which needs no network, or of a name on the Hugging Face Hub.

    Raises:
        ConfigError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    key, place = ("backbone.model", name) if path is None else ("backbone.path", path)
    if path is None:
        go_offline_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=path is not None)
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(
            f"{key}={place}: its tokenizer could not be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Without network give "
            "a folder with config.json, weights and tokenizer: backbone.path=FOLDER"
        ) from error
    if tokenizer.pad_token is None:  # decoders
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError(
            f"{key}={place}: its tokenizer has no token for padding, and no end token to take "
            "instead. Set tokenizer.pad_token and save it: backbone.path=FOLDER"
        )
    tokenizer.padding_side = "right"
    return tokenizer


class Special(NamedTuple):
    """The special tokens of a vocabulary that is learnt, and how transformers takes it."""

    tokens: Mapping[str, str]
    """By role (pad, unk, ...), in the order of their ids; other names than the roles of
    transformers are additional special tokens."""
    settings: Mapping[str, Any] = {}

    def wrapped(self, learnt: Tokenizer) -> PreTrainedTokenizerFast:
        """The tokenizer of transformers."""
        from transformers import PreTrainedTokenizerFast

        roles = {f"{role}_token": token for role, token in self.tokens.items() if role in ROLES}
        others = [token for role, token in self.tokens.items() if role not in ROLES]
        return PreTrainedTokenizerFast(
            tokenizer_object=learnt, additional_special_tokens=others, **roles, **self.settings
        )


WORDS = Special(
    {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"},
    {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]},
)


def word_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of the lower-case words of `texts`: frequent ones first, ties by the alphabet.

    `size` counts the special tokens [PAD] (0), [UNK], [CLS] and [SEP] too.
    """
    from tokenizers import normalizers, pre_tokenizers

    return word_level_tokenizer(
        texts,
        size,
        WORDS,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    )


def word_level_tokenizer(
    texts: Iterable[str],
    size: int,
    special: Special,
    normalizer: Normalizer,
    pre_tokenizer: PreTokenizer,
    templates: tuple[str, str | None],
) -> PreTrainedTokenizerFast:
    """A tokenizer of the most frequent words of `texts`, `size` with the special tokens.

    `templates` frame one text and a pair.
    """
    from tokenizers import Tokenizer, models, processors, trainers

    words = Tokenizer(models.WordLevel(unk_token=special.tokens["unk"]))
    words.normalizer, words.pre_tokenizer = normalizer, pre_tokenizer
    tokens = list(special.tokens.values())
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=tokens, show_progress=False)
    words.train_from_iterator(texts, trainer)
    single, pair = templates
    words.post_processor = processors.TemplateProcessing(
        single=single,
        pair=pair,
        special_tokens=[(name, words.token_to_id(name)) for name in tokens],
    )
    return special.wrapped(words)


def _kept(rows: int, file: Path) -> EncodedTexts:
    """Raises OSError or ValueError: no file, damaged, or of other texts."""
    encoded = EncodedTexts(opened(file))
    if len(encoded) != rows:
        raise ValueError(f"{file}: expected {rows} rows, found {len(encoded)}")
    return encoded


def _tokenized(
    texts: TextSet, tokenizer: PreTrainedTokenizerBase, max_length: int, file: Path | None
) -> EncodedTexts:
    return EncodedTexts(written(file, partial(_write, texts, tokenizer, max_length)))


def _write(texts: TextSet, tokenizer: PreTrainedTokenizerBase, max_length: int, sink: Any) -> None:
    columns: dict[str, list[Any]] = {}
    pairs = zip(texts.first, *([] if texts.second is None else [texts.second]), strict=True)
    for chunk in chunks(pairs, BATCH, "texts tokenized"):
        batch = map(list, zip(*chunk, strict=True))
        made = tokenizer(*batch, truncation=True, max_length=max_length, **PLAIN)
        for name, values in made.items():
            columns.setdefault(name, []).append(id_lists(values))
    write_lists(columns, sink)


# Lists of token ids in files of the cache. Their offsets have 64 bits: a corpus may have more than
# 2^31 tokens.


def id_lists(rows: Sequence[Sequence[int]]) -> pyarrow.LargeListArray:
    import pyarrow

    return pyarrow.array(rows, pyarrow.large_list(pyarrow.int32()))


def write_lists(columns: Mapping[str, Sequence[pyarrow.LargeListArray]], sink: Any) -> None:
    """Write the parts of each column as one batch of rows: it is mapped as one array."""
    import pyarrow

    arrays = {name: pyarrow.concat_arrays(parts) for name, parts in columns.items()}
    rows = pyarrow.RecordBatch.from_pydict(arrays)
    with pyarrow.ipc.new_file(sink, rows.schema) as file:
        file.write_batch(rows)


def lists(table: pyarrow.Table, name: str) -> pyarrow.LargeListArray:
    """A column that `write_lists` wrote."""
    column = table[name]
    # NOTE: combine_chunks copies a single chunk too, and what is mapped would be in memory.
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
