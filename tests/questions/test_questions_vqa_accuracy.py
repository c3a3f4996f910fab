"""Proves the two normalisations and the accuracy, rule by rule."""

from __future__ import annotations

import pytest

from dynmoe.questions.vqa import (
    CONTRACTIONS,
    normalise,
    normalise_m4c,
    textvqa_accuracy,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Man and the dog", "man and dog"),  # lower case, no articles
        ("Two of ten", "2 of 10"),
        ("none", "0"),
        ("zero-one", "0 1"),
        ("red, white", "red white"),  # a mark beside a space goes,
        ("red,white", "red white"),  # another becomes a space,
        ("1,000 cars!fast", "1000 carsfast"),  # and all go where a comma is inside a number
        ("T-shirt", "t shirt"),
        ("St. Mary's", "st mary's"),  # the apostrophe is no mark
        ("2.5 m.", "2.5 m"),  # a period before a digit stays
        (".5", ".5"),
        ("v1.", "v1"),
        ("9:30", "9:30"),
        ("dont", "don't"),
        ("couldntve couldnt've", "couldntve couldn't've"),
        ("yall'd've 'ows'at", "y'all'd've 'ow's'at"),
        ("Im", "im"),  # the official table's capitals never match
        ("somebody'd", "somebodyd"),
        ("a", ""),
        ("", ""),
    ],
)
def test_normalisation_of_vqav2(text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_at_most_32_periods_go() -> None:
    assert normalise("." * 40) == "." * 8


def test_contractions() -> None:
    assert len(CONTRACTIONS) == 114
    assert "we'd" not in CONTRACTIONS.values()  # "wed" is a word of its own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Joe's", "joe 's"),
        ("1,000", "1000"),
        ("yes,no", "yesno"),  # VQAv2's: yes no
        ("what?ever", "whatever"),
        ("the\ttwo\ncats", "2 cats"),
        ("Stop!", "stop"),
    ],
)
def test_normalisation_of_textvqa(text: str, expected: str) -> None:
    assert normalise_m4c(text) == expected


def humans(**counts: int) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize("accuracy", [vqa_accuracy, textvqa_accuracy])
@pytest.mark.parametrize(
    ("others", "expected"),
    [  # n humans agree: their n leave-one-out sets have n - 1 of them, the 10 - n others n
        (0, 0.0),
        (1, (9 * 1 / 3) / 10),
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (3, (3 * 2 / 3 + 7) / 10),
        (4, 1.0),
        (10, 1.0),
    ],
)
def test_accuracy_by_agreement(accuracy, others: int, expected: float) -> None:
    answers = humans(cat=others, dog=10 - others)
    assert accuracy("cat", answers) == pytest.approx(expected, abs=1e-12)


def test_vqav2_normalises_where_humans_disagree() -> None:
    assert vqa_accuracy("Two.", humans(two=5, three=5)) == 1.0
    assert vqa_accuracy("2", humans(two=10)) == 0.0
    assert vqa_accuracy(" two\n", humans(two=10)) == 1.0
    assert vqa_accuracy("TWO", humans(two=9, three=1)) == 1.0
    assert vqa_accuracy("TWO", humans(two=10)) == 0.0  # compared as they are where all agree
    assert vqa_accuracy("usa", humans(USA=10)) == 0.0
    assert vqa_accuracy("a cat", humans(cat=9, dog=1)) == 1.0
    assert vqa_accuracy("a cat", humans(cat=10)) == 0.0


def test_textvqa_always_normalises() -> None:
    assert textvqa_accuracy("2", humans(two=10)) == 1.0
    assert textvqa_accuracy("a cat", humans(cat=10)) == 1.0


def test_an_empty_answer_is_an_answer() -> None:
    assert vqa_accuracy("", humans(yes=9, the=1)) == pytest.approx(0.3)
    assert textvqa_accuracy("", humans(yes=10)) == 0.0
