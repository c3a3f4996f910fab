"""Proves what the embedded texts are, and how well words alone tell their topics apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from dynmoe.data.text.module import linear_text_baseline
from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.sources import read_sets
from dynmoe.data.text.tasks import TASKS


def test_glosses_are_balanced_and_shared_by_no_two_sets() -> None:
    task = TASKS["glosses"]
    sets, warnings = read_sets(task, "embedded", None)
    assert warnings == []
    for name, per_topic in (("train", 400), ("dev", 80)):
        assert np.bincount(sets[name].label).tolist() == [per_topic] * len(task.labels)
    texts = [text.lower() for each in sets.values() for text in each.first]
    assert len(set(texts)) == len(texts)
    assert not any('"' in text or "\t" in text for text in texts)


def test_no_gloss_names_its_topic() -> None:
    task = TASKS["glosses"]
    dev = read_sets(task, "embedded", None).sets["dev"]
    for text, label in zip(dev.first, dev.label, strict=True):
        assert task.labels[label] not in text.lower().split()


def test_words_alone_reach_three_quarters(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread, however many there are: others add in another order."""
    threads: list[int] = []
    fit = LogisticRegression.fit

    def noted(self: LogisticRegression, *arguments: Any) -> LogisticRegression:
        threads.extend(library["num_threads"] for library in threadpool_info())
        return fit(self, *arguments)

    monkeypatch.setattr(LogisticRegression, "fit", noted)
    sets = read_sets(TASKS["glosses"], "embedded", None).sets
    with threadpool_limits(2):
        found = linear_text_baseline(sets["train"], sets["dev"], ("accuracy",))
    assert set(threads) == {1}
    assert found["name"] == "TF-IDF + logistic regression"
    assert 0.75 < float(found["scores"]["dev"]["score"]) < 0.82


def test_the_baseline_is_scored_as_the_task_is() -> None:
    words = ["yes"] * 6 + ["no"] * 2
    train = TextSet(words, None, np.array([1] * 6 + [0] * 2), np.arange(8))
    dev = TextSet(words, None, np.array([1] * 5 + [0] * 3), np.arange(8))  # one word misleads
    for metrics, score in ((("accuracy", "f1"), (7 / 8 + 10 / 11) / 2), (("matthews",), 0.745)):
        found = linear_text_baseline(train, dev, metrics)
        assert found["scores"]["dev"]["score"] == pytest.approx(score, abs=1e-3)


def test_the_baseline_reads_both_texts_of_a_pair() -> None:
    words = ["yes", "no"] * 10
    label = np.array([1, 0] * 10)
    pairs = TextSet(["the same"] * 20, words, label, np.arange(20))
    assert linear_text_baseline(pairs, pairs, ("accuracy",))["scores"]["dev"]["score"] == 1
