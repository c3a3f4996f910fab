"""Finding and reading the files of published sets, with errors that say what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from dynmoe.errors import DataError
from dynmoe.files import check_regular
from dynmoe.questions.values import Fields, unique_keys, wrong_fields

if TYPE_CHECKING:
    import PIL.Image

SHOWN = 5
"""How many of many problems a message shows."""


def first_path(root: str | Path, candidates: Iterable[str]) -> Path | None:
    """The first of the paths below `root` that exists."""
    return next((path for path in (Path(root, name) for name in candidates) if path.exists()), None)


def locate(
    title: str, root: str | Path, wanted: Mapping[str, Sequence[str]], source: str
) -> dict[str, Path]:
    """The first existing candidate of each thing wanted, below `root` unless it is absolute.

    Raises:
        DataError: names everything that is missing and every place looked at; `source` is where
            it can be downloaded.
    """
    found = {what: first_path(root, candidates) for what, candidates in wanted.items()}
    missing = [
        f"  {what}: no {' or '.join(str(Path(root, name)) for name in wanted[what])}"
        for what, path in found.items()
        if path is None
    ]
    if missing:
        lines = [f"{title} is not complete below {root}:", *missing, f"Fetch it from {source}."]
        raise DataError("\n".join(lines))
    return {what: path for what, path in found.items() if path is not None}


def image_folder(images: str | None, *defaults: str) -> dict[str, Sequence[str]]:
    """The entry of `locate` for the images: the folder that was given, else the defaults."""
    return {"images": defaults if images is None else (str(Path(images).absolute()),)}


def check_inside(keys: Iterable[str], where: str) -> None:
    """Look that the paths of images stay below their folder: data shall name no other files.

    Raises:
        DataError: one leads out of it; `where` names who says so.
    """
    for key in keys:
        suspect = ".." in key or os.path.isabs(key)  # others are not taken apart, which is slow
        if suspect and (PurePath(key).is_absolute() or ".." in PurePath(key).parts):
            raise DataError(
                f"{where}: image {key[:80]} leads out of the image folder. Write the path from "
                "that folder on, or give the folder above it."
            )


class MissingImages(DataError):
    """Images that are not in their folder."""


def check_images(title: str, folder: Path, keys: Iterable[str]) -> None:
    """Raises MissingImages if any image is not in the folder; `title` names who wants them.

    Raises DataError if one leads out of it.
    """
    listings: dict[str, set[str]] = {}  # each folder is listed once: a look at every file is slow
    missing: dict[str, None] = {}  # an ordered set
    for key in keys:
        check_inside([key], title)
        below, _, name = key.rpartition("/")  # of a million keys no paths are made
        if name in ("", "."):
            below, name = os.path.split(os.path.normpath(key))
        if below not in listings:
            listings[below] = _files(folder / below)
        if name not in listings[below]:
            missing[key] = None
    if missing:
        raise MissingImages(
            f"{title}: images not in {folder} {counted([*missing])}. "
            "Give the folder from which these paths start, and fetch what it lacks."
        )


def _files(folder: Path) -> set[str]:
    """Names of the files in a folder: no folders, no pipes."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except (OSError, ValueError):  # no such folder, or a name that no folder can have
        return set()


def load_image(path: Path) -> PIL.Image.Image:
    """An image file in RGB: see `image_files`.

    Raises:
        BadImage: no such file, or not an image.
    """
    from dynmoe.image_files import read_image

    return read_image(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system or the decoder raises on `path` into a DataError, and what is
    no file too."""
    try:
        check_regular(path)
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(
            f"{path}: not UTF-8 (byte 0x{byte:02x}: {error.reason}). Convert it to UTF-8."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}.") from None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte order mark; line ends become a line feed.

    Raises:
        DataError: no such file, or not UTF-8.
    """
    with reading(path):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: it cannot be read or is not JSON.
    """
    return _parsed(read_text(path), str(path), " Fetch it again.")


def _parsed(text: str, where: str, remedy: str = "") -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise DataError(f"{where}: not JSON: {error}.{remedy}") from None


def read_list(path: Path, fields: Fields, key: str | None = None) -> list[dict[str, Any]]:
    """The array of objects of a JSON file, or the array under `key` of its object.

    Raises:
        DataError: the file holds something else, or an object lacks a field or has another value
            there.
    """
    content = read_json(path)
    if key is not None:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        raise DataError(f"{path}: expected an array{f' under {key!r}' if key else ''}.")
    check_fields(path, ((f"entry {number}", row) for number, row in enumerate(content)), fields)
    return content


def read_object(path: Path, fields: Fields) -> dict[str, dict[str, Any]]:
    """The objects of a JSON file by their keys.

    Raises:
        DataError: the file holds something else, or an object lacks a field or has another value
            there.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object.")
    check_fields(path, ((f"entry {name}", row) for name, row in content.items()), fields)
    return content


def read_lines(path: Path, fields: Fields) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line.

    Raises:
        DataError: a line is something else, or lacks a field or has another value there.
    """
    rows = list(json_lines(path))
    check_fields(path, ((f"line {number}", row) for number, row in rows), fields)
    return [row for _, row in rows]


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and the JSON values of the lines, read as a stream; no blank lines.

    Raises:
        DataError: the file cannot be read, or a line is not JSON.
    """
    with reading(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line, f"{path}, line {number}")


def check_fields(path: Path, rows: Iterable[tuple[str, Any]], fields: Fields) -> None:
    """Raises DataError if one of the named rows is no object with these fields."""
    problems = []
    for name, row in rows:
        if not isinstance(row, dict):
            problems.append(f"{name} is not an object")
        else:
            problems += [f"{name} {wrong}" for wrong in wrong_fields(row, fields)]
    if problems:
        raise DataError(
            f"{path}: expected objects with {', '.join(fields)}. Others {counted(problems)}."
        )


def check_same(path: Path, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Raises DataError if the ids in a file are not the expected ones."""
    here, there = dict.fromkeys(found), dict.fromkeys(expected)
    problems = {
        "missing": [str(id) for id in there if id not in here],
        "unknown": [str(id) for id in here if id not in there],
    }
    found_problems = [f"{what} {counted(ids)}" for what, ids in problems.items() if ids]
    if found_problems:
        raise DataError(
            f"{path}: not the same questions: {', '.join(found_problems)}. "
            "The file belongs to another set."
        )


def counted(texts: Sequence[str]) -> str:
    """The number of texts and the first five: "(7): a; b; c; d; e and more"."""
    more = " and more" if len(texts) > SHOWN else ""
    return f"({len(texts)}): {'; '.join(texts[:SHOWN])}{more}"
