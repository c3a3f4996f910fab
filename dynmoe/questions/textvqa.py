"""TextVQA (Singh et al., CVPR 2019), its validation set as LLaVA-1.5 evaluates it.

TextVQA_0.5.1_val.json      train_images/003a8ae2ef43b901.jpg
llava_textvqa_val_v051_ocr.jsonl      LLaVA's questions with the words an OCR system read
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmoe.questions.base import FolderSet, Question
from dynmoe.questions.files import (
    check_images,
    check_same,
    first_path,
    image_folder,
    locate,
    read_lines,
    read_list,
)
from dynmoe.questions.predictions import answer_row, write_lines
from dynmoe.questions.scores import mean
from dynmoe.questions.vqa_accuracy import INSTRUCTION, check_humans, textvqa_accuracy

SOURCE = "https://textvqa.org/dataset"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
WITH_OCR = "llava_textvqa_val_v051_ocr.jsonl"


class TextVqa(FolderSet):
    """Records are the image's id and the answers of ten humans."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """VQA accuracy by LLaVA's m4c_evaluator.py, as "score"."""
        return {
            "score": mean(
                [textvqa_accuracy(answer, humans) for _, (_, humans), answer in self.pairs(answers)]
            )
        }

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """What LLaVA's eval_textvqa.py reads; it finds a question by image and prompt."""
        rows = (
            answer_row(image, question.text, answer)
            for question, (image, _), answer in self.pairs(answers)
        )
        return [write_lines(folder / "textvqa_answers.jsonl", rows)]


def read_textvqa(root: str, images: str | None = None) -> TextVqa:
    """The validation set below `root`; `images` is the folder of the images, else `train_images`.

    Where LLaVA's file of questions is there too, its texts are asked, with their OCR words. Else
    the bare questions are, with a capital letter at the beginning as LLaVA's have.

    Raises:
        DataError: files are missing or damaged, or LLaVA's questions are others.
    """
    wanted = {"annotations": [ANNOTATIONS]}
    defaults = image_folder(images, "train_images", "train_val_images/train_images")
    paths = locate("TextVQA", root, wanted | defaults, SOURCE)
    rows = read_list(
        paths["annotations"], ("question_id", "image_id", "question", "answers"), "data"
    )
    check_humans(paths["annotations"], rows)
    ocr = first_path(root, [WITH_OCR])
    texts = {} if ocr is None else _texts(ocr, rows)
    questions = [
        Question(
            id=str(row["question_id"]),
            text=texts.get(_key(row), row["question"].capitalize() + INSTRUCTION),
            images=(f"{row['image_id']}.jpg",),
        )
        for row in rows
    ]
    check_images("TextVQA", paths["images"], (question.images[0] for question in questions))
    records = [(row["image_id"], row["answers"]) for row in rows]
    return TextVqa("textvqa", questions, records, paths["images"])


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["image_id"], row["question"].lower()


def _texts(path: Path, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """LLaVA's text of each question, found as eval_textvqa.py finds it: by image and first line."""
    texts = {
        (row["question_id"], row["text"].split("\n")[0].lower()): row["text"]
        for row in read_lines(path, ("question_id", "text"))
    }
    check_same(path, texts, map(_key, rows))
    return texts
