"""The objects of a JSON array or of JSON lines, one after the other, in constant memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TextIO

from dynmoe.errors import DataError

CHUNK = 1 << 20  # characters read at once
LONGEST = 1 << 26  # characters of one object; beyond that the file is taken for damaged
DECODER = json.JSONDecoder()
NOT_SPACE = re.compile(r"\S")


def json_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file that is one array of objects, or has one object a line.

    Raises:
        DataError: no such file, not UTF-8, not JSON, cut off, or something else than objects.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = _first_character(file)
            file.seek(0)
            yield from _array(path, file) if start == "[" else _lines(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason}). Convert it to UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None


def file_digest(*paths: Path) -> str:
    """16 hexadecimal digits of the files' bytes; a gigabyte takes about a second."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16]


def _first_character(file: TextIO) -> str:
    while piece := file.read(CHUNK):
        if stripped := piece.lstrip():
            return stripped[0]
    return ""


def _lines(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}.") from None
        yield _object(entry, f"{path}, line {number}")


def _array(path: Path, file: TextIO) -> Iterator[dict[str, Any]]:
    window = _Window(file)
    number = 0
    closing = window.take() == "[" and window.peek() == "]"
    while not closing:
        where = f"{path}, entry {number}"
        try:
            entry = window.value()
        except JSONDecodeError as error:
            raise DataError(f"{where}: not JSON, or cut off: {error.msg}.") from None
        yield _object(entry, where)
        if (found := window.take()) not in (",", "]"):
            what = repr(found) if found else "the end of the file: it is cut off"
            raise DataError(f"{where}: expected , or ] behind it, found {what}.")
        closing = found == "]"
        number += 1


class _Window:
    """A stretch of a file. It slides on, and grows only to hold one whole value."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._place = 0

    def peek(self) -> str:
        """The next character but white space, not yet taken; "" at the end of the file."""
        while True:
            if found := NOT_SPACE.search(self._text, self._place):
                self._place = found.start()
                return found.group()
            self._text, self._place = self._file.read(CHUNK), 0
            if not self._text:
                return ""

    def take(self) -> str:
        found = self.peek()
        self._place += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self._place = DECODER.raw_decode(self._text, self._place)
                return value
            except JSONDecodeError:  # perhaps only because the window ends
                more = self._file.read(max(CHUNK, len(self._text)))
                self._text, self._place = self._text[self._place :] + more, 0
                if not more or len(self._text) > LONGEST:
                    raise


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {type(entry).__name__}.")
    return entry
