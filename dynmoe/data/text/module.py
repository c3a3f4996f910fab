"""GlueData: the sets of one text classification task as Lightning loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynmoe.data.text.batches import (
    Collate,
    EpochDraw,
    EvalBatches,
    TextExamples,
    steps_per_epoch,
)
from dynmoe.data.text.checks import text_warnings
from dynmoe.data.text.ood import read_ood
from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.sources import Source, read_sets
from dynmoe.data.text.tasks import LABELLED, TASKS, TESTS, GlueTask
from dynmoe.data.text.tokens import (
    WORDS,
    EncodedTexts,
    check_max_length,
    count_cut,
    encode,
    vocabulary_size,
    word_tokenizer,
)
from dynmoe.data.text.vocabulary import VocabularyData
from dynmoe.errors import DataError
from dynmoe.seeding import split

log = logging.getLogger(__name__)

VOCABULARY = 8192
"""Words of a tokenizer made from the training set; rarer ones are unknown."""


@dataclass(eq=False, kw_only=True)
class GlueData(VocabularyData):
    """A task of GLUE: its training set, and the labelled sets it is evaluated on.

    The evaluated sets are `env_names`: dev first, for MNLI mismatched, then the out-of-distribution
    sets `ood`. With `holdout_fraction` a part of the training set, `heldout`, is evaluated too.
    Loaders give `TextBatch`.
    """

    modality = "text"
    special = WORDS
    libraries = ("transformers", "tokenizers", "datasets")

    name: str
    """Name of the data set: the protocol's recipe is chosen by it."""
    task: str
    """Key of the task in `TASKS`."""
    source: Source
    """Where the sets come from: the hub, official TSV files, Parquet files or this package."""
    root: str | None = None
    """For tsv and parquet: the task's folder, or the one that holds it."""
    ood: Sequence[str] = ()
    """Further sets to evaluate on (data/text/ood.py)."""
    ood_root: str | None = None
    """Folder of the files of `ood`."""
    max_length: int = 128
    """Tokens of an example at most; longer ones are cut."""
    batch_size: int
    """Examples per optimizer step."""
    eval_batch_size: int = 128
    """Examples per batch of an evaluation."""
    trial_seed: int
    """Seed of the part of the training set that is held out."""
    holdout_fraction: float = 0.0
    """Share of the training set that is held out."""
    tokenizer_path: str | None = None
    """Local folder of a tokenizer."""
    tokenizer_name: str | None = None
    """Name of a tokenizer on the hub; without path and name: the words of the training set."""
    cache: str | None = None
    """Folder of tokenized texts, shared by all runs; None: none."""
    skip_invalid: bool = False
    """Leave out rows with a label that is none of the task's."""
    linear_baseline: bool = False
    """Fit TF-IDF + logistic regression to compare with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.test_envs = [0]
        self.sets: dict[str, TextSet] = {}
        self.tokenizer: PreTrainedTokenizerBase
        self._encoded: dict[str, EncodedTexts] = {}
        self._cut: dict[str, int] = {}

    @property
    def glue_task(self) -> GlueTask:
        return TASKS[self.task]

    @property
    def has_pairs(self) -> bool:
        """Whether an example may be of two texts."""
        return len(self.glue_task.columns) > 1

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; a second call does nothing. Warns of unexpected sizes.

        Raises:
            DataError: the data cannot be trained on; lists every problem.
            ConfigError: no such tokenizer, or a `max_length` that leaves no text.
        """
        if self.sets:
            return
        sets = self.read_labelled()
        train = sets["train"]
        self.take(sets, self.made_tokenizer(lambda: [*train.first, *(train.second or [])]))

    def read_labelled(self) -> dict[str, TextSet]:
        """The labelled sets, not tokenized; what is held out is a set of its own.

        Raises:
            DataError: the data cannot be trained on; lists every problem.
        """
        sets = self._read(LABELLED)
        for name in self.ood:
            sets[name] = read_ood(name, self.ood_root, self.glue_task, self.skip_invalid)
        for name, each in sets.items():
            for what, count in each.left_out.items():
                self.leave_out(f"{name}: {what}", count)
        if self.holdout_fraction:
            train = sets["train"]
            kept, held = split(len(train), self.trial_seed, 0, self.holdout_fraction)
            sets["train"] = train.subset(np.sort(kept))
            sets["heldout"] = train.subset(np.sort(held))
        train = sets["train"]
        if not all(map(len, sets.values())):
            raise DataError(
                f"data {self.name}: protocol.holdout_fraction={self.holdout_fraction} of "
                f"{len(train)} training examples leaves none to hold out"
            )
        return sets

    def learnt(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        return word_tokenizer(texts, VOCABULARY)

    def take(self, sets: dict[str, TextSet], tokenizer: PreTrainedTokenizerBase) -> None:
        """Tokenize the sets, and warn of what they lack.

        Raises:
            ConfigError: a `max_length` that leaves no text.
        """
        self.tokenizer = tokenizer
        check_max_length(self.tokenizer, len(self.glue_task.columns), self.max_length)
        self._encoded = {name: self._encode(each) for name, each in sets.items()}
        self.sets = sets
        self._cut = {
            name: count_cut(each, self._encoded[name], self.tokenizer, self.max_length)
            for name, each in sets.items()
        }
        if cut := ", ".join(f"{count} of {name}" for name, count in self._cut.items() if count):
            text = f"texts longer than data.max_length={self.max_length} are cut: {cut}"
            log.warning("data %s: %s", self.name, text)
        for text in text_warnings(sets, self.glue_task):
            log.warning("data %s: %s", self.name, text)

    def _read(self, names: Sequence[str]) -> dict[str, TextSet]:
        found = read_sets(self.glue_task, self.source, self.root, names, self.skip_invalid)
        for text in found.warnings:
            log.warning("%s", text)
        return found.sets

    def _encode(self, texts: TextSet) -> EncodedTexts:
        cache = None if self.cache is None else Path(self.cache)
        return encode(texts, self.tokenizer, self.max_length, cache)

    @property
    def env_names(self) -> list[str]:
        return [name for name in self.sets if name not in ("train", "heldout", *TESTS)]

    @property
    def class_names(self) -> list[str]:
        return list(self.glue_task.labels)

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {
            "num_classes": max(1, len(self.glue_task.labels)),
            "vocab_size": vocabulary_size(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def check_backbone(self, backbone: Any) -> None:
        backbone.check_length(self.max_length)
        if self.sets["train"].second and "token_type_ids" in self.tokenizer.model_input_names:
            backbone.check_pairs()

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "num_classes": len(self.glue_task.labels),
            "metrics": self.glue_task.metrics,
            "env_names": self.env_names,
            "heldout": "heldout" in self.sets,
        }

    @property
    def sample(self) -> tuple[dict[str, torch.Tensor]]:
        """Has the length of the mean training text."""
        ids = torch.zeros(1, max(1, round(self.mean_tokens)), dtype=torch.long)
        return ({"input_ids": ids},)  # without a mask nothing depends on data

    @property
    def mean_tokens(self) -> float:
        return float(self._encoded["train"].lengths.mean())

    @property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {
            name: len(self.sets[name]) for name in ("train", "heldout") if name in self.sets
        }
        return sizes | {name: len(self.sets[name]) for name in self.env_names}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "measure": self.glue_task.measure,
            "mean_tokens": self.mean_tokens,
            "samples_per_step": self.batch_size,
        }

    def baseline(self) -> dict[str, Any] | None:
        if not self.linear_baseline:
            return None
        return linear_text_baseline(self.sets["train"], self.sets["dev"], self.glue_task.metrics)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.sets["train"]), self.batch_size)

    @property
    def data_hash(self) -> str:
        own = (item for item in self.sets.items() if item[0] not in self.ood)
        digests = [f"{name} {texts.digest}" for name, texts in own]
        return sha256("\n".join(digests).encode()).hexdigest()[:8]

    def print_check(self, console: Console | None = None) -> None:
        """Print a table of the sets: examples, tokens and examples per class."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        table.add_column("")
        for name in self.sets:
            table.add_column(name, justify="right")
        columns = [self._encoded[name].lengths for name in self.sets]
        table.add_row("examples", *(str(len(lengths)) for lengths in columns))
        table.add_row("mean tokens", *(f"{lengths.mean():.1f}" for lengths in columns))
        table.add_row("longest", *(str(lengths.max()) for lengths in columns))
        cut = [str(self._cut.get(name, 0)) for name in self.sets]
        table.add_row("cut by max_length", *cut, end_section=True)
        for label, class_name in enumerate(self.class_names):
            counts = [int((texts.label == label).sum()) for texts in self.sets.values()]
            table.add_row(class_name, *map(str, counts))
        (console or Console()).print(table)

    def train_dataloader(self) -> Any:
        draw = EpochDraw(self._encoded["train"].lengths, self.batch_size, self.plan.seed)
        return self._text_loader(self._step_batches(draw))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._eval_loader(self._evaluated)

    @property
    def _evaluated(self) -> list[str]:
        return [name for name in self.sets if name not in ("train", *TESTS)]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """A loader for each of `test_sets`."""
        return [self._eval_loader([name]) for name in self.test_sets]

    @property
    def test_sets(self) -> list[str]:
        return [name for name in TESTS if name in self.sets]

    def read_tests(self) -> None:
        """Read the test sets, which the GLUE server scores, as well.

        Raises:
            DataError: there are none, or they cannot be read.
        """
        tests = self._read(TESTS)
        if not tests:
            raise DataError(
                f"data {self.name}: expected a test set to predict, found none. GLUE's are "
                "test.tsv, test-*.parquet or on the hub: data.root=FOLDER"
            )
        for name, each in tests.items():
            self.sets[name], self._encoded[name] = each, self._encode(each)

    def _eval_loader(self, names: list[str]) -> DataLoader[Any]:
        lengths = {name: self._encoded[name].lengths for name in names}
        batches = EvalBatches(lengths, self.eval_batch_size, self._rank, self._world_size)
        return self._text_loader(batches)

    def _text_loader(self, batches: Sampler[Any]) -> DataLoader[Any]:
        return self._loader(self._examples(), batches, Collate(self.tokenizer))

    def _examples(self) -> TextExamples:
        return TextExamples(self.sets, self._encoded)


# The files that the GLUE server (gluebenchmark.com) takes: one prediction a line.


def write_submission(
    folder: Path,
    task: GlueTask,
    test_set: str,
    index: npt.NDArray[np.int64],
    prediction: npt.NDArray[np.float32] | npt.NDArray[np.int64],
) -> Path:
    """Write `index` [N] and `prediction` [N] as the server names and spells them, by index.

    A regression's predictions are clipped to STS-B's range, 0 to 5.
    """
    order = np.argsort(index)
    lines = ["index\tprediction"]
    for row, value in zip(index[order].tolist(), prediction[order].tolist(), strict=True):
        lines.append(f"{row}\t{_spelled(task, value)}")
    file = folder / task.submission[test_set]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _spelled(task: GlueTask, value: float) -> str:
    if task.regression:
        return f"{min(5.0, max(0.0, value)):.3f}"
    return task.labels[int(value)] if task.text_labels else str(int(value))


# The baseline that a network must beat: a linear classifier on words.


def linear_text_baseline(train: TextSet, dev: TextSet, metrics: Sequence[str]) -> dict[str, Any]:
    """The mean of `metrics` on dev: {"name": ..., "scores": {"dev": {"score": ...}}}.

    It is for classes, not for regression. A pair is read as one text.
    """
    from sklearn import metrics as measures  # half a second
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from threadpoolctl import threadpool_limits

    measure: dict[str, Callable[[Any, Any], float]] = {
        "accuracy": measures.accuracy_score,
        "f1": measures.f1_score,
        "matthews": measures.matthews_corrcoef,
    }
    # C chosen once on the embedded glosses; the default 1 regularizes short texts too much.
    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    with threadpool_limits(1):  # NOTE: the order in which threads add decides where a fit stops
        classifier.fit(_joined(train), train.label)
        found = classifier.predict(_joined(dev))
    score = sum(float(measure[name](dev.label, found)) for name in metrics) / len(metrics)
    return {"name": "TF-IDF + logistic regression", "scores": {"dev": {"score": score}}}


def _joined(texts: TextSet) -> list[str]:
    if texts.second is None:
        return texts.first
    return [f"{a} {b}" for a, b in zip(texts.first, texts.second, strict=True)]
