"""Warnings about the texts of a task before training: nothing of them is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from dynmoe.data.text.sets import TextSet
from dynmoe.data.text.tasks import GlueTask


def text_warnings(sets: Mapping[str, TextSet], task: GlueTask) -> Iterator[str]:
    """Classes that cannot be learnt, and evaluated examples that are trained on.

    `sets` holds `train` and those that are evaluated.
    """
    present = np.unique(sets["train"].label)
    if task.regression and len(present) == 1:
        yield f"every training example has the score {present[0]:g}: nothing can be learnt"
    if absent := [name for label, name in enumerate(task.labels) if label not in present]:
        yield f"no training example is of class {', '.join(absent)}: it cannot be learnt"
    for name, each in sets.items():
        if name != "train" and (count := shared(each, sets["train"])):
            yield (
                f"{name}: {count} of {len(each)} examples are training examples too, with the same "
                "text and label"
            )


def shared(texts: TextSet, train: TextSet) -> int:
    """The number of examples in `texts` whose texts and label are in `train` as well."""
    wanted = list(_rows(texts))
    found = set(wanted).intersection(_rows(train))
    return sum(row in found for row in wanted)


def _rows(texts: TextSet) -> Iterator[tuple[str, str, float]]:
    yield from zip(
        texts.first, texts.second or [""] * len(texts), texts.label.tolist(), strict=True
    )
