"""VQA accuracy: an answer counts fully if at least three of the other humans gave it.

Two evaluators share the formula and differ in what they take for the same answer:

- `vqa_accuracy`, of VQAv2's server: PythonEvaluationTools/vqaEvaluation/vqaEval.py of
  GT-Vision-Lab/VQA. Answers are normalised only where the humans disagree.
- `textvqa_accuracy`, of TextVQA as LLaVA scores it: llava/eval/m4c_evaluator.py, from MMF. Answers
  are always normalised, and before that commas and question marks go, and 's becomes a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynmoe.errors import DataError
from dynmoe.questions.files import counted

INSTRUCTION = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 puts behind questions with short answers (docs/Evaluation.md)."""

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
    return _agreement([human.lower() == answer.lower() for human in humans])


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
