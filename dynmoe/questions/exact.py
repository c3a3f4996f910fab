"""Question sets whose answers are right or wrong: sets made in memory, and GQA.

GQA (Hudson & Manning, CVPR 2019), its balanced test-dev questions. An entry, made up:

    "20100": {"question": "Is it cloudy?", "imageId": "n161313", "answer": "yes",
              "types": {"structural": "verify", ...}, ...}

The prompt is "Is it cloudy?\\nAnswer the question using a single word or phrase.". The rules are
those of GQA's eval.py; LLaVA's scripts/convert_gqa_for_eval.py makes the prediction file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dynmoe.errors import DataError
from dynmoe.questions.base import (
    ANSWER_TOKENS,
    FolderSet,
    Question,
    QuestionSet,
    accuracies,
    write_json,
    write_lines,
)
from dynmoe.questions.files import Fields, check_fields, image_folder, locate, read_object
from dynmoe.questions.vqa import INSTRUCTION

if TYPE_CHECKING:
    import PIL.Image


class ExactMatch(QuestionSet):
    """Answers [Q] to questions [Q]; case, outer white space and a final full stop do not count."""

    def __init__(
        self,
        name: str,
        questions: Sequence[Question],
        answers: Sequence[str],
        load_image: Callable[[str], PIL.Image.Image],
        answer_tokens: int = ANSWER_TOKENS,
        image_path: Callable[[str], Path] | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        """`left_out` counts what the set's file holds and the set does not, by what it is."""
        super().__init__(name, questions, answers)
        self._load_image = load_image
        self.answer_tokens = answer_tokens
        self._image_path = image_path
        self.left_out = dict(left_out or {})

    def load_image(self, key: str) -> PIL.Image.Image:
        return self._load_image(key)

    def image_path(self, key: str) -> Path | None:
        return None if self._image_path is None else self._image_path(key)

    def without_images(self, keys: Collection[str]) -> ExactMatch:
        """The questions that show none of these images.

        Raises:
            DataError: there are none.
        """
        rows = [row for row, each in enumerate(self.questions) if not set(keys) & set(each.images)]
        questions = [self.questions[row] for row in rows]
        return self._of(self.name, questions, [self.records[row] for row in rows])

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Shares of right answers: "score" over all and "kind_<kind>" for each kind."""
        right = [float(_plain(answer) == _plain(own)) for _, own, answer in self.pairs(answers)]
        return accuracies(self.questions, right)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """`<name>.jsonl`: question_id, prompt, text (the model's), answer (the right one)."""
        rows = (
            {"question_id": question.id, "prompt": question.text, "text": answer, "answer": own}
            for question, own, answer in self.pairs(answers)
        )
        return [write_lines(folder / f"{self.name}.jsonl", rows)]

    def with_other_images(self) -> ExactMatch:
        """The same questions and answers; each image is replaced by the next other one of the set.

        The other image may have the same answer: such a question shows nothing. A model that uses
        images scores no better on this set than from the text alone.

        Raises:
            DataError: the set has a single image, or none.
        """
        images = list(dict.fromkeys(each.images for each in self.questions if each.images))
        if len(images) < 2:
            raise DataError(f"{self.name}: expected two images or more, found {len(images)}.")
        following = dict(zip(images, images[1:] + images[:1], strict=True)) | {(): ()}
        questions = [replace(each, images=following[each.images]) for each in self.questions]
        return self._of(f"{self.name}_shuffled", questions, self.records)

    def spread(self, number: int | None) -> ExactMatch:
        """`number` of the questions, evenly spread; None, or as many as there are: all."""
        total = len(self.questions)
        if number is None or number >= total:
            return self
        rows = [index * total // number for index in range(number)]
        questions = [self.questions[row] for row in rows]
        return self._of(self.name, questions, [self.records[row] for row in rows])

    def _of(self, name: str, questions: Sequence[Question], answers: Sequence[str]) -> ExactMatch:
        own = self._load_image, self.answer_tokens, self._image_path, self.left_out
        return ExactMatch(name, questions, answers, *own)


def _plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").rstrip()


SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = "testdev_balanced_questions.json"
PREDICTIONS = "testdev_balanced_predictions.json"
FIELDS: Fields = {"question": "text", "imageId": "id", "answer": "text", "types": "object"}
FOLDERS = ("", "data/", "questions1.2/", "questions/", "data/questions1.2/")


class Gqa(FolderSet):
    """Records are the right answers; a question's kind is its structural type."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracies of eval.py: "score" over all, "kind_<kind>" for each structural type."""
        right = [float(_plain_gqa(answer) == own) for _, own, answer in self.pairs(answers)]
        return accuracies(self.questions, right)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The predictions that `eval.py --tier testdev_balanced` reads."""
        rows = [
            {"questionId": question.id, "prediction": _plain_gqa(answer)}
            for question, _, answer in self.pairs(answers)
        ]
        return [write_json(folder / PREDICTIONS, rows)]


def _plain_gqa(answer: str) -> str:
    """The answer as LLaVA's convert_gqa_for_eval.py writes it."""
    return answer.rstrip(".").lower()


def read_gqa(root: str, images: str | None = None) -> Gqa:
    """The questions below `root`; `images` is the folder of n161313.jpg, else `images` there."""
    wanted = {"questions": [f"{folder}{QUESTIONS}" for folder in FOLDERS]}
    paths = locate("GQA", root, wanted | image_folder(images, "images", "data/images"), SOURCE)
    rows = read_object(paths["questions"], FIELDS)
    check_fields(
        paths["questions"],
        ((f"types of {id}", row["types"]) for id, row in rows.items()),
        {"structural": "text"},
    )
    questions = [
        Question(
            id,
            row["question"] + INSTRUCTION,
            (f"{row['imageId']}.jpg",),
            row["types"]["structural"],
        )
        for id, row in rows.items()
    ]
    return Gqa("gqa", questions, [row["answer"] for row in rows.values()], paths["images"])
