"""VisionLanguageData: conversations about images, and the questions a model is measured by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dynmoe.data.base import TaskData
from dynmoe.data.protocol import IntArray
from dynmoe.data.text.batches import EvalBatches, TrainBatches, steps_per_epoch
from dynmoe.data.vl import chat
from dynmoe.data.vl.batches import (
    AskedQuestions,
    Conversations,
    ImageTransform,
    Questions,
    collate_conversations,
    collate_questions,
)
from dynmoe.data.vl.chat import tokenizer_of
from dynmoe.data.vl.content import Content
from dynmoe.data.vl.conversations import ConversationSource
from dynmoe.data.vl.store import TokenStore, tokenized
from dynmoe.errors import DataError
from dynmoe.questions.base import QuestionSet
from dynmoe.questions.registry import read

log = logging.getLogger(__name__)


class VisionLanguageData(TaskData):
    """Conversations to train on, and sets of questions to evaluate on, its ``env_names``.

    ``content()`` reads both (dynmoe/data/vl/content.py); ``benchmarks`` adds published sets:
    ``{name: folder}`` of ``questions.registry``. ``image_size``, ``patch_size``, ``mean`` and
    ``std`` are the vision tower's; ``fit`` makes an image square. ``template`` is how conversations
    are written for the language model in training, ``question_template`` how it is asked
    (dynmoe/data/vl/chat.py). Loaders give
    ``vl_examples.ConversationBatch`` and ``QuestionBatch``. ``root`` is not read here: it is where
    configurations have the folder that they give to ``content``.
    """

    modality = "vision-language"
    libraries = ("transformers", "tokenizers", "timm")

    def __init__(
        self,
        name: str,
        content: Callable[[], Content],
        image_size: int,
        patch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        template: str,
        question_template: str,
        batch_size: int,
        epochs: int,
        seed: int,
        fit: Literal["pad", "crop", "stretch"] = "pad",
        benchmarks: Mapping[str, str] | None = None,
        max_length: int = 2048,
        max_new_tokens: int = 16,
        eval_batch_size: int = 16,
        steps: int = -1,
        eval_every: int | None = None,
        accumulate: int = 1,
        examples: int = 4,
        tokenizer_path: str | None = None,
        tokenizer_name: str | None = None,
        cache: str | None = None,
        workers: int = 0,
        root: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.test_envs = [0]
        self.asked = AskedQuestions((image_size // patch_size) ** 2)
        self.tokenizer: PreTrainedTokenizerBase
        self._read_content = content
        self._transform = ImageTransform(image_size, mean, std, fit)
        self._template = template
        self._question_template = question_template
        self._batch_size = batch_size
        self._epochs = epochs
        self._seed = seed
        self._benchmarks = dict(benchmarks or {})
        self._max_length = max_length
        self._max_new_tokens = max_new_tokens
        self._eval_batch_size = eval_batch_size
        self._steps = steps
        self._eval_every = eval_every
        self._accumulate = accumulate
        self._examples = examples
        self._tokenizer_path = tokenizer_path
        self._tokenizer_name = tokenizer_name
        self._cache = cache
        self._workers = workers

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenizes; a second call does nothing. Warns of what is left out.

        With ``stage="validate"``, and of content without conversations, there are questions alone.

        Raises:
            DataError: the data cannot be trained or evaluated on.
            ConfigError: no such tokenizer, or one that the template does not fit; a set that is
                not scored here.
        """
        if not self.sets:
            self.setup_questions({})
            self.asked.refuse_unscored(self._benchmarks)
        if stage != "validate" and self._has_conversations:
            _ = self.store  # tokenized now

    def setup_questions(self, benchmarks: Mapping[str, str]) -> None:
        """In place of ``setup``, to answer questions alone: those of published sets, scored here or
        not, as ``{name: folder}``; of the run's own sets if there are none.

        Raises:
            DataError: questions that cannot be read.
            ConfigError: no such set or tokenizer, or one that the template does not fit.
        """
        named = self._tokenizer_path, self._tokenizer_name
        self.tokenizer = tokenizer_of(self.name, *named, self._content.words)
        own = {} if benchmarks else dict(self._content.sets)
        published = {
            name: read(name, root) for name, root in (benchmarks or self._benchmarks).items()
        }
        sets = {**own, **published}
        if not sets:
            raise DataError(
                f"data {self.name}: no questions to evaluate on, which stage align needs too. Name "
                "some with their folders: data.benchmarks={gqa: FOLDER, pope: FOLDER}"
            )
        self.asked.add(sets, self.tokenizer, self._question_template)

    @property
    def sets(self) -> Mapping[str, QuestionSet]:
        return self.asked.sets

    @cached_property
    def _content(self) -> Content:
        return self._read_content()

    @property
    def _has_conversations(self) -> bool:
        return self._content.train is not None

    @cached_property
    def store(self) -> TokenStore:
        """The conversations to train on.

        Raises:
            DataError: there are none.
        """
        store = tokenized(
            self._source,
            self.tokenizer,
            self._template,
            self.asked.image_tokens,
            self._max_length,
            None if self._cache is None else Path(self._cache),
        )
        if store.left_out:
            log.warning(
                "data %s: %d of %d conversations are left out: longer than data.max_length=%d "
                "before an answer begins",
                self.name,
                store.left_out,
                store.left_out + len(store),
                self._max_length,
            )
        return store

    @cached_property
    def _source(self) -> ConversationSource:
        if self._content.train is None:
            raise DataError(
                f"data {self.name}: has no conversations to train on, only questions. Choose other "
                "data, e.g. data=llava data.root=FOLDER"
            )
        return self._content.train()

    @property
    def env_names(self) -> list[str]:
        return list(self.sets)

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": chat.end_id(self.tokenizer, self._question_template),
        }

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "env_names": self.env_names,
            "decode": self.decode,
            "score": self.asked.score,
            "describe": self.asked.describe,
            "references": self.asked.references,
            "max_new_tokens": self._max_new_tokens,
            "examples": self._examples,
        }

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @property
    def sample(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """As long as the mean conversation, with one image."""
        answer = float(self._max_new_tokens)
        if self._has_conversations:
            answer = float(self.store.answer_tokens.mean())
        return sample_of(self.mean_tokens, answer, self.asked.image_tokens, self._transform.size)

    @property
    def mean_tokens(self) -> float:
        """Of conversations, or of questions if there are no others."""
        if self._has_conversations:
            return float(self.store.lengths.mean())
        return self.asked.mean_tokens

    @property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"train": len(self.store) if self._has_conversations else 0}
        return sizes | {name: len(each.questions) for name, each in self.sets.items()}

    @property
    def facts(self) -> dict[str, Any]:
        baseline = self._content.baseline
        return {
            "measure": "accuracy",
            "mean_tokens": self.mean_tokens,
            "samples_per_step": self._batch_size,
            "baseline": None if baseline is None else baseline(),
        }

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.store), self._batch_size)

    @property
    def steps(self) -> int:
        return self._steps if self._steps > 0 else self._epochs * self.steps_per_epoch

    @property
    def eval_every(self) -> int:
        return self._eval_every or self.steps

    def epoch_at(self, step: int) -> float:
        """Epochs that are over after 0-based optimizer step `step`."""
        return (step + 1) / self.steps_per_epoch

    @property
    def data_hash(self) -> str:
        digests = [self._source.digest] if self._has_conversations else []
        digests += [f"{name} {each.digest}" for name, each in self.sets.items()]
        return sha256("\n".join(digests).encode()).hexdigest()[:8]

    def print_check(self, console: Console | None = None) -> None:
        """Conversations and questions, their tokens and images."""
        store = self.store if self._has_conversations else None
        print_overview(f"{self.name}, data {self.data_hash}", store, self.asked, console)

    def train_dataloader(self) -> DataLoader[Any]:
        batches = TrainBatches(
            lengths=self.store.lengths,
            batch_size=self._batch_size,
            seed=self._seed,
            steps=self.steps,
            eval_every=self.eval_every,
            next_step=self._next_step,
            accumulate=self._accumulate,
            rank=self._rank,
            world_size=self._world_size,
            counts=self.store.answer_tokens,
            groups=(self.store.num_images > 0).astype(np.int64),
        )
        load = {"train": self._source.load_image}
        examples = Conversations({"train": self.store}, load, self._transform)
        return self._loader(examples, batches, collate_conversations(self._pad))

    def val_dataloader(self) -> DataLoader[Any]:
        self.asked.refuse_fewer_than(self._world_size)
        lengths = self.asked.lengths
        batches = EvalBatches(lengths, self._eval_batch_size, self._rank, self._world_size)
        examples = Questions(self.sets, self.asked.prompts, self._transform)
        return self._loader(examples, batches, collate_questions(self._pad))

    @property
    def _pad(self) -> int:
        pad: int = self.tokenizer.pad_token_id
        return pad

    def _loader(self, examples: Any, batches: Any, collate: Any) -> DataLoader[Any]:
        return DataLoader(
            examples,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self._workers,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            # A loader draws a base seed at each pass: not from the generator the model uses.
            generator=torch.Generator(),
        )


