"""The labelled texts of one set, made from the columns of a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dynmoe.data.text.tasks import GlueTask
from dynmoe.errors import DataError
from dynmoe.seeding import IntArray

EMPTY = "rows with an empty text"
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
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Counts of rows that the file has beside these, by what they are."""

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
    labels: Sequence[str] | None
    index: Sequence[int]
    dropped: int = 0  # rows with missing fields


Loader = Callable[[], RawTexts]  # raises DataError


def as_text(value: object, where: str) -> str | None:
    """A field of a file as text; None where it is missing: null, or NaN, which pandas writes.

    A number counts as the text that it is written with, 1.0 as 1: pandas makes a column of integers
    one of floats where a value is missing.

    Raises:
        DataError: a list, an object, a truth value, or what cannot be written as UTF-8.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{where}: half of a surrogate pair is no text: {value!r:.80}"
            ) from None
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: expected text or a number, found {value!r:.80}")
    if isinstance(value, float):
        return None if math.isnan(value) else f"{value:.15g}"
    return str(value)


def text_set(
    raw: RawTexts,
    task: GlueTask,
    *,
    labelled: bool,
    known: Mapping[str, int] | None = None,
    skip_invalid: bool = False,
) -> TextSet:
    """Labels become numbers; `known` maps the file's words to them, by default the task's.

    Labelled rows with an empty text, or whose annotators did not agree, are left out; with
    `skip_invalid` those with an unknown label too.

    Raises:
        DataError: no rows, a label outside the task, or none where `labelled` asks for them.
    """
    if labelled and raw.labels is None:
        raise DataError(f"{raw.where}: no label column.")
    texts, index = raw.texts, raw.index
    words = None if raw.labels is None else [word.strip() for word in raw.labels]
    left_out = {"rows with missing fields": raw.dropped}
    # Files of different sources name a class or number it.
    own = {word: label for label, name in enumerate(task.labels) for word in (name, str(label))}
    known = known or own
    if labelled and words is not None:

        def keep(what: str, kept: list[int]) -> None:
            nonlocal texts, index, words
            assert words is not None
            left_out[what] = len(words) - len(kept)
            texts = [[column[row] for row in kept] for column in texts]
            index, words = [index[row] for row in kept], [words[row] for row in kept]

        def leave_out(what: str, unwanted: Callable[[str], bool]) -> None:
            keep(what, [row for row, word in enumerate(words or ()) if not unwanted(word)])

        # Sets without labels keep theirs, since the GLUE server counts rows.
        rows = enumerate(zip(*texts, strict=True))
        keep(EMPTY, [row for row, cells in rows if all(map(str.strip, cells))])
        leave_out("rows without an agreed label", lambda word: word in task.undecided)
        if skip_invalid:
            is_known = _is_score if task.regression else known.__contains__
            leave_out("rows with an unknown label", lambda word: not is_known(word))
    if not index:
        raise DataError(f"{raw.where}: no rows. Expected {' and '.join(task.columns)} with labels.")
    label = (
        _scores(words, raw.where, len(index), labelled=labelled)
        if task.regression
        else _classes(words, raw.where, len(index), known, labelled=labelled)
    )
    return TextSet(
        first=texts[0],
        second=texts[1] if len(texts) > 1 else None,
        label=label,
        index=np.array(index, dtype=np.int64),
        left_out={what: count for what, count in left_out.items() if count},
    )


def _is_score(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False


def _classes(
    words: Sequence[str] | None, where: str, rows: int, known: Mapping[str, int], *, labelled: bool
) -> LabelArray:
    if words is None:
        return np.full(rows, -1, dtype=np.int64)
    if not labelled:  # published test sets say -1
        known = {**known, "-1": -1}
    unknown = sorted({word for word in words if word not in known})
    if unknown:
        raise DataError(
            f"{where}: unknown labels {', '.join(map(repr, unknown[:LISTED]))}. "
            f"Expected {', '.join(known)}. Rows of other labels are left out with "
            "data.skip_invalid=true."
        )
    return np.array([known[word] for word in words], dtype=np.int64)


def _scores(words: Sequence[str] | None, where: str, rows: int, *, labelled: bool) -> LabelArray:
    if words is None:
        return np.full(rows, np.nan, dtype=np.float32)
    try:
        scores = np.array([float(word) for word in words], dtype=np.float32)
    except ValueError as error:
        raise DataError(f"{where}: a score is not a number: {error}.") from None
    if not labelled:  # published test sets say -1
        scores[scores == -1] = np.nan
    elif not np.isfinite(scores).all():
        raise DataError(f"{where}: a score is not a finite number.")
    return scores
