"""Question sets answered by yes or no: POPE and MME.

POPE (Li et al., EMNLP 2023): is there a certain object in the image?

    coco_pope_{adversarial,popular,random}.json      val2014/COCO_val2014_000000310196.jpg

A line, made up:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
     "text": "Is there a snowboard in the image?", "label": "yes"}

The prompt is "Is there a snowboard in the image?\\nAnswer the question using a single word or
phrase.". The rules are those of evaluate.py of AoiDragon/POPE, which LLaVA's eval_pope.py repeats.

MME (Fu et al., arXiv 2306.13394): two questions, yes or no, about every image of 14 tasks.

    <task>/0020.png and <task>/0020.txt, or
    <task>/images/0020.png and <task>/questions_answers_YN/0020.txt

Each text has two lines: question, tab, Yes or No. Made up:

    Is there a dog in this image? Please answer yes or no.\\tYes
    Is there a cat in this image? Please answer yes or no.\\tNo

The first prompt is "Is there a dog in this image?\\nAnswer the question using a single word or
phrase.". Points are those of MME's calculation.py (eval_tool).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dynmoe.errors import DataError
from dynmoe.questions.base import (
    FolderSet,
    Question,
    answer_row,
    by_kind,
    mean,
    write_lines,
    write_text,
)
from dynmoe.questions.files import Fields, first_path, image_folder, locate, read_lines, read_text
from dynmoe.questions.vqa import INSTRUCTION

log = logging.getLogger(__name__)

POPE_SOURCE = "https://github.com/AoiDragon/POPE, output/coco; the images are COCO's val2014"
SPLITS = ("adversarial", "popular", "random")
POPE_FOLDERS = ("", "coco/", "output/coco/")
SUFFIXES = (".json", ".jsonl")
FIELDS: Fields = {"question_id": "id", "image": "text", "text": "text", "label": "text"}
PUBLISHED = 8910
"""Questions of the lists at commit e3e3926 of AoiDragon/POPE, on which published numbers rest."""
LLAVA_QUESTIONS = "llava_pope_test.jsonl"
LLAVA_FIELDS: Fields = {"question_id": "id", "image": "text", "text": "text", "category": "text"}


class Pope(FolderSet):
    """Records are the labels, yes or no; a question's kind is its split.

    `ids` [Q] are numbers of the questions over all splits, as LLaVA's file of questions has them.
    """

    def __init__(
        self, questions: Sequence[Question], labels: Sequence[str], images: Path, ids: Sequence[Any]
    ) -> None:
        super().__init__("pope", questions, labels, images)
        self._ids = ids

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy, precision, recall, f1 and yes_ratio of each split; "score" is the mean f1.

        A precision or recall without any case is 0, where the official file stops with an error.
        """
        results = [(label == "yes", says_yes(answer)) for _, label, answer in self.pairs(answers)]
        measures = {
            split: _measures(own) for split, own in by_kind(self.questions, results).items()
        }
        return {
            "score": mean([own["f1"] for own in measures.values()]),
            **{f"{split}_{name}": x for split, own in measures.items() for name, x in own.items()},
        }

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """Each split's `ans_file` of POPE's evaluate.py, in the order of its labels.

        For eval_pope.py of LLaVA and MoE-LLaVA `pope_answers.jsonl` has all splits, with the ids of
        LLaVA's file of questions where that was there, else of `pope_questions.jsonl`.
        """
        asked, answered, rows = [], [], []
        for id, (question, _, answer) in zip(self._ids, self.pairs(answers), strict=True):
            (image,) = question.images
            bare = question.text.removesuffix(INSTRUCTION)
            named = {"question_id": id, "image": image, "text": question.text}
            asked.append({**named, "category": question.kind})
            answered.append(answer_row(id, question.text, answer))
            rows.append({"question_id": id, "question": bare, "answer": answer, "text": answer})
        return [
            *(
                write_lines(folder / f"coco_pope_{split}_answers.jsonl", own)
                for split, own in by_kind(self.questions, rows).items()
            ),
            write_lines(folder / "pope_questions.jsonl", asked),
            write_lines(folder / "pope_answers.jsonl", answered),
        ]


def says_yes(answer: str) -> bool:
    """False if the first sentence has the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _measures(results: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """The five scores of (label, prediction) [N]."""
    hits = sum(label and predicted for label, predicted in results)
    predicted_yes = sum(predicted for _, predicted in results)
    precision = _ratio(hits, predicted_yes)
    recall = _ratio(hits, sum(label for label, _ in results))
    return {
        "accuracy": _ratio(sum(label == predicted for label, predicted in results), len(results)),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": _ratio(predicted_yes, len(results)),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def read_pope(root: str, images: str | None = None) -> Pope:
    """The splits below `root`; `images` is the folder of COCO's val2014, else `val2014` there.

    Warns where there are other than `PUBLISHED` questions: today's files have 9,000.

    Raises:
        DataError: no split or no images are there, or a file is damaged.
    """
    candidates = {
        split: [
            f"{folder}coco_pope_{split}{suffix}" for folder in POPE_FOLDERS for suffix in SUFFIXES
        ]
        for split in SPLITS
    }
    here = {split: names for split, names in candidates.items() if first_path(root, names)}
    defaults = image_folder(images, "val2014", "images/val2014", "coco/val2014")
    paths = locate("POPE", root, (here or candidates) | defaults, POPE_SOURCE)
    questions, labels = [], []
    for split in here:
        for row in read_lines(paths[split], FIELDS):
            if row["label"] not in ("yes", "no"):
                raise DataError(
                    f"{paths[split]}: question {row['question_id']}: expected the label yes or no, "
                    f"found {row['label']!r}."
                )
            id = f"{split}/{row['question_id']}"
            questions.append(Question(id, row["text"] + INSTRUCTION, (row["image"],), split))
            labels.append(row["label"])
    if len(questions) != PUBLISHED:
        log.warning(
            "POPE: %d questions in %s; published numbers rest on the %d in %s at commit e3e3926 of "
            "github.com/AoiDragon/POPE, output/coco",
            len(questions),
            " and ".join(here),
            PUBLISHED,
            "adversarial, popular and random",
        )
    return Pope(questions, labels, paths["images"], _llava_ids(root, questions))


def _llava_ids(root: str, questions: Sequence[Question]) -> list[Any]:
    """The ids in LLaVA's file of questions if it is there and has all of them, else the places."""
    path = first_path(root, [LLAVA_QUESTIONS])
    rows = [] if path is None else read_lines(path, LLAVA_FIELDS)
    known = {(row["category"], row["image"], row["text"]): row["question_id"] for row in rows}
    found = [known.get((each.kind, each.images[0], each.text)) for each in questions]
    return list(range(len(questions))) if None in found else found


