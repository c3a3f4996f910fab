"""Objects and rows of files, read as streams: JSON arrays, JSON lines, CSV."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from dynmoe.data.vl.conversations import text_digest
from dynmoe.errors import DataError
from dynmoe.questions.files import json_lines, reading
from dynmoe.questions.values import NotingKeys, plain_text, refuse_repeated, shown, unique_keys

log = logging.getLogger(__name__)

FIRST = 1 << 16  # bytes in which the first character of a file is looked for


def json_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one array of objects, or has one object a line.

    The file is read as a stream: memory holds one object and the parser's buffer.

    Raises:
        DataError: no such file, not UTF-8, not JSON, cut off, or something else than objects.
    """
    with reading(path), path.open("rb") as file:
        start = file.read(FIRST).removeprefix(BOM_UTF8).lstrip()
        lines = ((f"{path}, line {number}", entry) for number, entry in json_lines(path))
        numbered = _array(path, file) if start.startswith(b"[") else lines
        for where, entry in numbered:
            if not isinstance(entry, dict):
                raise DataError(f"{where}: expected an object, found {type(entry).__name__}.")
            yield entry


def _array(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    import ijson  # of the extra vision-language

    file.seek(0)
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    number = 0
    # NOTE: an exception in a map of ijson 3.6's C parser becomes a SystemError: it is raised here.
    repeated: list[str] = []
    made = partial(NotingKeys, repeated)
    try:
        for entry in ijson.items(file, "item", use_float=True, map_type=made):
            refuse_repeated(repeated)
            yield f"{path}, entry {number}", entry
            number += 1
    except DataError as error:
        raise DataError(f"{path}, entry {number}: {error}") from None
    except (ijson.JSONError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]  # the others show the place in the parser's buffer
        wrong = f"not JSON, or cut off: {reason}."
        if "UTF8" in reason:
            wrong = "not UTF-8. Convert it to UTF-8."
        raise DataError(f"{path}, entry {number}: {wrong}") from None


def file_digest(*paths: Path) -> str:
    """16 hexadecimal digits of the files' bytes; a gigabyte takes about a second."""
    digests = []
    for path in paths:
        with reading(path), path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return text_digest("\n".join(digests))


QUOTES = (
    'A cell with the delimiter, a line end or a quote in it stands in quotes, with each " as "".'
)


def csv_entries(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """The rows of a table by the names in its header, read as a stream; `answers` are JSON.

    Warns of a cell that looks like several rows, as two stray quotes make it.

    Raises:
        DataError: not UTF-8, or a row with other cells than the header, as a stray quote makes it.
    """
    try:
        with reading(path), path.open(encoding="utf-8-sig", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
            header = [name.strip() for name in next(rows, [])]
            twice = [name for name, count in Counter(header).items() if count > 1]
            if twice:
                raise DataError(f"{path}: several columns are called {', '.join(twice)!r}.")
            if len(header) == 1 and set(",;\t") & set(header[0]):
                raise DataError(
                    f"{path}: expected columns separated by {delimiter!r}, as its suffix says, "
                    f"found one, {header[0]!r}. The separator of .csv is a comma, of .tsv a tab."
                )
            before = rows.line_num
            for row in rows:
                first, before = before + 1, rows.line_num
                if not row:
                    continue
                where = f"{path}, line {first}"
                if len(row) != len(header):
                    raise DataError(
                        f"{where}: expected {len(header)} cells, as in the header, found "
                        f"{len(row)}. {QUOTES}"
                    )
                if _has_rows(row, len(header), delimiter):
                    log.warning("%s: a cell looks like several rows. %s", where, QUOTES)
                yield _with_answers(dict(zip(header, row, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}. {QUOTES}") from None


def _has_rows(row: Sequence[str], columns: int, delimiter: str) -> bool:
    """Whether a cell goes over lines and has the delimiters of as many rows: a stray quote."""
    return columns > 1 and any(
        lines and cell.count(delimiter) == lines * (columns - 1)
        for cell in row
        if (lines := cell.strip().count("\n"))
    )


def _with_answers(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if not entry.get("answers"):
        return {key: cell for key, cell in entry.items() if key != "answers"}
    try:
        answers = json.loads(entry["answers"], object_pairs_hook=unique_keys)
        return {**entry, "answers": answers}
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}. Expected CSV whose answers are JSON lists.") from None


def answer_of(entry: Mapping[str, Any], where: str) -> str:
    """The answer of a row: its `answer`, or the most frequent of its `answers`.

    Raises:
        DataError: there is none, one is no text, or the two disagree.
    """
    answers = entry.get("answers")
    if answers is None or answers == []:
        answers = [entry.get("answer")]
    elif isinstance(answers, list):
        answers = [each.get("answer") if isinstance(each, dict) else each for each in answers]
    texts = list(map(plain_text, answers)) if isinstance(answers, list) else []
    given = [text.strip() for text in texts if text is not None and text.strip()]
    if not given or len(given) < len(texts):
        raise DataError(
            f"{where}: expected an answer, or a list answers, each text, a number, true or false; "
            f"found {seen(entry)}."
        )
    counts = Counter(given)
    best = counts.most_common(1)[0][0]
    one = plain_text(entry.get("answer"))
    if one is None or not one.strip():
        return best
    if counts[one.strip()] < counts[best]:
        raise DataError(
            f"{where}: answer {shown(one)} is not the most frequent of answers, {shown(best)}. "
            "Keep one of the two columns."
        )
    return one.strip()


def seen(entry: Mapping[str, Any]) -> str:
    """The keys and values of a row, for a message."""
    return ", ".join(f"{key}={shown(value)}" for key, value in entry.items()) or "nothing"
