"""What a network must beat: a linear classifier on words."""

from __future__ import annotations

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from dynmoe.data.text_sets import TextSet


def linear_text_baseline(train: TextSet, dev: TextSet) -> dict[str, str | float]:
    """Accuracy in [0, 1] on dev: {"name": ..., "dev_score": ...}. For classes, not for scores.

    A pair is read as one text.
    """
    # C chosen once on the embedded glosses; the default 1 regularizes short texts too much.
    classifier = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=1000))
    classifier.fit(_joined(train), train.label)
    return {
        "name": "TF-IDF + logistic regression",
        "dev_score": float(classifier.score(_joined(dev), dev.label)),
    }


def _joined(texts: TextSet) -> list[str]:
    if texts.second is None:
        return texts.first
    return [f"{a} {b}" for a, b in zip(texts.first, texts.second, strict=True)]
