"""The documents of a corpus, and the set that each belongs to.

A document is dealt by a hash of its text: copies of one text are never in two sets. The documents
of a set stand in the order of another hash: neighbours in a block of tokens are unrelated, and a
corpus is the same one whatever its files are called.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dynmoe.data.text.sets import as_text
from dynmoe.data.text.sources import json_object, lines_of, read_glosses, unpacking
from dynmoe.errors import DataError

log = logging.getLogger(__name__)

SETS = ("train", "validation", "test")

Unit = Literal["file", "paragraph", "line"]

Held = float | Sequence[str] | None
"""What a set holds: a share of the documents, or the files of these patterns."""

BLANK = re.compile(r"\n\s*\n")
SHOWN = 5  # problems that a message lists

ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")


class Corpus(NamedTuple):
    sets: dict[str, list[str]]
    """The documents of train, validation and, if there is one, test."""
    left_out: dict[str, int]
    """Counts of what is there beside these, by what it is."""


def gloss_corpus(trial_seed: int) -> Corpus:
    """The definitions of `data=glosses`: its training set, and its dev set in two halves.

    A model that was trained on them here has seen no text of that dev set.
    """
    train, dev = (read_glosses(split).texts[0] for split in ("train", "dev"))
    dealt = _dealt(dev, {"validation": 0.5, "test": 0.5}, trial_seed)
    return Corpus(_ordered({**dealt, "train": train}), {})


def folder_corpus(
    root: Path,
    text_key: str,
    unit: Unit,
    validation: Held,
    test: Held,
    trial_seed: int,
    skip_invalid: bool = False,
) -> Corpus:
    """The documents of the files `*.txt`, `*.jsonl` (also packed, `.gz`) and `*.parquet` below a
    folder; hidden ones are left out, links to folders are followed.

    `text_key`: the field or column of a document's text; `unit`: a document of a text file.
    `skip_invalid` leaves out files and rows that cannot be read.

    Raises:
        DataError: no such files, some that cannot be read, or a set without a document.
    """
    files = _files(root)
    given = {"validation": validation, "test": test}
    shares: dict[str, float] = {}
    patterns: dict[str, list[str]] = {}
    for name, held in given.items():
        if isinstance(held, int | float):
            shares |= {name: held} if held else {}
        elif held is not None:
            patterns[name] = list(held)
    sets_of = {file: _set_of(file.relative_to(root).as_posix(), patterns) for file in files}
    for name in ("train", *patterns):  # before any is read
        if name not in sets_of.values():
            given_as = ", ".join(f"data.{each}={own}" for each, own in patterns.items())
            raise DataError(
                f"{given_as}: no file of {len(files)} below {root} for {name}. Expected patterns "
                "of file names relative to data.root, e.g. 'valid/*.jsonl', the first of which "
                "that fits counts; all other files are of train"
            )
    found: dict[str, list[str]] = {name: [] for name in SETS}
    left_out: Counter[str] = Counter()
    problems: list[str] = []
    for file, name in sets_of.items():
        try:
            found[name] += _documents(file, text_key, unit, skip_invalid, left_out)
        except DataError as error:
            problems.append(str(error))
            left_out["files that cannot be read"] += 1
    if problems and not skip_invalid:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(
            "\n".join(
                [
                    "data.root: some files cannot be read. data.skip_invalid=true leaves them out:",
                    *problems[:SHOWN],
                    *more,
                ]
            )
        )
    dealt = _dealt(found["train"], shares, trial_seed)
    sets = {name: found[name] + dealt.get(name, []) for name in SETS}
    sets["train"] = dealt["train"]
    wanted = [name for name in SETS if name != "test" or name in patterns or name in shares]
    for name in wanted:
        if not sets[name]:
            count = sum(map(len, sets.values()))
            raise DataError(_empty(name, given.get(name), count, unit, left_out))
    for name in patterns:
        known = set(sets["train"])
        if shared := sum(text in known for text in sets[name]):
            log.warning(
                "data: %d of %d documents of %s are training documents too",
                *(shared, len(sets[name]), name),
            )
    return Corpus(_ordered({name: sets[name] for name in wanted}), dict(left_out))


def _files(root: Path) -> list[Path]:
    """Raises DataError where there is none."""
    if not root.is_dir():
        raise DataError(f"data.root: no folder {root}. Give the folder of the text files.")
    files = sorted(path for path in _below(root) if path.name.lower().endswith(ENDINGS))
    if not files:
        raise DataError(
            f"data.root: no text files below {root}. Expected {', '.join(ENDINGS[::2])} "
            "(the first two also packed, .gz)."
        )
    return files


def _below(root: Path) -> Iterator[Path]:
    """The files below a folder that are not hidden, each folder once: first by its own name, then
    by links, which may lead round in a circle."""
    seen: set[str] = set()
    starts = [root]
    for start in starts:  # grows on the way
        for folder, inside, names in os.walk(start):
            real = os.path.realpath(folder)
            if real in seen:
                inside.clear()
                continue
            seen.add(real)
            inside[:] = sorted(name for name in inside if not name.startswith("."))
            starts += [link for name in inside if (link := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in names if not name.startswith("."))


def _set_of(name: str, patterns: dict[str, list[str]]) -> str:
    """The set that a file belongs to; documents of train are dealt later."""
    return next(
        (each for each, own in patterns.items() if any(fnmatch(name, p) for p in own)), "train"
    )


def _documents(
    file: Path, text_key: str, unit: Unit, skip_invalid: bool, left_out: Counter[str]
) -> list[str]:
    """The documents of a file that are not blank.

    Raises:
        DataError: it cannot be read, or has a row without a text.
    """
    name = file.name.lower()
    if name.removesuffix(".gz").endswith(".txt"):
        found: Iterable[str] = _texts(file, unit)
    else:
        rows = (
            _parquet(file, text_key)
            if name.endswith(".parquet")
            else _jsonl(file, skip_invalid, left_out)
        )
        found = _fields(file, rows, text_key, skip_invalid, left_out)
    with unpacking(file):
        kept = [text for text in found if text.strip()]
    return kept


def _texts(file: Path, unit: Unit) -> Iterator[str]:
    lines = lines_of(file)
    if unit == "line":
        yield from lines
        return
    text = "\n".join(lines_of(file, blank=True))
    yield from [text] if unit == "file" else (part.strip("\n") for part in BLANK.split(text))


def _jsonl(file: Path, skip_invalid: bool, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    for line in lines_of(file):
        try:
            row = json_object(file, line)
        except DataError:
            if not skip_invalid:
                raise
            left_out["lines that are no JSON object"] += 1
        else:
            yield row


def _parquet(file: Path, text_key: str) -> Iterator[dict[str, Any]]:
    """Raises DataError: it is damaged, or has no such column."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if text_key not in names:
            raise DataError(
                f"{file}: no column '{text_key}', found {', '.join(names)}. Set data.text_key"
            )
        for batch in table.iter_batches(columns=[text_key]):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a whole Parquet file ({error}). Fetch it again.") from None


