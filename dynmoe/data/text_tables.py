"""Columns of a TSV or JSONL file, plain or .gz, without any quoting."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from dynmoe.errors import DataError


@dataclass(frozen=True)
class Table:
    """Columns of equal length; `row` numbers their lines from 0, counting the `dropped` ones too.

    A line is dropped if it ends before a column, or lacks its key, or says null.
    """

    columns: dict[str, list[str]]
    row: list[int]
    dropped: int


def first_file(candidates: Sequence[Path]) -> Path | None:
    """The first candidate that exists, itself or with .gz behind its name."""
    for path in candidates:
        for file in (path, path.with_name(path.name + ".gz")):
            if file.is_file():
                return file
    return None


def read_table(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    header: Sequence[str] | None = None,
) -> Table:
    """The named columns of a file.

    `header` names the columns of a TSV file whose first line does not.

    Raises:
        DataError: the file is damaged, not UTF-8, or lacks a required column.
    """
    read = _jsonl if ".jsonl" in path.suffixes else _tsv
    try:
        return read(path, required, optional, header)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: damaged gzip file. Fetch or pack it again.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}. Convert it to UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def _lines(path: Path) -> Iterator[str]:
    """Non-blank lines without their end; only a line feed ends one, as texts may hold others."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            if stripped := line.rstrip("\r\n"):
                yield stripped


def _tsv(
    path: Path, required: Sequence[str], optional: Sequence[str], header: Sequence[str] | None
) -> Table:
    rows = (line.split("\t") for line in _lines(path))
    names = next(rows, [])
    first: list[list[str]] = []
    if header is not None and not set(required) <= set(names):
        first, names = [names], list(header)
    wanted = _present(path, names, required, optional)
    places = [names.index(name) for name in wanted]
    pick, width = itemgetter(*places, places[0]), max(places) + 1  # two places or more: a tuple
    numbered = enumerate(row for part in (first, rows) for row in part)
    return _table(
        wanted, ((row, pick(fields) if len(fields) >= width else None) for row, fields in numbered)
    )


def _jsonl(
    path: Path, required: Sequence[str], optional: Sequence[str], header: Sequence[str] | None
) -> Table:
    try:
        rows = [dict(json.loads(line)) for line in _lines(path)]
    except UnicodeDecodeError:
        raise
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not one JSON object per line: {error}.") from None
    wanted = _present(path, list(rows[0]) if rows else [], required, optional)
    return _table(
        wanted,
        (
            (row, None if None in values else list(map(str, values)))
            for row, values in enumerate([fields.get(name) for name in wanted] for fields in rows)
        ),
    )


def _present(
    path: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> list[str]:
    missing = [name for name in required if name not in names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}. "
            f"Found {', '.join(names) if names else 'an empty file'}."
        )
    return [*required, *(name for name in optional if name in names)]


def _table(wanted: list[str], rows: Iterator[tuple[int, Sequence[str] | None]]) -> Table:
    columns: list[list[str]] = [[] for _ in wanted]
    numbers: list[int] = []
    dropped = 0
    for row, values in rows:
        if values is None:
            dropped += 1
            continue
        numbers.append(row)
        for column, value in zip(columns, values, strict=False):
            column.append(value)
    return Table(dict(zip(wanted, columns, strict=True)), numbers, dropped)
