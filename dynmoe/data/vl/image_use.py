"""Measures of image use: scores from the text alone, and question sets with other images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from dynmoe.data.vl.conversations import IMAGE_PLACEHOLDER, Conversation
from dynmoe.errors import DataError
from dynmoe.questions.exact import ExactMatch


def baselines(questions: ExactMatch, training: Iterable[Conversation]) -> dict[str, float]:
    """Scores in [0, 1] of two answerers that see no image.

    majority: always the most frequent answer of the training conversations. question only: the
    most frequent answer to the same question, or the majority's if training never asks it.
    """
    answers: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation in training:
        turns = iter(conversation.messages)
        for question, answer in zip(turns, turns, strict=True):
            by_question[_text(question.text)][answer.text] += 1
            answers[answer.text] += 1
    if not answers:
        raise DataError(f"{questions.name}: no training conversations to take answers from.")
    majority = _first(answers)
    asked = [_text(question.text) for question in questions.questions]
    known = [_first(by_question[text]) if text in by_question else majority for text in asked]
    return {
        "majority": questions.score([majority] * len(asked))["score"],
        "question only": questions.score(known)["score"],
    }


def with_other_images(questions: ExactMatch) -> ExactMatch:
    """The same questions and answers; each image is replaced by the next other one of the set.

    The other image may have the same answer: such a question shows nothing.

    Raises:
        DataError: the set has a single image, or none.
    """
    images = list(dict.fromkeys(each.images for each in questions.questions if each.images))
    if len(images) < 2:
        raise DataError(f"{questions.name}: expected two images or more, found {len(images)}.")
    following = dict(zip(images, images[1:] + images[:1], strict=True)) | {(): ()}
    return ExactMatch(
        f"{questions.name}_shuffled",
        [replace(each, images=following[each.images]) for each in questions.questions],
        questions.records,
        questions.load_image,
    )


def spread(questions: ExactMatch, number: int | None) -> ExactMatch:
    """`number` of a set's questions, evenly spread over it; None, or as many as there are: all."""
    total = len(questions.questions)
    if number is None or number >= total:
        return questions
    rows = [index * total // number for index in range(number)]
    return ExactMatch(
        questions.name,
        [questions.questions[row] for row in rows],
        [questions.records[row] for row in rows],
        questions.load_image,
    )


def _first(answers: Counter[str]) -> str:
    return answers.most_common(1)[0][0]


def _text(question: str) -> str:
    return question.replace(IMAGE_PLACEHOLDER, "").strip()
