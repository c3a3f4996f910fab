"""GlueData: the sets of one text classification task as Lightning loaders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from dynmoe.data.glue_tasks import TASKS
from dynmoe.data.ood import read_ood
from dynmoe.data.protocol import IntArray, split
from dynmoe.data.task_data import TaskData
from dynmoe.data.text_baseline import linear_text_baseline
from dynmoe.data.text_batches import EvalBatches, Key, TextBatch, TrainBatches, steps_per_epoch
from dynmoe.data.text_sets import TextSet
from dynmoe.data.text_sources import Source, read
from dynmoe.data.tokens import Encoded, encode, word_tokenizer
from dynmoe.errors import ConfigError, DataError

log = logging.getLogger(__name__)

VOCABULARY = 8192
"""Words of a tokenizer made from the training set; rarer ones are unknown."""

TESTS = ("test", "test_mismatched", "ax")
"""Sets without labels, for the GLUE server."""


class GlueData(TaskData):
    """A task of GLUE: its training set, and the labelled sets it is evaluated on.

    Those are `env_names`: dev first, for MNLI mismatched, then the out-of-distribution sets `ood`.
    With `holdout_fraction` a part of the training set, `heldout`, is evaluated too. Loaders give
    `text_batches.TextBatch`.
    """

    modality = "text"
    libraries = ("transformers", "tokenizers", "datasets")

    def __init__(
        self,
        name: str,
        task: str,
        source: Source,
        batch_size: int,
        epochs: int,
        seed: int,
        trial_seed: int,
        root: str | None = None,
        ood: Sequence[str] = (),
        ood_root: str | None = None,
        max_length: int = 128,
        eval_batch_size: int = 128,
        steps: int = -1,
        eval_every: int | None = None,
        accumulate: int = 1,
        holdout_fraction: float = 0.0,
        tokenizer_path: str | None = None,
        tokenizer_name: str | None = None,
        cache: str | None = None,
        linear_baseline: bool = False,
    ) -> None:
        super().__init__()
        self.name = name
        self.test_envs = [0]
        self.task = TASKS[task]
        self.sets: dict[str, TextSet] = {}
        self.rows: dict[str, IntArray] = {}
        self.baseline: dict[str, Any] | None = None
        self.tokenizer: PreTrainedTokenizerBase
        self._encoded: dict[str, Encoded] = {}
        self._source: Source = source
        self._root = root
        self._ood = list(ood)
        self._ood_root = ood_root
        self._max_length = max_length
        self._batch_size = batch_size
        self._eval_batch_size = eval_batch_size
        self._epochs = epochs
        self._steps = steps
        self._eval_every = eval_every
        self._accumulate = accumulate
        self._seed = seed
        self._trial_seed = trial_seed
        self._holdout_fraction = holdout_fraction
        self._tokenizer_path = tokenizer_path
        self._tokenizer_name = tokenizer_name
        self._cache = cache
        self._linear_baseline = linear_baseline

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes; a second call does nothing. Warns of unexpected sizes.

        Raises:
            DataError: the data cannot be trained on; lists every problem.
            ConfigError: no such tokenizer.
        """
        if self.sets:
            return
        found = read(self.task, self._source, self._root)
        for text in found.warnings:
            log.warning("%s", text)
        sets = {name: each for name, each in found.sets.items() if name not in TESTS}
        for name in self._ood:
            sets[name] = read_ood(name, self._ood_root, self.task)
        self._check(sets)
        self.tokenizer = self._make_tokenizer(sets["train"])
        self._encoded = {name: self._encode(each) for name, each in sets.items()}
        self.rows = {name: np.arange(len(each)) for name, each in sets.items()}
        if self._holdout_fraction:
            kept, held = split(len(self.rows["train"]), self._trial_seed, 0, self._holdout_fraction)
            self.rows["train"], self.rows["heldout"] = np.sort(kept), np.sort(held)
        self.sets = sets
        if self._linear_baseline:
            train = sets["train"].subset(self.rows["train"])
            self.baseline = linear_text_baseline(train, sets["dev"])

    def _check(self, sets: dict[str, TextSet]) -> None:
        parts = self._accumulate * self._world_size
        held = int(len(sets["train"]) * self._holdout_fraction)
        trained = len(sets["train"]) - held
        if steps_per_epoch(trained, self._batch_size, parts) < 1:
            raise DataError(
                f"data {self.name}: {trained} training examples make no batch of {self._batch_size}"
                f" in {parts} parts. Lower data.batch_size or the number of parts."
            )
        if self._holdout_fraction and not held:
            raise DataError(
                f"data {self.name}: protocol.holdout_fraction={self._holdout_fraction} of "
                f"{trained} training examples leaves none to hold out"
            )

    def _make_tokenizer(self, train: TextSet) -> PreTrainedTokenizerBase:
        place = self._tokenizer_path or self._tokenizer_name
        if place is None:
            return word_tokenizer([*train.first, *(train.second or [])], VOCABULARY)
        local = self._tokenizer_path is not None
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local)
        except Exception as error:  # transformers raises many kinds
            key = "backbone.path" if local else "backbone.model"
            raise ConfigError(
                f"{key}={place}: its tokenizer could not be loaded ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}). Without network give "
                "a folder with config.json, weights and tokenizer: backbone.path=FOLDER"
            ) from error
        if tokenizer.pad_token is None:  # decoders
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return tokenizer

    def _encode(self, texts: TextSet) -> Encoded:
        cache = None if self._cache is None else Path(self._cache)
        return encode(texts, self.tokenizer, self._max_length, cache)

    @property
    def env_names(self) -> list[str]:
        return [name for name in self.sets if name not in ("train", *TESTS)]

    @property
    def class_names(self) -> list[str]:
        return list(self.task.labels)

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {
            "num_classes": max(1, len(self.task.labels)),
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "num_classes": len(self.task.labels),
            "metrics": self.task.metrics,
            "env_names": self.env_names,
            "heldout": "heldout" in self.rows,
        }

    @property
    def sample(self) -> tuple[dict[str, torch.Tensor]]:
        """As long as the mean training text."""
        ids = torch.zeros(1, max(1, round(self.mean_tokens)), dtype=torch.long)
        return ({"input_ids": ids},)  # without a mask nothing depends on data

    @property
    def mean_tokens(self) -> float:
        return float(self._encoded["train"].lengths[self.rows["train"]].mean())

    @property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            name: len(self.rows[name]) for name in ("train", "heldout") if name in self.rows
        }
        for index, name in enumerate(self.env_names):
            sizes[f"env{index}"] = {"in": len(self.rows[name])}
        return sizes

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "measure": self.task.measure,
            "mean_tokens": self.mean_tokens,
            "samples_per_step": self._batch_size,
            "baseline": self.baseline,
        }

    @property
    def steps_per_epoch(self) -> int:
        parts = self._accumulate * self._world_size
        return steps_per_epoch(len(self.rows["train"]), self._batch_size, parts)

    @property
    def steps(self) -> int:
        return self._steps if self._steps > 0 else self._epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self._eval_every or self.steps_per_epoch

    def epoch_at(self, step: int) -> float:
        """Epochs that are over after 0-based optimizer step `step`."""
        return (step + 1) / self.steps_per_epoch

    @property
    def data_hash(self) -> str:
        digests = [f"{name} {texts.digest}" for name, texts in self.sets.items()]
        digests.append(str(self.rows.get("heldout", np.zeros(0)).tolist()))
        return sha256("\n".join(digests).encode()).hexdigest()[:8]

    def print_check(self, console: Console | None = None) -> None:
        """Table with one column per set: its examples, its tokens, its examples per class."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        table.add_column("")
        for name in self.rows:
            table.add_column(name, justify="right")
        columns = [self._encoded[_set_of(name)].lengths[rows] for name, rows in self.rows.items()]
        table.add_row("examples", *(str(len(lengths)) for lengths in columns))
        table.add_row("mean tokens", *(f"{lengths.mean():.1f}" for lengths in columns))
        table.add_row("longest", *(str(lengths.max()) for lengths in columns), end_section=True)
        for label, class_name in enumerate(self.class_names):
            counts = [
                int((self.sets[_set_of(name)].label[rows] == label).sum())
                for name, rows in self.rows.items()
            ]
            table.add_row(class_name, *map(str, counts))
        (console or Console()).print(table)

    def train_dataloader(self) -> DataLoader[Any]:
        batches = TrainBatches(
            rows=self.rows["train"],
            lengths=self._encoded["train"].lengths[self.rows["train"]],
            batch_size=self._batch_size,
            seed=self._seed,
            steps=self.steps,
            eval_every=self.eval_every,
            next_step=self._next_step,
            accumulate=self._accumulate,
            rank=self._rank,
            world_size=self._world_size,
        )
        return self._loader(batches)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(
            {name: rows for name, rows in self.rows.items() if name != "train"}
        )

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """One for each test set of the task, in the order of `test_sets`."""
        return [self._eval_loader({name: self.rows[name]}) for name in self.test_sets]

    @property
    def test_sets(self) -> list[str]:
        return [name for name in TESTS if name in self._encoded]

    def read_tests(self) -> None:
        """Reads the sets of the GLUE server as well.

        Raises:
            DataError: there are none.
        """
        found = read(self.task, self._source, self._root).sets
        tests = {name: each for name, each in found.items() if name in TESTS}
        if not tests:
            raise DataError(f"data {self.name}: expected a test set to predict, found none")
        for name, each in tests.items():
            self._encoded[name] = self._encode(each)
            self.rows[name] = np.arange(len(each))
            self.sets[name] = each

    def _eval_loader(self, rows: dict[str, IntArray]) -> DataLoader[Any]:
        lengths = {name: self._encoded[_set_of(name)].lengths for name in rows}
        return self._loader(
            EvalBatches(lengths, rows, self._eval_batch_size, self._rank, self._world_size)
        )

    def _loader(self, batches: TrainBatches | EvalBatches) -> DataLoader[Any]:
        return DataLoader(
            _Texts(self._encoded, self.sets),
            batch_sampler=batches,
            collate_fn=_Collate(self.tokenizer),
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            # A loader draws a base seed at each pass: not from the generator the model uses.
            generator=torch.Generator(),
        )


class _Texts(Dataset[Any]):
    """All sets behind one index; whole batches are fetched at once."""

    def __init__(self, encoded: dict[str, Encoded], sets: dict[str, TextSet]) -> None:
        self.encoded = encoded
        self.sets = sets

    def __getitems__(self, keys: list[Key]) -> tuple[str, list[int], Any, Any]:
        source, rows = keys[0].source, [key.row for key in keys]
        name = _set_of(source)
        return source, rows, self.encoded[name].rows(rows), self.sets[name].label[rows]


class _Collate:
    """Pads what `_Texts` fetched."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, fetched: Any) -> TextBatch:
        source, rows, texts, labels = fetched
        return TextBatch(
            dict(self.pad(texts)), torch.as_tensor(labels), source, torch.as_tensor(rows)
        )


def _set_of(name: str) -> str:
    """The set that a part is read from."""
    return "train" if name == "heldout" else name
