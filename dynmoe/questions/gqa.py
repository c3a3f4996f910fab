"""GQA (Hudson & Manning, CVPR 2019): the balanced test-dev questions and their eval.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynmoe.questions.base import FolderSet, Question
from dynmoe.questions.files import check_images, image_folder, locate, read_object
from dynmoe.questions.predictions import write_json
from dynmoe.questions.scores import accuracies
from dynmoe.questions.vqa_accuracy import INSTRUCTION

SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
QUESTIONS = "testdev_balanced_questions.json"
PREDICTIONS = "testdev_balanced_predictions.json"
FOLDERS = ("", "data/", "questions1.2/", "questions/", "data/questions1.2/")


class Gqa(FolderSet):
    """Records are the right answers; a question's kind is its structural type."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracies of eval.py: "score" over all, "kind_<kind>" for each structural type."""
        right = [float(_plain(answer) == own) for _, own, answer in self.pairs(answers)]
        return accuracies(self.questions, right)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """What `eval.py --tier testdev_balanced` reads."""
        rows = [
            {"questionId": question.id, "prediction": _plain(answer)}
            for question, _, answer in self.pairs(answers)
        ]
        return [write_json(folder / PREDICTIONS, rows)]


def _plain(answer: str) -> str:
    """LLaVA's scripts/convert_gqa_for_eval.py."""
    return answer.rstrip(".").lower()


def read_gqa(root: str, images: str | None = None) -> Gqa:
    """The questions below `root`; `images` is the folder of n161313.jpg, else `images` there.

    Raises:
        DataError: files are missing or damaged.
    """
    wanted = {"questions": [f"{folder}{QUESTIONS}" for folder in FOLDERS]}
    paths = locate("GQA", root, wanted | image_folder(images, "images", "data/images"), SOURCE)
    rows = read_object(paths["questions"], ("question", "imageId", "answer", "types"))
    questions = [
        Question(
            id,
            row["question"] + INSTRUCTION,
            (f"{row['imageId']}.jpg",),
            row["types"]["structural"],
        )
        for id, row in rows.items()
    ]
    check_images("GQA", paths["images"], (question.images[0] for question in questions))
    return Gqa("gqa", questions, [row["answer"] for row in rows.values()], paths["images"])
