"""CorpusData: documents for causal language modelling as Lightning loaders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynmoe.data.lm.blocks import (
    BYTE_PAIRS,
    Blocks,
    Stream,
    as_fetched,
    byte_pair_tokenizer,
    encoded,
    end_of,
)
from dynmoe.data.lm.documents import Unit, digest, folder_corpus, gloss_corpus
from dynmoe.data.text.batches import EpochDraw, EvalBatches, steps_per_epoch
from dynmoe.data.text.tokens import fingerprint, vocabulary_size
from dynmoe.data.text.vocabulary import VocabularyData


@dataclass(eq=False, kw_only=True)
class CorpusData(VocabularyData):
    """Documents, packed into blocks of `length` tokens.

    The evaluated sets are `validation` and, unless `test` is 0, `test`, which is reported. Loaders
    give `TokenBatch`.
    """

    modality = "text-stream"
    special = BYTE_PAIRS
    libraries = ("transformers", "tokenizers")

    name: str
    root: str | None = None
    """Folder of .txt, .jsonl or .parquet files; None: the definitions in this package."""
    text_key: str = "text"
    """Field of .jsonl files and column of .parquet files that holds a document."""
    unit: Unit = "file"
    """A document of a .txt file."""
    validation: float | Sequence[str] = 0.05
    """Share of the documents, by a hash of their text, or patterns of files below `root`."""
    test: float | Sequence[str] | None = 0.05
    """As `validation`; 0: none, validation is reported."""
    length: int = 128
    """Tokens of a block."""
    batch_size: int
    """Blocks per optimizer step."""
    eval_batch_size: int = 32
    """Blocks per batch of an evaluation."""
    trial_seed: int = 0
    """Seed of the deal of documents into sets."""
    vocabulary: int = 2048
    """Tokens of a vocabulary that is learnt from the training set."""
    tokenizer_path: str | None = None
    """Local folder of a tokenizer."""
    tokenizer_name: str | None = None
    """Name of a tokenizer on the hub; without path and name: one is learnt."""
    cache: str | None = None
    """Folder of tokenized documents, shared by all runs; None: none."""
    skip_invalid: bool = False
    """Leave out, and count, files and rows that cannot be read."""
    examples: int = 2
    """Blocks of the validation set that are recorded token by token, with their experts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tokenizer: PreTrainedTokenizerBase
        self.sets: dict[str, list[str]] = {}
        self.bytes: dict[str, int] = {}
        """UTF-8 bytes of the documents of each set."""
        self._streams: dict[str, Stream] = {}
        self._digest = ""
        self.test_envs = [1 if self.test or self.root is None else 0]

    def learnt(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        return byte_pair_tokenizer(texts, self.vocabulary)

    def setup(self, stage: str | None = None) -> None:
        """Read, deal and tokenize; a second call does nothing.

        Raises:
            DataError: documents that cannot be read, or a set without one.
            ConfigError: no such tokenizer, or one without an end token.
        """
        if self.sets:
            return
        if self.root is None:
            found = gloss_corpus(self.trial_seed)
        else:
            found = folder_corpus(
                Path(self.root).expanduser(),
                self.text_key,
                self.unit,
                self.validation,
                self.test,
                self.trial_seed,
                self.skip_invalid,
            )
        for what, count in found.left_out.items():
            self.leave_out(what, count)
        self._digest = digest(found.sets)
        self.tokenizer = self.made_tokenizer(lambda: found.sets["train"])
        cache = None if self.cache is None else Path(self.cache)
        self._streams = {
            name: encoded(documents, self.tokenizer, digest({name: documents}), cache)
            for name, documents in found.sets.items()
        }
        self.bytes = {
            name: sum(len(text.encode()) for text in documents)
            for name, documents in found.sets.items()
        }
        self.sets = found.sets

    @property
    def env_names(self) -> list[str]:
        return [name for name in self.sets if name != "train"]

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {
            "vocab_size": vocabulary_size(self.tokenizer),
            "eos_token_id": end_of(self.tokenizer),
        }

    def check_backbone(self, backbone: Any) -> None:
        backbone.check_length(self.length, "data.length")

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "env_names": self.env_names,
            "tokens_per_byte": {
                name: len(self._streams[name]) / self.bytes[name] for name in self.env_names
            },
            "decode": self.tokenizer.decode,
            "examples": self.examples,
        }

    @property
    def sample(self) -> tuple[dict[str, torch.Tensor]]:
        """A whole block."""
        return ({"input_ids": torch.zeros(1, self.length, dtype=torch.long)},)

    @property
    def sizes(self) -> dict[str, Any]:
        """Blocks."""
        return {name: len(each.counts(self.length)) for name, each in self._streams.items()}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "measure": "loss",
            "mean_tokens": float(self._streams["train"].counts(self.length).mean()),
            "samples_per_step": self.batch_size,
            "documents": {name: len(each) for name, each in self.sets.items()},
            "tokens": {name: len(each) for name, each in self._streams.items()},
            "bytes": self.bytes,
            "vocabulary": vocabulary_size(self.tokenizer),
            "tokenizer": fingerprint(self.tokenizer, []),
        }

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.sizes["train"], self.batch_size)

    @property
    def data_hash(self) -> str:
        return self._digest[:8]

    def print_check(self, console: Console | None = None) -> None:
        """Print a table of the sets: documents, bytes, tokens, blocks."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        table.add_column("")
        for name in self.sets:
            table.add_column(name, justify="right")
        rows = {
            "documents": self.facts["documents"],
            "bytes": self.bytes,
            "tokens, ends included": self.facts["tokens"],
            f"blocks of {self.length} tokens": self.sizes,
        }
        for what, counts in rows.items():
            table.add_row(what, *(f"{counts[name]:,}" for name in self.sets))
        table.add_row(
            "bytes per token",
            *(f"{self.bytes[name] / len(self._streams[name]):.2f}" for name in self.sets),
        )
        (console or Console()).print(table)

    def train_dataloader(self) -> Any:
        counts = self._streams["train"].counts(self.length)
        draw = EpochDraw(counts, self.batch_size, self.plan.seed, counts)
        return self._block_loader(self._step_batches(draw))

    def val_dataloader(self) -> DataLoader[Any]:
        counts = {name: self._streams[name].counts(self.length) for name in self.env_names}
        batches = EvalBatches(counts, self.eval_batch_size, self._rank, self._world_size)
        return self._block_loader(batches)

    def _block_loader(self, batches: Sampler[Any]) -> DataLoader[Any]:
        blocks = Blocks(self._streams, self.length, end_of(self.tokenizer))
        return self._loader(blocks, batches, as_fetched)
