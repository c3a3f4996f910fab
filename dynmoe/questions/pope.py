"""POPE (Li et al., EMNLP 2023): is there a certain object in the image?

    coco_pope_{adversarial,popular,random}.json      val2014/COCO_val2014_000000310196.jpg

A line, made up:

    {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
     "text": "Is there a snowboard in the image?", "label": "yes"}

The prompt is "Is there a snowboard in the image?\\nAnswer the question using a single word or
phrase.". The rules are those of evaluate.py of AoiDragon/POPE, which LLaVA's eval_pope.py repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynmoe.errors import DataError
from dynmoe.questions.base import FolderSet, Question, mean, write_lines
from dynmoe.questions.files import first_path, image_folder, locate, read_lines
from dynmoe.questions.vqa import INSTRUCTION

SOURCE = "https://github.com/AoiDragon/POPE, output/coco; the images are COCO's val2014"
SPLITS = ("adversarial", "popular", "random")
FOLDERS = ("", "coco/", "output/coco/")
SUFFIXES = (".json", ".jsonl")


class Pope(FolderSet):
    """Records are the labels, yes or no; a question's kind is its split."""

    def score(self, answers: Sequence[str]) -> dict[str, float]:
        """Accuracy, precision, recall, f1 and yes_ratio of each split; "score" is the mean f1.

        A precision or recall without any case is 0, where the official file stops with an error.
        """
        by_split: dict[str, list[tuple[bool, bool]]] = {}
        for question, label, answer in self.pairs(answers):
            by_split.setdefault(question.kind, []).append((label == "yes", says_yes(answer)))
        scores = {}
        for split, results in by_split.items():
            for name, value in _scores(results).items():
                scores[f"{split}_{name}"] = value
        return {"score": mean([scores[f"{split}_f1"] for split in by_split])} | scores

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """Each split's `ans_file` of evaluate.py: question and answer, in the labels' order."""
        rows: dict[str, list[dict[str, str]]] = {}
        for question, _, answer in self.pairs(answers):
            text = question.text.removesuffix(INSTRUCTION)
            rows.setdefault(question.kind, []).append({"question": text, "answer": answer})
        return [
            write_lines(folder / f"coco_pope_{split}_answers.jsonl", lines)
            for split, lines in rows.items()
        ]


def says_yes(answer: str) -> bool:
    """False if the first sentence has the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def _scores(results: Sequence[tuple[bool, bool]]) -> dict[str, float]:
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

    Raises:
        DataError: no split or no images are there, or a file is damaged.
    """
    candidates = {
        split: [f"{folder}coco_pope_{split}{suffix}" for folder in FOLDERS for suffix in SUFFIXES]
        for split in SPLITS
    }
    here = {split: names for split, names in candidates.items() if first_path(root, names)}
    defaults = image_folder(images, "val2014", "images/val2014", "coco/val2014")
    paths = locate("POPE", root, (here or candidates) | defaults, SOURCE)
    questions, labels = [], []
    for split in here:
        for row in read_lines(paths[split], ("question_id", "image", "text", "label")):
            if row["label"] not in ("yes", "no"):
                raise DataError(
                    f"{paths[split]}: question {row['question_id']}: expected the label yes or no, "
                    f"found {row['label']!r}."
                )
            id = f"{split}/{row['question_id']}"
            questions.append(Question(id, row["text"] + INSTRUCTION, (row["image"],), split))
            labels.append(row["label"])
    return Pope("pope", questions, labels, paths["images"])
