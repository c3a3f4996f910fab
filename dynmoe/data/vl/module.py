"""VisionLanguageData: conversations about images, and the questions a model is measured by."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dynmoe.data.text.batches import EpochDraw, EvalBatches, Key, MixedDraw, steps_per_epoch
from dynmoe.data.text.tokens import vocabulary_size
from dynmoe.data.text.vocabulary import VocabularyData
from dynmoe.data.vl import chat
from dynmoe.data.vl.batches import (
    AskedQuestions,
    Conversations,
    ImageTransform,
    Questions,
    collate_conversations,
    collate_questions,
)
from dynmoe.data.vl.chat import CONVERSATIONS, conversation_tokenizer
from dynmoe.data.vl.content import Content, trained_on
from dynmoe.data.vl.conversations import Conversation, ConversationSource
from dynmoe.data.vl.image_index import ImageKeys
from dynmoe.data.vl.store import TokenStore, tokenized
from dynmoe.errors import ConfigError, DataError
from dynmoe.image_files import PathsOf, remarks, survey, unreadable
from dynmoe.passes import shown
from dynmoe.questions import read_question_set
from dynmoe.questions.base import Question, QuestionSet
from dynmoe.questions.exact import ExactMatch
from dynmoe.seeding import IntArray

log = logging.getLogger(__name__)

VOCABULARY = 8192
"""Words of a tokenizer made from the data; rarer ones are unknown."""

BAD = "that are missing or cannot be read"


@dataclass(eq=False, kw_only=True)
class VisionLanguageData(VocabularyData):
    """Conversations to train on, and sets of questions to evaluate on, its `env_names`.

    Loaders give `ConversationBatch` and `QuestionBatch`.
    """

    modality = "vision-language"
    special = CONVERSATIONS
    libraries = ("transformers", "tokenizers", "timm")

    name: str
    """Name of the data set: the protocol's recipe is chosen by it."""
    content: Callable[[], Content]
    """Reads conversations and questions (data/vl/content.py)."""
    root: str | None = None
    """Folder that configurations pass on to `content`; not read here."""
    question_sets: Mapping[str, str] = field(default_factory=dict)
    """Published sets to evaluate on: {name in `questions.SETS`: folder}."""
    image_size: int
    """Pixels of the vision tower's square images."""
    patch_size: int
    """Pixels of the side of a patch, which is a token."""
    mean: tuple[float, float, float]
    """Mean of each channel of pixels in [0, 1], for the vision tower's normalisation."""
    std: tuple[float, float, float]
    """Standard deviation of each channel, likewise."""
    fit: Literal["pad", "crop", "stretch"] = "pad"
    """How an image becomes square: see `ImageTransform`."""
    template: str
    """How conversations are written in training (data/vl/chat.py)."""
    question_template: str
    """How questions are written."""
    max_length: int = 2048
    """Tokens of a conversation at most, patches of its images included."""
    max_new_tokens: int | None = None
    """Tokens of an answer at most; None: `QuestionSet.answer_tokens` of each set."""
    batch_size: int
    """Conversations per optimizer step."""
    eval_batch_size: int = 16
    """Questions answered at once."""
    examples: int = 4
    """Questions whose answers are recorded token by token, with their experts."""
    tokenizer_path: str | None = None
    """Local folder of a tokenizer."""
    tokenizer_name: str | None = None
    """Name of a tokenizer on the hub; without path and name: the words of the data."""
    verify: Literal["header", "decode", "none"] = "header"
    """Before training, read of every image file: its header, all of it, or nothing."""
    skip_invalid: bool = False
    """Decode every image file before training, and leave out conversations and questions of one's
    own whose image is missing or cannot be read, and entries that break a rule."""
    cache: str | None = None
    """Folder of tokenized conversations and of findings about image files, shared by all runs;
    None: none."""
    workers: int = 0
    """Loader processes per device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.test_envs = [0]
        self.asked = AskedQuestions((self.image_size // self.patch_size) ** 2)
        self.tokenizer: PreTrainedTokenizerBase
        self._transform = ImageTransform(self.image_size, self.mean, self.std, self.fit)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenize; a second call does nothing. Warns of conversations that are left out.

        With `stage="validate"`, or if the content has no conversations, only questions are read.

        Raises:
            DataError: the data cannot be trained or evaluated on.
            ConfigError: no such tokenizer, or one that the template does not fit; a set that is
                not scored here.
        """
        if not self.sets:
            self.setup_questions({})
            for name, questions in self.sets.items():
                if not questions.is_scored:
                    raise ConfigError(
                        f"data.question_sets: {name} has no local score. Leave it out; answer it "
                        f"after training: dynmoe-eval run=FOLDER mode=answer question_sets.{name}="
                        f"{self.question_sets.get(name, 'FOLDER')}"
                    )
        if stage != "validate" and self._has_conversations:
            _ = self.stores  # tokenized now
            self._warn_of_questions_trained_on()

    def _warn_of_questions_trained_on(self) -> None:
        """Only the data's own reported set is looked at: others have images in other folders."""
        for name in [*self._content.sets][:1]:
            questions = self.sets[name]
            if not isinstance(questions, ExactMatch):
                continue
            if count := sum(trained_on(questions, each) for each in self._sources.values()):
                log.warning(
                    "data %s: %s: %d of %d questions are in the training data too, with the same "
                    "image and answer",
                    *(self.name, name, count, len(questions.questions)),
                )

    def setup_questions(self, folders: Mapping[str, str]) -> None:
        """Read questions alone, to answer them: `setup` without training.

        `folders` are those of published sets, scored here or not: {name: folder}; without any, the
        run's own sets are read.

        Raises:
            DataError: questions that cannot be read.
            ConfigError: no such set or tokenizer, or one that the template does not fit.
        """
        self.tokenizer = self.made_tokenizer(self._words)
        own = {} if folders else dict(self._content.sets)
        published = {
            name: read_question_set(name, root)
            for name, root in (folders or self.question_sets).items()
        }
        own = {name: self._with_good_images(name, each) for name, each in own.items()}
        for name, each in published.items():
            keys = list(_keys(each.questions))
            self._check_images(name, keys, each.image_path)
            if self.verify == "decode":
                for key in keys:
                    if each.image_path(key) is None:  # within the set's own table
                        each.load_image(key)
        sets = {**own, **published}
        if not sets:
            raise DataError(
                f"data {self.name}: no questions to evaluate on, which stage align needs too. Name "
                "some with their folders: data.question_sets={gqa: FOLDER, pope: FOLDER}"
            )
        self.asked.add(sets, self.tokenizer, self.question_template)

    def _words(self) -> Iterable[str]:
        if self._content.words is None:
            raise ConfigError(
                f"backbone: {self.name} has no vocabulary. Give a language model with a tokenizer: "
                "backbone.model=NAME or backbone.path=FOLDER"
            )
        return self._content.words()

    def learnt(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        return conversation_tokenizer(texts, VOCABULARY)

    @property
    def sets(self) -> Mapping[str, QuestionSet]:
        return self.asked.sets

    @cached_property
    def _content(self) -> Content:
        return self.content()

    @property
    def _has_conversations(self) -> bool:
        return self._content.train is not None

    @cached_property
    def stores(self) -> dict[str, TokenStore]:
        """The conversations to train on, by source; without a mixture all are `train`.

        Raises:
            DataError: there are none.
        """
        return {name: self._tokenized(each) for name, each in self._sources.items()}

    def _tokenized(self, source: ConversationSource) -> TokenStore:
        store = tokenized(
            source,
            self.tokenizer,
            self.template,
            self.asked.image_tokens,
            self.max_length,
            None if self.cache is None else Path(self.cache),
        )
        of = f" of {source.name}" if self._plan.by_source else ""
        if store.left_out:
            what = (
                f"conversations{of} longer than data.max_length={self.max_length} before an answer"
            )
            self.leave_out(what, store.left_out)
        if store.controls:
            log.warning(
                "data %s: %d conversations%s have control tokens in what is said, like </s>; a "
                "space in each makes them text",
                self.name,
                store.controls,
                of,
            )
        return store

    @property
    def lengths(self) -> IntArray:
        """Tokens of the conversations to train on."""
        return np.concatenate([each.lengths for each in self.stores.values()])

    @cached_property
    def _sources(self) -> dict[str, ConversationSource]:
        if self._content.train is None:
            raise DataError(
                f"data {self.name}: has no conversations to train on, only questions. Choose other "
                "data, e.g. data=llava data.root=FOLDER"
            )
        if self._plan.by_source and self._content.sources:
            read = {name: make() for name, make in sorted(self._content.sources.items())}
        else:
            read = {"train": self._content.train()}
        return {name: self._with_good_conversations(name, each) for name, each in read.items()}

    def _with_good_conversations(self, name: str, source: ConversationSource) -> ConversationSource:
        of = "" if name == "train" else f"{name}: "
        for what, count in source.left_out.items():
            self.leave_out(f"{of}{what}", count)
        if source.image_path is None:
            return source
        keys = _keys(source) if source.keys is None else source.keys
        bad = self._check_images(name, keys, source.image_path, self.skip_invalid)
        if bad:
            every = shown(source, f"conversations of {name} read again")
            needed = sum(not bad.isdisjoint(each.images) for each in every)
            self.leave_out(f"{of}conversations with images {BAD}", needed)
            source = source.without_images(bad)
        return source

    def _with_good_images(self, name: str, questions: QuestionSet) -> QuestionSet:
        if not isinstance(questions, ExactMatch):
            return questions
        for what, count in questions.left_out.items():
            self.leave_out(f"{name}: {what}", count)
        keys = _keys(questions.questions)
        bad = self._check_images(name, keys, questions.image_path, self.skip_invalid)
        if bad:
            kept = questions.without_images(bad)
            count = len(questions.questions) - len(kept.questions)
            self.leave_out(f"{name}: questions with images {BAD}", count)
            questions = kept
        return questions

    def _check_images(
        self,
        name: str,
        keys: Iterable[str],
        image_path: Callable[[str], Path | None],
        skip: bool = False,
    ) -> frozenset[str]:
        """Keys of the images that are not to be shown.

        Raises:
            DataError: there are any, and they are not to be skipped.
        """
        if self.verify == "none" and not skip:
            return frozenset()
        if not isinstance(keys, ImageKeys):
            keys = [key for key in dict.fromkeys(keys) if image_path(key) is not None]
        files = PathsOf(keys, image_path)
        decode = self.verify == "decode" or skip
        kept = None if self.cache is None or self.verify == "decode" else Path(self.cache)
        found = survey(files, decode=decode, what=f"images of {name}", kept=kept)
        for text in remarks([found]):
            log.warning("data %s, %s: %s", self.name, name, text)
        if found.bad and not skip:
            problem = unreadable({files[place]: reason for place, reason in found.bad.items()})
            raise DataError(f"data {self.name}, {name}: {problem}")
        return frozenset(keys[place] for place in found.bad)

    @property
    def env_names(self) -> list[str]:
        return list(self.sets)

    @property
    def class_names(self) -> list[str]:
        return []

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        return {
            "vocab_size": vocabulary_size(self.tokenizer),
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": chat.end_id(self.tokenizer, self.question_template),
        }

    def check_backbone(self, backbone: Any) -> None:
        for name, most in self.answer_tokens.items():
            backbone.check_length(self.max_length, int(self.asked.lengths[name].max()), most)

    @property
    def answer_tokens(self) -> dict[str, int]:
        """Tokens of an answer at most, by set."""
        own = {name: each.answer_tokens for name, each in self.sets.items()}
        return own if self.max_new_tokens is None else dict.fromkeys(own, self.max_new_tokens)

    @property
    def task_arguments(self) -> dict[str, Any]:
        return {
            "env_names": self.env_names,
            "decode": self.decode,
            "score": self.asked.score,
            "describe": self.asked.describe,
            "references": self.asked.references,
            "max_new_tokens": self.answer_tokens,
            "examples": self.examples,
        }

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    @property
    def sample(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Has the length of the mean conversation, and one image."""
        answer = float(max(self.answer_tokens.values()))
        if self._has_conversations:
            counts = [each.answer_tokens for each in self.stores.values()]
            answer = float(np.concatenate(counts).mean())
        return sample_of(self.mean_tokens, answer, self.asked.image_tokens, self._transform.size)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of conversations; of questions if there are no conversations."""
        if self._has_conversations:
            return float(self.lengths.mean())
        return self.asked.mean_tokens

    @property
    def sizes(self) -> dict[str, Any]:
        sizes: dict[str, Any] = {"train": len(self.lengths) if self._has_conversations else 0}
        return sizes | {name: len(each.questions) for name, each in self.sets.items()}

    @property
    def facts(self) -> dict[str, Any]:
        baseline = self._content.baseline
        return {
            "measure": "accuracy",
            "mean_tokens": self.mean_tokens,
            "samples_per_step": self.batch_size,
            "baseline": None if baseline is None else baseline(),
        }

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.lengths), self.batch_size)

    @property
    def eval_every(self) -> int:
        """Optimizer steps between two evaluations: those of the plan, else once, at the end."""
        return self._plan.eval_every or self.steps

    @property
    def data_hash(self) -> str:
        digests = (
            [each.digest for each in self._sources.values()] if self._has_conversations else []
        )
        digests += [f"{name} {each.digest}" for name, each in self.sets.items()]
        return sha256("\n".join(digests).encode()).hexdigest()[:8]

    def print_check(self, console: Console | None = None) -> None:
        """Print a table of conversations, if there are any, and questions: tokens and images."""
        table = Table(title=f"{self.name}, data {self.data_hash}")
        for column in ("", "rows", "with images", "mean tokens", "longest"):
            table.add_column(column, justify="right" if column else "left")
        rows: list[tuple[str, IntArray, IntArray]] = []
        if self._has_conversations:
            rows += [(name, each.num_images, each.lengths) for name, each in self.stores.items()]
        for name, questions in self.sets.items():
            images = np.array([len(question.images) for question in questions.questions])
            rows.append((name, images, self.asked.lengths[name]))
        for name, images, lengths in rows:
            numbers = len(lengths), int((images > 0).sum()), f"{lengths.mean():.1f}", lengths.max()
            table.add_row(name, *map(str, numbers))
        (console or Console()).print(table)

    def train_dataloader(self) -> Any:
        if self.mixture is None:
            (store,) = self.stores.values()
            draw: Any = EpochDraw(
                store.lengths,
                self.batch_size,
                self.plan.seed,
                counts=store.answer_tokens,
                groups=(store.num_images > 0).astype(np.int64),
            )
        else:
            counts = {name: each.answer_tokens for name, each in self.stores.items()}
            sets = {name: name for name in self.stores}
            draw = MixedDraw(self.mixture, self._train_rows, self.plan.seed, sets, counts)
        batches = self._step_batches(draw)
        examples, collate = self._probed()
        return self._in_windows(self._loader(examples, batches, collate, self.workers), batches)

    def sources(self) -> dict[str, tuple[IntArray, IntArray | None]]:
        """The conversations by where they are from: files, or kinds."""
        return {name: (np.arange(len(each)), each.lengths) for name, each in self.stores.items()}

    def _probed(self) -> tuple[Conversations, Callable[[Any], Any]]:
        load = {name: each.load_image for name, each in self._sources.items()}
        examples = Conversations(self.stores, load, self._transform)
        return examples, partial(collate_conversations, self.tokenizer.pad_token_id)

    def _probe_keys(self, source: str, rows: IntArray) -> list[Key]:
        return [Key(source, row) for row in rows.tolist()]

    def val_dataloader(self) -> DataLoader[Any]:
        for name, questions in self.sets.items():
            # NOTE: a device without a question would be waited for by the others.
            if (found := len(questions.questions)) < self._world_size:
                raise DataError(
                    f"{name}: expected a question for each of the {self._world_size} devices or "
                    f"more, found {found}. Evaluate on fewer devices (trainer.devices={found}), or "
                    "leave the set out."
                )
        lengths = self.asked.lengths
        batches = EvalBatches(lengths, self.eval_batch_size, self._rank, self._world_size)
        examples = Questions(self.sets, self.asked.prompts, self._transform)
        collate = partial(collate_questions, self.tokenizer.pad_token_id)
        return self._loader(examples, batches, collate, self.workers)


def _keys(shown: Iterable[Question | Conversation]) -> Iterator[str]:
    return (key for each in shown for key in each.images)


def sample_of(
    mean_tokens: float, answer_tokens: float, patches: int, px: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return a model's inputs for one conversation with one image of `patches` tokens."""
    length = max(patches + 1, round(mean_tokens))
    tokens = {
        "input_ids": torch.zeros(1, length, dtype=torch.long),
        "image_mask": torch.arange(length)[None] < patches,
        "images": torch.zeros(1, 3, px, px),
    }  # without a mask nothing depends on data
    return tokens, torch.zeros(max(1, round(answer_tokens)), dtype=torch.long)
