"""What a network must beat: a linear classifier on words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from sklearn.pipeline import make_pipeline

from dynmoe.data.text_sets import TextSet

METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
}


def linear_text_baseline(
    train: TextSet, dev: TextSet, metrics: Sequence[str]
) -> dict[str, str | float]:
    """The mean of `metrics` on dev: {"name": ..., "dev_score": ...}. For classes, not for scores.

    A pair is read as one text.
    """
    # C chosen once on the embedded glosses; the default 1 regularizes short texts too much.
    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    classifier.fit(_joined(train), train.label)
    found = classifier.predict(_joined(dev))
    return {
        "name": "TF-IDF + logistic regression",
        "dev_score": sum(float(METRICS[name](dev.label, found)) for name in metrics) / len(metrics),
    }


def _joined(texts: TextSet) -> list[str]:
    if texts.second is None:
        return texts.first
    return [f"{a} {b}" for a, b in zip(texts.first, texts.second, strict=True)]