MME_SOURCE = "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"
PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = (
    *("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
)
MME_FOLDERS = (
    "",
    "MME_Benchmark_release_version/MME_Benchmark/",
    "MME_Benchmark_release_version/",
    "MME_Benchmark/",
)
YES_NO = "Please answer yes or no."
POINTS_OF_A_TASK = 200  # 100 for accuracy, 100 for accuracy+


class Truth(NamedTuple):
    """Record of a question: the first columns of its line in the task's results file."""

    image: str
    question: str
    answer: str


class Mme(FolderSet):
    """Records are `Truth`s, a question's kind is its task. Two in a row share an image."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Points of perception, of cognition and of each task; "score" is perception / 2000.

        A task has 100 x (accuracy + accuracy+); the latter is the share of images of which both
        questions are answered rightly.
        """
        right = (
            parse_answer(answer) == truth.answer.lower() for _, truth, answer in self.pairs(answers)
        )
        points = {}
        for task, own in by_kind(self.questions, right).items():
            both = [a and b for a, b in zip(own[::2], own[1::2], strict=True)]
            points[task] = 100 * (mean(own) + mean(both))
        perception = sum(points[task] for task in PERCEPTION)
        return {
            "score": perception / (POINTS_OF_A_TASK * len(PERCEPTION)),
            "perception_points": perception,
            "cognition_points": sum(points[task] for task in COGNITION),
            **{f"{task.lower()}_points": value for task, value in points.items()},
        }

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """`<task>.txt`, as calculation.py reads it: image, question, truth, answer, by tabs."""
        lines = (
            "\t".join([*truth, _one_line(answer)]) + "\n"
            for _, truth, answer in self.pairs(answers)
        )
        return [
            write_text(folder / f"{task}.txt", "".join(own))
            for task, own in by_kind(self.questions, lines).items()
        ]


def parse_answer(answer: str) -> str:
    """yes, no or other: what the first four characters hold, yes before no."""
    beginning = _one_line(answer).lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "other")


def _one_line(answer: str) -> str:
    return " ".join(answer.split())


def read_mme(root: str, images: str | None = None) -> Mme:
    """The 14 tasks' folders below `root`; `images` holds the same folders if images are elsewhere.

    A prompt is the question without "Please answer yes or no.", and with LLaVA's instruction.

    Raises:
        DataError: tasks or images are missing, or a text is not two questions.
    """
    wanted = {
        task: [f"{folder}{task}" for folder in MME_FOLDERS] for task in (*PERCEPTION, *COGNITION)
    }
    paths = locate("MME", root, wanted, MME_SOURCE)
    image_root = paths[PERCEPTION[0]].parent if images is None else Path(images)
    questions: list[Question] = []
    truths: list[Truth] = []
    problems: list[str] = []
    for task, folder in paths.items():
        names = _image_names(image_root, task)
        files = sorted((first_path(folder, ["questions_answers_YN"]) or folder).glob("*.txt"))
        if not files:
            problems.append(f"  {folder}: no texts")
        for file in files:
            rows = [line.split("\t") for line in read_text(file).split("\n") if line.strip()]
            if file.stem not in names:
                problems.append(f"  {file}: no image {file.stem} in {image_root / task}")
                continue
            if not _are_two_questions(rows):
                problems.append(f"  {file}: expected two lines: question, tab, Yes or No")
                continue
            image = names[file.stem]
            for number, (text, answer) in enumerate(rows):
                asked = text.replace(YES_NO, "").strip() + INSTRUCTION
                questions.append(Question(f"{task}/{file.stem}/{number}", asked, (image,), task))
                truths.append(Truth(Path(image).name, text, answer.strip()))
    if problems:
        raise DataError("\n".join(["MME cannot be read:", *problems]))
    return Mme("mme", questions, truths, image_root)


def _image_names(root: Path, task: str) -> dict[str, str]:
    """Paths below `root` of a task's images by their stems."""
    folder = first_path(root / task, ["images"]) or root / task
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        file.stem: str(file.relative_to(root))
        for file in files
        if file.suffix.lower() in (".jpg", ".jpeg", ".png")
    }


def _are_two_questions(rows: Sequence[Sequence[str]]) -> bool:
    return len(rows) == 2 and all(
        len(row) == 2 and row[1].strip().lower() in ("yes", "no") for row in rows
    )