# What conversations and questions look like on the whole: a table, and a typical one.


def print_overview(
    title: str, store: TokenStore | None, asked: AskedQuestions, console: Console | None
) -> None:
    """Conversations, if there are any, and questions: their tokens and images."""
    table = Table(title=title)
    for column in ("", "rows", "with images", "mean tokens", "longest"):
        table.add_column(column, justify="right" if column else "left")
    rows: list[tuple[str, IntArray, IntArray]] = []
    if store is not None:
        rows.append(("train", store.num_images, store.lengths))
    for name, questions in asked.sets.items():
        images = np.array([len(question.images) for question in questions.questions])
        rows.append((name, images, asked.lengths[name]))
    for name, images, lengths in rows:
        table.add_row(
            name,
            str(len(lengths)),
            str(int((images > 0).sum())),
            f"{lengths.mean():.1f}",
            str(lengths.max()),
        )
    (console or Console()).print(table)


def sample_of(
    mean_tokens: float, answer_tokens: float, patches: int, px: int
) -> tuple[dict[str, Tensor], Tensor]:
    """A vision-language model's inputs for one conversation with one image of `patches` tokens."""
    length = max(patches + 1, round(mean_tokens))
    tokens = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "image_mask": torch.arange(length)[None] < patches,
        "images": torch.zeros(1, 3, px, px),
    }  # without a mask nothing depends on data
    return tokens, torch.zeros(max(1, round(answer_tokens)), dtype=torch.long)
