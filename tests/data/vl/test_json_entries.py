"""Proves that a JSON file is read as json.loads reads it, but piece by piece, and is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dynmoe.data.vl import readers as module
from dynmoe.data.vl.readers import file_digest, json_entries
from dynmoe.errors import DataError

ENTRIES = [
    {},
    {"text": 'brackets ] } , "quoted" \\ and é', "none": None, "number": -1.5e3},
    {"list": [{"deep": [1, [2, []]]}], "long": "x" * 50},
    {"id": "last"},
]


def put(folder: Path, text: str, name: str = "file.json") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [False, True])
def test_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None, ascii: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    text = json.dumps(ENTRIES, indent=indent, ensure_ascii=ascii)
    assert list(json_entries(put(tmp_path, f"\ufeff\n {text}\n "))) == ENTRIES


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "", "\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    assert list(json_entries(put(tmp_path, text))) == []


def test_one_object_a_line(tmp_path: Path) -> None:
    lines = "\n\n".join(map(json.dumps, ENTRIES))
    assert list(json_entries(put(tmp_path, lines))) == ENTRIES


def test_what_comes_before_a_broken_entry_is_read(tmp_path: Path) -> None:
    entries = json_entries(put(tmp_path, '[{"a": 1}, {"b": 2}, {'))
    assert [next(entries), next(entries)] == [{"a": 1}, {"b": 2}]
    with pytest.raises(DataError, match=r"entry 2: not JSON, or cut off: "):
        next(entries)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"a": 1}',
            "entry 0: expected , or ] behind it, found the end of the file: it is cut off.",
        ),
        ('[{"a": 1} {"b": 2}]', "entry 0: expected , or ] behind it, found '{'."),
        ('[{"a": 1}, 7]', "entry 1: expected an object, found int."),
        ('[{"a": 1},]', "entry 1: not JSON, or cut off: Expecting value."),
        ('{"a": 1}\n[2]', "line 2: expected an object, found list."),
        (
            '{"a": 1}\n\n{"b"',
            "line 3: not JSON: Expecting ':' delimiter: line 1 column 5 (char 4).",
        ),
    ],
)
def test_refused(tmp_path: Path, text: str, message: str) -> None:
    path = put(tmp_path, text)
    with pytest.raises(DataError) as error:
        list(json_entries(path))
    assert str(error.value) == f"{path}, {message}"


def test_a_file_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)
    monkeypatch.setattr(module, "LONGEST", 64)
    path = put(tmp_path, '[{"a": "' + "x" * 10_000 + '"}]')
    with pytest.raises(DataError, match="entry 0: not JSON, or cut off: Unterminated string"):
        list(json_entries(path))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(b'[{"a": "\xe9"}]')
    with pytest.raises(DataError, match=r"not UTF-8 .*Convert it to UTF-8\."):
        list(json_entries(tmp_path / "file.json"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: cannot be read: No such file or directory\."):
        list(json_entries(tmp_path / "none.json"))


def test_the_digest_is_that_of_bytes_and_order(tmp_path: Path) -> None:
    one, two = put(tmp_path, "[]", "one"), put(tmp_path, "[ ]", "two")
    copy = put(tmp_path, "[]", "copy")
    assert file_digest(one) == file_digest(copy)
    assert re.fullmatch("[0-9a-f]{16}", file_digest(one))
    assert (
        len({file_digest(one), file_digest(two), file_digest(one, two), file_digest(two, one)}) == 4
    )