def _fields(
    file: Path,
    rows: Iterable[dict[str, Any]],
    text_key: str,
    skip_invalid: bool,
    left_out: Counter[str],
) -> Iterator[str]:
    for number, row in enumerate(rows):
        try:
            text = as_text(row.get(text_key), f"{file}, row {number}, {text_key}")
        except DataError:
            if not skip_invalid:
                raise
            text = None
        if text is not None:
            yield text
        elif skip_invalid:
            left_out["rows without a text"] += 1
        else:
            raise DataError(
                f"{file}, row {number}: no text under '{text_key}', found "
                f"{', '.join(map(str, row)) or 'nothing'}. Set data.text_key"
            )


def _dealt(
    documents: Sequence[str], shares: dict[str, float], trial_seed: int
) -> dict[str, list[str]]:
    """Each document's set by a number in [0, 1) that its text gives."""
    found: dict[str, list[str]] = {name: [] for name in ("train", *shares)}
    for text in documents:
        number, name = _number(f"{trial_seed}\n{text}"), "train"
        for each, share in shares.items():
            if 0 <= number < share:
                name = each
            number -= share
        found[name].append(text)
    return found


def _number(text: str) -> float:
    """A number in [0, 1) that is another one for every text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def _ordered(sets: dict[str, list[str]]) -> dict[str, list[str]]:
    """Each set in the order of a hash; copies of a text are far from one another."""
    found = {}
    for name in (each for each in SETS if each in sets):
        documents = sets[name]
        seen: Counter[str] = Counter()
        keyed = []
        for text in documents:
            keyed.append((hashlib.sha256(f"{seen[text]}\n{text}".encode()).digest(), text))
            seen[text] += 1
        found[name] = [text for _, text in sorted(keyed)]
    return found


def _empty(name: str, held: Held, count: int, unit: Unit, left_out: Counter[str]) -> str:
    fix = "Give more documents, or other shares"
    if unit != "line":
        fix += "; data.unit=paragraph or line divides text files into more documents"
    if held is not None and not isinstance(held, int | float):
        fix = "Expected patterns of file names relative to data.root, e.g. 'valid/*.jsonl'"
    rule = f"data.{name}={held}" if name != "train" else "data.root"
    found = f"{rule}: no document of {count} for {name}"
    if left_out:
        counts = ", ".join(f"{what}: {number}" for what, number in left_out.items())
        found += f". Left out: {counts}; data.skip_invalid=false names the first of them"
    return f"{found}. {fix}."


def digest(sets: dict[str, list[str]]) -> str:
    """16 hex digits that change with any text, order or set."""
    found = hashlib.sha256()
    for name, documents in sets.items():
        found.update(f"{name} {len(documents)}\n".encode())
        for text in documents:
            content = text.encode()
            found.update(len(content).to_bytes(8) + content)
    return found.hexdigest()[:16]
