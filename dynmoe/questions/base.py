"""Question sets: their questions, their scores and the files that official evaluators read."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dynmoe.errors import DataError
from dynmoe.questions.files import check_images, counted, load_image

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")

ANSWER_TOKENS = 128
"""Tokens of an answer at most (llava/eval/model_vqa_loader.py), if a set does not say otherwise."""


@dataclass(frozen=True)
class Question:
    """One prompt. `text` is all that the model is asked, with the set's instruction at its end.

    `images` are keys for the set's `load_image`, () for text only. `kind` groups questions for
    scores by kind, "" if there are no groups.
    """

    id: str
    text: str
    images: tuple[str, ...] = ()
    kind: str = ""


class QuestionSet(ABC):
    """Questions with the evaluator's record of each.

    `records` [Q] are JSON values: right answers, columns of the prediction file.
    `is_scored` is False where an evaluation server or a judge scores the prediction files; `note`
    then says so in one sentence. An answer has at most `answer_tokens` tokens.
    """

    is_scored: bool = True
    note: str = ""
    answer_tokens: int = ANSWER_TOKENS

    def __init__(self, name: str, questions: Sequence[Question], records: Sequence[Any]) -> None:
        if not questions:
            raise DataError(f"{name}: no questions.")
        if len(questions) != len(records):
            raise ValueError(f"{name}: {len(records)} records of {len(questions)} questions")
        counts = Counter(question.id for question in questions)
        twice = [id for id, count in counts.items() if count > 1]
        if twice:
            raise DataError(
                f"{name}: several questions share an id {counted(twice)}. Each needs its own."
            )
        self.name = name
        self.questions = list(questions)
        self.records = list(records)

    @abstractmethod
    def load_image(self, key: str) -> PIL.Image.Image:
        """The image of a key, RGB.

        Raises:
            DataError: it cannot be read.
        """

    def image_path(self, key: str) -> Path | None:
        """The file of an image; None where images are not files."""
        return None

    @abstractmethod
    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Scores of `answers` [Q]; "score" is the headline, in [0, 1].

        Raises:
            DataError: the set is not scored here.
        """

    @abstractmethod
    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """Write `answers` [Q] into `folder` as the official evaluator reads them."""

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits of questions and records, not of the images' pixels."""
        content = [self.name, [astuple(question) for question in self.questions], self.records]
        return sha256(json.dumps(content).encode()).hexdigest()[:16]

    def pairs(self, answers: Sequence[str]) -> Iterator[tuple[Question, Any, str]]:
        """Question, record and answer, stripped as LLaVA strips what a model generates."""
        if len(answers) != len(self.questions):
            raise ValueError(
                f"{self.name}: {len(answers)} answers to {len(self.questions)} questions"
            )
        for question, record, answer in zip(self.questions, self.records, answers, strict=True):
            yield question, record, answer.strip()


class FolderSet(QuestionSet):
    """A set whose images are files; keys are paths below `images`.

    Raises:
        DataError: an image is not there.
    """

    def __init__(
        self, name: str, questions: Sequence[Question], records: Sequence[Any], images: Path
    ) -> None:
        super().__init__(name, questions, records)
        check_images(name, images, (key for question in questions for key in question.images))
        self._images = images

    def load_image(self, key: str) -> PIL.Image.Image:
        return load_image(self._images / key)

    def image_path(self, key: str) -> Path:
        return self._images / key


class Unscored(QuestionSet):
    """A set that is only exported; `note` says who scores it."""

    is_scored = False

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        raise DataError(f"{self.name} has no local score. {self.note}")


# Means over all questions and over each kind.


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def by_kind(questions: Sequence[Question], values: Iterable[T]) -> dict[str, list[T]]:
    """The `values` [Q] of each kind of question, kinds in the order of their first question."""
    found: dict[str, list[T]] = {}
    for question, value in zip(questions, values, strict=True):
        found.setdefault(question.kind, []).append(value)
    return found


def accuracies(questions: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """Means of `values` [Q]: "score" over all, "kind_<kind>" for each kind (kind_yes_no)."""
    scores = {"score": mean(values)}
    for kind, own in sorted(by_kind(questions, values).items()):
        if kind:
            scores[f"kind_{re.sub(r'[^a-z0-9]+', '_', kind.lower())}"] = mean(own)
    return scores


# Writing prediction files, and the one that LLaVA's evaluation scripts share.

MODEL = "dynmoe"
"""Name of the model in prediction files."""


def write_json(file: Path, content: Any, indent: int | None = None) -> Path:
    return write_text(file, json.dumps(content, ensure_ascii=False, indent=indent))


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    return write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", newline="\n")
    return file


def answer_row(question_id: Any, prompt: str, text: str) -> dict[str, Any]:
    """A line of LLaVA's answers file, as llava/eval/model_vqa.py writes it."""
    return {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": str(question_id),  # any string; LLaVA's is random
        "model_id": MODEL,
        "metadata": {},
    }
