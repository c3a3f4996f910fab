"""Proves what is said of texts that cannot be learnt, are cut, or are trained and evaluated on."""

from __future__ import annotations

import numpy as np
import pytest

from dynmoe.data.text.checks import text_warnings
from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.tasks import TASKS
from dynmoe.data.text.tokens import check_max_length, count_cut, encode, word_tokenizer
from dynmoe.errors import ConfigError


def texts(first: list[str], label: list[int], second: list[str] | None = None) -> TextSet:
    return TextSet(first, second, np.array(label), np.arange(len(first)))


def test_examples_that_are_trained_and_evaluated_on_are_counted() -> None:
    train = texts(["a", "b", "c"], [0, 1, 1])
    dev = texts(["a", "a", "b", "d"], [0, 0, 0, 1])
    assert list(text_warnings({"train": train, "dev": dev}, TASKS["sst2"])) == [
        "dev: 2 of 4 examples are training examples too, with the same text and label"
    ]
    pairs = {"train": texts(["a", "b"], [0, 1], ["x", "y"]), "dev": texts(["a"], [0], ["y"])}
    assert not list(text_warnings(pairs, TASKS["rte"]))


def test_one_class_and_one_score_cannot_be_learnt() -> None:
    (found,) = text_warnings({"train": texts(["a", "b"], [1, 1])}, TASKS["sst2"])
    assert found.startswith("no training example is of class negative")
    (found,) = text_warnings({"train": texts(["a", "b"], [2, 2])}, TASKS["stsb"])
    assert "score 2" in found


def test_texts_of_full_length_are_not_cut() -> None:
    some = texts(["a", "a a", "a a a", "a a a a"], [0, 0, 0, 0])
    tokenizer = word_tokenizer(some.first, 50)
    encoded = encode(some, tokenizer, 4, None)
    assert encoded.lengths.tolist() == [3, 4, 4, 4]
    assert count_cut(some, encoded, tokenizer, 4) == 2


@pytest.mark.parametrize(("number", "least"), [(1, 3), (2, 5)])
def test_a_length_that_leaves_no_text_is_refused(number: int, least: int) -> None:
    tokenizer = word_tokenizer(["a"], 50)
    check_max_length(tokenizer, number, least)
    with pytest.raises(ConfigError, match=f"data.max_length={least - 1}: expected {least} or more"):
        check_max_length(tokenizer, number, least - 1)
