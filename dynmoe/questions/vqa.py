"""VQAv2 and TextVQA: an answer counts fully if at least three of the other humans gave it.

VQAv2 (Goyal et al., CVPR 2017), read as visualqa.org publishes it. Entries, made up:

    v2_OpenEnded_mscoco_val2014_questions.json  {"questions": [{"question_id": 262148000,
        "image_id": 262148, "question": "What color is it?"}, ...]}
    v2_mscoco_val2014_annotations.json  {"annotations": [{"question_id": 262148000,
        "answer_type": "other", "answers": [{"answer": "red"}, ... of ten people]}, ...]}
    val2014/COCO_val2014_000000262148.jpg       (test2015/ for test-dev2015 and test2015)

The prompt is "What color is it?\\nAnswer the question using a single word or phrase.".

TextVQA (Singh et al., CVPR 2019), its validation set as LLaVA-1.5 evaluates it. Made up:

    TextVQA_0.5.1_val.json  {"data": [{"question_id": 1, "image_id": "003a8ae2ef43b901",
        "question": "what is the brand?", "answers": ["a brand", ... of ten people]}, ...]}
    train_images/003a8ae2ef43b901.jpg
    llava_textvqa_val_v051_ocr.jsonl    LLaVA's questions with the words an OCR system read

Two evaluators share the formula and normalise answers differently:

- `vqa_accuracy` is that of VQAv2's server: PythonEvaluationTools/vqaEvaluation/vqaEval.py of
  GT-Vision-Lab/VQA. Answers are normalised only where the humans disagree: where all ten say USA,
  usa is wrong.
- `textvqa_accuracy` is LLaVA's for TextVQA: llava/eval/m4c_evaluator.py, from MMF. Answers are
  always normalised; before that commas and question marks are removed, and 's becomes a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynmoe.errors import DataError
from dynmoe.questions.base import (
    MODEL,
    FolderSet,
    Question,
    Unscored,
    accuracies,
    answer_row,
    mean,
    write_json,
    write_lines,
)
from dynmoe.questions.files import (
    Fields,
    check_fields,
    check_same,
    counted,
    first_path,
    image_folder,
    locate,
    read_lines,
    read_list,
)

INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""The instruction of LLaVA-1.5 after questions with short answers (docs/Evaluation.md)."""

HUMANS = 10

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
MOST_PERIODS = 32  # the official call passes re.UNICODE, 32, where re.sub expects a count

NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}
ARTICLES = {"a", "an", "the"}

CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""
# Each is recognised with any one of its apostrophes missing.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in CONTRACTED.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round


def check_humans(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Raises DataError if a question has not ten answers."""
    unusual = [str(row["question_id"]) for row in rows if len(row["answers"]) != HUMANS]
    if unusual:
        raise DataError(f"{path}: without {HUMANS} answers are questions {counted(unusual)}.")


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Accuracy in [0, 1] of an answer, given the humans' answers [H]."""
    answer, *humans = map(_one_line, [answer, *humans])
    if len(set(humans)) > 1:
        answer, *humans = map(normalise, [answer, *humans])
    return _agreement([human == answer for human in humans])


def textvqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Accuracy in [0, 1] of an answer, given the humans' answers [H]."""
    answer, *humans = map(normalise_m4c, [answer, *humans])
    return _agreement([human == answer for human in humans])


def normalise(text: str) -> str:
    """vqaEval.py's processPunctuation, then its processDigitArticle."""
    plain = text
    comma_in_number = COMMA_IN_NUMBER.search(text)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or comma_in_number else " ")
    plain = PERIOD.sub("", plain, count=MOST_PERIODS)
    words = (NUMBERS.get(word, word) for word in plain.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_m4c(text: str) -> str:
    """m4c_evaluator.py's EvalAIAnswerProcessor, through which LLaVA also sends VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise(_one_line(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(same: Sequence[bool]) -> float:
    """Mean over the humans: min(1, how many of the others gave the answer / 3)."""
    total = sum(same)
    return sum(min(1.0, (total - own) / 3) for own in same) / len(same)


SOURCE = "https://visualqa.org/download.html"
SPLITS = ("val2014", "test-dev2015", "test2015")
QUESTIONS = "v2_OpenEnded_mscoco_{}_questions.json"
ANNOTATIONS = "v2_mscoco_{}_annotations.json"
QUESTION_FIELDS: Fields = {
    "question_id": "whole number",
    "image_id": "whole number",
    "question": "text",
}
ANNOTATION_FIELDS: Fields = {
    "question_id": "whole number",
    "answer_type": "text",
    "answers": "list",
}


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
    rows = read_list(paths["questions"], QUESTION_FIELDS, "questions")
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
    if scored:
        humans = [
            [answer["answer"] for answer in annotations[row["question_id"]]["answers"]]
            for row in rows
        ]
        return Vqav2(split, questions, humans, paths["images"])
    # The server takes a file of all test questions, and scores those of test-dev.
    path = first_path(folder, [QUESTIONS.format("test2015")])
    every = [] if path is None else read_list(path, {"question_id": "whole number"}, "questions")
    unasked = sorted({row["question_id"] for row in every} - {row["question_id"] for row in rows})
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
    rows = read_list(path, ANNOTATION_FIELDS, "annotations")
    for row in rows:
        answers = ((f"question {row['question_id']}", answer) for answer in row["answers"])
        check_fields(path, answers, {"answer": "text"})
    check_same(
        path, (row["question_id"] for row in rows), (row["question_id"] for row in questions)
    )
    check_humans(path, rows)
    return {row["question_id"]: row for row in rows}


TEXTVQA_SOURCE = "https://textvqa.org/dataset"
TEXTVQA_ANNOTATIONS = "TextVQA_0.5.1_val.json"
TEXTVQA_FIELDS: Fields = {
    "question_id": "id",
    "image_id": "text",
    "question": "text",
    "answers": "list of texts",
}
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
        """The file of LLaVA's eval_textvqa.py, which finds a question by image and prompt."""
        rows = (
            answer_row(image, question.text, answer)
            for question, (image, _), answer in self.pairs(answers)
        )
        return [write_lines(folder / "textvqa_answers.jsonl", rows)]


def read_textvqa(root: str, images: str | None = None) -> TextVqa:
    """The validation set below `root`; `images` is the folder of the images, else `train_images`.

    If LLaVA's file of questions is there too, its texts are asked, with their OCR words. Otherwise
    the bare questions are asked, with a capital letter at the beginning as in LLaVA's.

    Raises:
        DataError: files are missing or damaged, or LLaVA's questions are others.
    """
    wanted = {"annotations": [TEXTVQA_ANNOTATIONS]}
    defaults = image_folder(images, "train_images", "train_val_images/train_images")
    paths = locate("TextVQA", root, wanted | defaults, TEXTVQA_SOURCE)
    rows = read_list(paths["annotations"], TEXTVQA_FIELDS, "data")
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
    records = [(row["image_id"], row["answers"]) for row in rows]
    return TextVqa("textvqa", questions, records, paths["images"])


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return row["image_id"], row["question"].lower()


def _texts(path: Path, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """LLaVA's text of each question, found as eval_textvqa.py finds it: by image and first line."""
    texts = {
        (row["question_id"], row["text"].split("\n")[0].lower()): row["text"]
        for row in read_lines(path, {"question_id": "text", "text": "text"})
    }
    check_same(path, texts, map(_key, rows))
    return texts
