"""Proves that a JSON file is read as json.loads reads it, but piece by piece, and is refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii", [False, True])
def test_an_array(tmp_path: Path, mark: str, indent: int | None, ascii: bool) -> None:
    text = json.dumps(ENTRIES, indent=indent, ensure_ascii=ascii)
    found = list(json_entries(put(tmp_path, f"{mark}\n {text}\n ")))
    assert found == ENTRIES
    assert isinstance(found[1]["number"], float)


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "", "\n"])
def test_an_empty_file(tmp_path: Path, text: str) -> None:
    assert list(json_entries(put(tmp_path, text))) == []


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_one_object_a_line(tmp_path: Path, mark: str) -> None:
    lines = "\n\n".join(map(json.dumps, ENTRIES))
    assert list(json_entries(put(tmp_path, f"{mark}\n{lines}"))) == ENTRIES


def test_memory_holds_no_more_than_a_piece_of_the_file(tmp_path: Path) -> None:
    entry = json.dumps({"text": "x" * 1000})
    path = put(tmp_path, f"[{entry}{f', {entry}' * 3_000}]")
    tracemalloc.start()
    assert sum(1 for _ in json_entries(path)) == 3_001
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 < path.stat().st_size
    tracemalloc.stop()


def test_what_comes_before_a_broken_entry_is_read(tmp_path: Path) -> None:
    entries = json_entries(put(tmp_path, '[{"a": 1}, {"b": 2}, {'))
    assert [next(entries), next(entries)] == [{"a": 1}, {"b": 2}]
    with pytest.raises(DataError, match=r"entry 2: not JSON, or cut off: "):
        next(entries)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('[{"a": 1}', "entry 1", "not JSON, or cut off: "),
        ('[{"a": 1}, {"b": "c', "entry 1", "not JSON, or cut off: "),
        ('[{"a": 1} {"b": 2}]', "entry 1", "not JSON, or cut off: "),
        ('[{"a": 1},]', "entry 1", "not JSON, or cut off: "),
        ('[{"a": 1}] 7', "entry 1", "not JSON, or cut off: "),
        ('[{"a": 1}, 7]', "entry 1", "expected an object, found int."),
        ('{"a": 1}\n[2]', "line 2", "expected an object, found list."),
        ('{"a": 1}\n\n{"b"', "line 3", "not JSON: Expecting ':' delimiter"),
    ],
)
def test_refused(tmp_path: Path, text: str, place: str, problem: str) -> None:
    path = put(tmp_path, text)
    with pytest.raises(DataError) as error:
        list(json_entries(path))
    assert str(error.value).startswith(f"{path}, {place}: {problem}")


@pytest.mark.parametrize("form", [b'[{"a": "%b"}]', b'{"a": "%b"}'])
def test_not_utf8(tmp_path: Path, form: bytes) -> None:
    (tmp_path / "file.json").write_bytes(form % b"\xe9")
    with pytest.raises(DataError, match=r"not UTF-8.* Convert it to UTF-8\."):
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
