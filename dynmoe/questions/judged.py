"""Sets that are only exported: VizWiz to its server, LLaVA-Bench and MM-Vet to a judge.

Entries of the three, made up:

    test.json        [{"image": "VizWiz_test_00000000.jpg", "question": "What is this?"}, ...]
    questions.jsonl  {"question_id": 0, "image": "001.jpg", "text": "Name it.", "category": "conv"}
    mm-vet.json      {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", ...}, ...}

Prediction files are those of LLaVA's scripts: convert_vizwiz_for_submission.py, model_vqa.py and
convert_mmvet_for_eval.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynmoe.questions.base import FolderSet, Question, Unscored, answer_row, write_json, write_lines
from dynmoe.questions.files import (
    Fields,
    image_folder,
    locate,
    read_lines,
    read_list,
    read_object,
)
from dynmoe.questions.values import plain_text
from dynmoe.questions.vqa import INSTRUCTION, normalise_m4c

FIELDS: Fields = {"question_id": "id", "image": "text", "text": "text"}
LONG_ANSWER = 1024  # tokens of an answer at most, llava/eval/model_vqa.py
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Unscored, FolderSet):
    """VizWiz-VQA (Gurari et al., CVPR 2018), test set. Records are the images' names."""

    note = (
        "The answers are not public: "
        "eval.ai/web/challenges/challenge-page/1911 scores the results file."
    )

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The file that LLaVA's convert_vizwiz_for_submission.py makes: image, answer."""
        rows = [
            {"image": image, "answer": normalise_m4c(answer)}
            for _, image, answer in self.pairs(answers)
        ]
        return [write_json(folder / "vizwiz_test_results.json", rows)]


def read_vizwiz(root: str, images: str | None = None) -> VizWiz:
    """`test.json` below `root`; `images` is the folder of VizWiz_test_00000000.jpg, else `test`."""
    wanted = {"questions": ["test.json", "Annotations/test.json"]} | image_folder(images, "test")
    paths = locate("VizWiz", root, wanted, "https://vizwiz.org/tasks-and-datasets/vqa")
    rows = read_list(paths["questions"], {"image": "text", "question": "text"})
    names = [row["image"] for row in rows]
    questions = [
        Question(row["image"], row["question"] + UNANSWERABLE + INSTRUCTION, (row["image"],))
        for row in rows
    ]
    return VizWiz("vizwiz", questions, names, paths["images"])


class LlavaBench(Unscored, FolderSet):
    """LLaVA-Bench (In-the-Wild). Records are the questions' ids as they are in the file."""

    answer_tokens = LONG_ANSWER
    note = "GPT-4 judges the answers, by llava/eval/eval_gpt_review_bench.py of LLaVA."

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """LLaVA's answers file, in the order of the questions."""
        rows = (answer_row(id, question.text, text) for question, id, text in self.pairs(answers))
        return [write_lines(folder / "llava_bench_answers.jsonl", rows)]


def read_llava_bench(root: str, images: str | None = None) -> LlavaBench:
    """`questions.jsonl` below `root`; `images` is the folder of 001.jpg, else `images` there."""
    source = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
    wanted = {"questions": ["questions.jsonl"]} | image_folder(images, "images")
    paths = locate("LLaVA-Bench", root, wanted, source)
    rows = read_lines(paths["questions"], FIELDS)
    questions = [
        Question(
            id=str(row["question_id"]),
            text=row["text"],
            images=(row["image"],),
            kind=plain_text(row.get("category")) or "",
        )
        for row in rows
    ]
    ids = [row["question_id"] for row in rows]
    return LlavaBench("llava_bench", questions, ids, paths["images"])


class MmVet(Unscored, FolderSet):
    """MM-Vet (Yu et al., ICML 2024). Records are None."""

    answer_tokens = LONG_ANSWER
    note = "GPT-4 judges the answers, by the notebook of github.com/yuweihao/MM-Vet."

    def write(self, folder: Path, answers: Sequence[str]) -> list[Path]:
        """The file that LLaVA's convert_mmvet_for_eval.py makes: answers by ids v1_0, v1_1, ..."""
        content = {question.id: answer for question, _, answer in self.pairs(answers)}
        return [write_json(folder / "mm_vet_results.json", content, indent=2)]


def read_mm_vet(root: str, images: str | None = None) -> MmVet:
    """`mm-vet.json` below `root`; `images` is the folder of v1_0.png, else `images` there."""
    wanted = {"questions": ["mm-vet.json"]} | image_folder(images, "images")
    paths = locate("MM-Vet", root, wanted, "https://github.com/yuweihao/MM-Vet/releases")
    rows = read_object(paths["questions"], {"imagename": "text", "question": "text"})
    questions = [Question(id, row["question"], (row["imagename"],)) for id, row in rows.items()]
    return MmVet("mm_vet", questions, [None] * len(questions), paths["images"])
