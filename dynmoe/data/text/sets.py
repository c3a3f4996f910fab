"""The labelled texts of one set, made from the columns of a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dynmoe.data.text.tasks import GlueTask
from dynmoe.errors import DataError
from dynmoe.seeding import IntArray

LISTED = 5  # unknown labels named in a message

LabelArray = npt.NDArray[np.int64] | npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class TextSet:
    """N examples of one sentence or two.

    `label` [N] is int64, or float32 for a regression; unknown: -1, NaN. `index` [N] is the row
    number in the published file, which is GLUE's `idx`.
    """

    first: list[str]
    second: list[str] | None
    label: LabelArray
    index: IntArray

    def __len__(self) -> int:
        return len(self.first)

    def subset(self, indices: IntArray) -> TextSet:
        """The examples at `indices`, in that order."""
        chosen = indices.tolist()
        return TextSet(
            first=[self.first[i] for i in chosen],
            second=None if self.second is None else [self.second[i] for i in chosen],
            label=self.label[indices],
            index=self.index[indices],
        )

    @property
    def digest(self) -> str:
        """16 hex digits that change with any text, label or order."""
        digest = hashlib.sha256(self.label.tobytes())
        for column in (self.first, self.second or []):
            lengths = np.array([len(text) for text in column], dtype=np.int64)
            digest.update(lengths.tobytes())
            digest.update("".join(column).encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class RawTexts:
    """A set as a file holds it: one text column or two, labels in the file's own words."""

    where: str
    texts: Sequence[list[str]]
    labels: Sequence[object] | None
    index: Sequence[int]
    dropped: int = 0  # rows with missing fields


Loader = Callable[[], RawTexts]  # raises DataError


def text_set(
    raw: RawTexts, task: GlueTask, *, labelled: bool, known: Mapping[str, int] | None = None
) -> TextSet:
    """Labels become numbers; `known` maps the file's words to them, by default the task's.

    Raises:
        DataError: no rows, a label outside the task, or none where `labelled` asks for them.
    """
    if not raw.index:
        raise DataError(f"{raw.where}: no rows. Expected {' and '.join(task.columns)} with labels.")
    if labelled and raw.labels is None:
        raise DataError(f"{raw.where}: no label column.")
    words = None if raw.labels is None else [str(label) for label in raw.labels]
    # Files of different sources name a class or number it.
    own = {word: label for label, name in enumerate(task.labels) for word in (name, str(label))}
    label = (
        _scores(words, raw, labelled=labelled)
        if task.regression
        else _classes(words, raw, known or own, labelled=labelled)
    )
    return TextSet(
        first=raw.texts[0],
        second=raw.texts[1] if len(raw.texts) > 1 else None,
        label=label,
        index=np.array(raw.index, dtype=np.int64),
    )


def _classes(
    words: list[str] | None, raw: RawTexts, known: Mapping[str, int], *, labelled: bool
) -> LabelArray:
    if words is None:
        return np.full(len(raw.index), -1, dtype=np.int64)
    if not labelled:  # published test sets say -1
        known = {**known, "-1": -1}
    unknown = sorted({word for word in words if word not in known})
    if unknown:
        raise DataError(
            f"{raw.where}: unknown labels {', '.join(map(repr, unknown[:LISTED]))}. "
            f"Expected {', '.join(known)}."
        )
    return np.array([known[word] for word in words], dtype=np.int64)


def _scores(words: list[str] | None, raw: RawTexts, *, labelled: bool) -> LabelArray:
    if words is None:
        return np.full(len(raw.index), np.nan, dtype=np.float32)
    try:
        scores = np.array([float(word) for word in words], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{raw.where}: a score is not a number: {error}.") from None
    if not labelled:  # published test sets say -1
        scores[scores == -1] = np.nan
    elif not np.isfinite(scores).all():
        raise DataError(f"{raw.where}: a score is not a finite number.")
    return scores
