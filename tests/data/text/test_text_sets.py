"""Proves how a file's labels become numbers, and what a set's digest tells apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dynmoe.data.text.sets import RawTexts, TextSet, as_text, text_set
from dynmoe.data.text.tasks import TASKS, GlueTask
from dynmoe.errors import DataError

RTE, STSB = TASKS["rte"], TASKS["stsb"]


def raw(labels: list[object] | None) -> RawTexts:
    words = None if labels is None else list(map(str, labels))
    return RawTexts("rte.tsv", (["a", "b"], ["c", "d"]), words, range(2))


def pairs() -> TextSet:
    return text_set(raw([0, 1]), RTE, labelled=True)


def test_classes_may_be_named_or_numbered() -> None:
    for labels in (["not_entailment", "entailment"], ["1", "0"], [1, 0]):
        made = text_set(raw(labels), RTE, labelled=True)
        assert made.label.tolist() == [1, 0]
        assert made.label.dtype == np.int64
        assert (made.first, made.second) == (["a", "b"], ["c", "d"])


def test_scores_are_float32() -> None:
    made = text_set(raw(["2.5", 5]), STSB, labelled=True)
    assert made.label.tolist() == [2.5, 5]
    assert made.label.dtype == np.float32


def test_a_test_set_has_unknown_labels() -> None:
    for labels in (None, [-1, -1]):
        assert text_set(raw(labels), RTE, labelled=False).label.tolist() == [-1, -1]
        assert np.isnan(text_set(raw(labels), STSB, labelled=False).label).all()


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        (RTE, None, "rte.tsv: no label column."),
        (
            RTE,
            ["maybe", "-1"],
            "rte.tsv: unknown labels '-1', 'maybe'. Expected entailment, 0, not_entailment, 1.",
        ),
        (STSB, ["1", "good"], "rte.tsv: a score is not a number: could not convert string"),
        (STSB, ["1", "nan"], "rte.tsv: a score is not a finite number."),
    ],
)
def test_a_labelled_set_must_have_the_labels_of_its_task(task, labels, message) -> None:
    with pytest.raises(DataError) as error:
        text_set(raw(labels), task, labelled=True)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("word", ["-", "-1"])
def test_rows_without_an_agreed_label_are_left_out_of_mnli(word: str) -> None:
    made = text_set(raw([word, "neutral"]), TASKS["mnli"], labelled=True)
    assert (made.first, made.second, made.label.tolist()) == (["b"], ["d"], [1])
    assert made.index.tolist() == [1]
    assert made.left_out == {"rows without an agreed label": 1}
    with pytest.raises(DataError, match="no rows"):
        text_set(raw([word, word]), TASKS["mnli"], labelled=True)


@pytest.mark.parametrize(("task", "labels"), [(RTE, ["maybe", 1]), (STSB, ["good", 1])])
def test_rows_of_unknown_labels_are_left_out_if_asked(task: GlueTask, labels: list[object]) -> None:
    made = text_set(raw(labels), task, labelled=True, skip_invalid=True)
    assert (made.first, made.label.tolist()) == (["b"], [1])
    assert made.left_out == {"rows with an unknown label": 1}


def test_fields_are_text_or_numbers_or_missing() -> None:
    found = [as_text(value, "row 0") for value in ("", "0", 0, 1.0, 2.5, None, float("nan"))]
    assert found == ["", "0", "0", "1", "2.5", None, None]
    for value in (["a"], {"text": "a"}, True):
        with pytest.raises(DataError, match="row 0: expected text or a number, found "):
            as_text(value, "row 0")
    with pytest.raises(DataError, match="row 0: half of a surrogate pair"):
        as_text("a \ud83d", "row 0")


def test_no_rows() -> None:
    with pytest.raises(DataError, match=r"rte.tsv: no rows. Expected sentence1 and sentence2"):
        text_set(RawTexts("rte.tsv", ([], []), [], []), RTE, labelled=True)


def test_a_subset_keeps_the_given_order() -> None:
    chosen = pairs().subset(np.array([1, 0]))
    assert (chosen.first, chosen.second, len(chosen)) == (["b", "a"], ["d", "c"], 2)
    assert (chosen.label.tolist(), chosen.index.tolist()) == ([1, 0], [1, 0])


def test_the_digest_changes_with_texts_their_borders_labels_and_order() -> None:
    same = pairs()
    others = [
        same.subset(np.array([1, 0])),
        replace(same, label=np.array([1, 1])),
        replace(same, first=["a", "x"]),
        replace(same, first=["ab", ""]),
        replace(same, first=["a", "b", "c", "d"], second=None),
    ]
    assert pairs().digest == same.digest
    assert len({each.digest for each in (same, *others)}) == 6
