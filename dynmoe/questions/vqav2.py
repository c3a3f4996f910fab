"""VQAv2 (Goyal et al., CVPR 2017), read as visualqa.org publishes it.

v2_OpenEnded_mscoco_{val2014,test-dev2015,test2015}_questions.json
v2_mscoco_val2014_annotations.json      val2014/ or test2015/: COCO_val2014_000000262148.jpg
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynmoe.errors import DataError
from dynmoe.questions.base import FolderSet, Question, Unscored
from dynmoe.questions.files import (
    check_images,
    check_same,
    first_path,
    image_folder,
    locate,
    read_list,
)
from dynmoe.questions.predictions import MODEL, write_json
from dynmoe.questions.scores import accuracies
from dynmoe.questions.vqa_accuracy import (
    INSTRUCTION,
    check_humans,
    normalise_m4c,
    vqa_accuracy,
)

SOURCE = "https://visualqa.org/download.html"
SPLITS = ("val2014", "test-dev2015", "test2015")
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"


class Vqav2(FolderSet):
    """Records are the answers of ten humans.

    As in LLaVA's scripts/convert_vqav2_for_submission.py, answers pass `normalise_m4c` before they
    are scored or written.
    """

    def __init__(
        self,
        split: str,
        questions: Sequence[Question],
        humans: Sequence[Sequence[str]],
        images: Path,
        unasked: Iterable[int] = (),
    ) -> None:
        """`unasked` are further ids that the results file answers with nothing."""
        super().__init__("vqav2", questions, humans, images)
        self._split = split
        self._unasked = list(unasked)

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """VQA accuracies: "score" over all; kind_yes_no, kind_number, kind_other."""
        values = [
            vqa_accuracy(normalise_m4c(answer), humans) for _, humans, answer in self.pairs(answers)
        ]
        return accuracies(self.questions, values)

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The results file that vqaEvalDemo.py and the server take: question_id, answer."""
        rows = [
            {"question_id": int(question.id), "answer": normalise_m4c(answer)}
            for question, _, answer in self.pairs(answers)
        ]
        name = f"v2_OpenEnded_mscoco_{self._split}_{MODEL}_results.json"
        rows += [{"question_id": id, "answer": ""} for id in self._unasked]
        return [write_json(folder / name, rows)]


class Vqav2Test(Unscored, Vqav2):
    """Test questions; records are empty."""

    note = (
        "The answers are not public: "
        "eval.ai/web/challenges/challenge-page/830 scores the results file."
    )


def read_vqav2(root: str, images: str | None = None) -> Vqav2:
    """The first split of val2014, test-dev2015 and test2015 whose questions are in the folder.

    `root` may also be the file of questions itself, its annotations beside it. val2014 is scored,
    the test splits are only exported. `images` is the folder of COCO's files of that split; else
    it is `val2014` or `test2015` below the folder.

    Raises:
        DataError: files are missing or damaged, or questions and answers are not the same.
    """
    folder, split = _find(Path(root))
    scored = not split.startswith("test")
    image_split = split if scored else "test2015"
    wanted: dict[str, Sequence[str]] = {"questions": [QUESTIONS.format(split)]}
    if scored:
        wanted["annotations"] = [ANNOTATIONS.format(split)]
    wanted |= image_folder(images, image_split, f"images/{image_split}")
    paths = locate("VQAv2", folder, wanted, SOURCE)
    rows = read_list(paths["questions"], ("question_id", "image_id", "question"), "questions")
    annotations = _annotations(paths["annotations"], rows) if scored else {}
    questions = [
        Question(
            id=str(row["question_id"]),
            text=row["question"] + INSTRUCTION,
            images=(f"COCO_{image_split}_{row['image_id']:012d}.jpg",),
            kind=annotations[row["question_id"]]["answer_type"] if scored else "",
        )
        for row in rows
    ]
    check_images("VQAv2", paths["images"], (question.images[0] for question in questions))
    if scored:
        humans = [
            [answer["answer"] for answer in annotations[row["question_id"]]["answers"]]
            for row in rows
        ]
        return Vqav2(split, questions, humans, paths["images"])
    # The server takes a file of all test questions, and scores those of test-dev.
    unasked = sorted(_all_test_ids(folder) - {row["question_id"] for row in rows})
    return Vqav2Test(split, questions, [[]] * len(rows), paths["images"], unasked)


def _find(root: Path) -> tuple[Path, str]:
    """The folder and the split; val2014 where there are no questions, so that they are missed."""
    if not root.is_file():
        there = (split for split in SPLITS if (root / QUESTIONS.format(split)).is_file())
        return root, next(there, SPLITS[0])
    named = [split for split in SPLITS if QUESTIONS.format(split) == root.name]
    if not named:
        names = ", ".join(map(QUESTIONS.format, SPLITS))
        raise DataError(f"VQAv2: expected one of {names}, found {root}.")
    return root.parent, named[0]


def _annotations(path: Path, questions: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    rows = read_list(path, ("question_id", "answer_type", "answers"), "annotations")
    check_same(
        path, (row["question_id"] for row in rows), (row["question_id"] for row in questions)
    )
    check_humans(path, rows)
    return {row["question_id"]: row for row in rows}


def _all_test_ids(folder: Path) -> set[int]:
    path = first_path(folder, [QUESTIONS.format("test2015")])
    if path is None:
        return set()
    return {row["question_id"] for row in read_list(path, ("question_id",), "questions")}
