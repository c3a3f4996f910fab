"""Means over all questions and over each kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from dynmoe.questions.base import Question


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def accuracies(questions: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """Means of `values` [Q]: "score" over all, "kind_<kind>" for each kind (kind_yes_no)."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for question, value in zip(questions, values, strict=True):
        if question.kind:
            by_kind[question.kind].append(value)
    scores = {"score": mean(values)}
    for kind in sorted(by_kind):
        scores[f"kind_{re.sub(r'[^a-z0-9]+', '_', kind.lower())}"] = mean(by_kind[kind])
    return scores
