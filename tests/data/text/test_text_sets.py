"""Proves how a file's labels become numbers, and what a set's digest tells apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dynmoe.data.text.sets import RawTexts, TextSet, text_set
from dynmoe.data.text.tasks import TASKS
from dynmoe.errors import DataError

RTE, STSB = TASKS["rte"], TASKS["stsb"]


def raw(labels: list[object] | None) -> RawTexts:
    return RawTexts("rte.tsv", (["a", "b"], ["c", "d"]), labels, range(2))


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
