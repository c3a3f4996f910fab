"""A later start reads no conversations: their images, counts and warnings are kept in the cache."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dynmoe.data.vl import readers
from dynmoe.data.vl.readers import read_llava
from dynmoe.errors import DataError

ENTRIES: list[dict[str, Any]] = [
    {"image": "b.jpg", "conversations": [("human", "<image>\nq"), ("gpt", "a")]},
    {"conversations": [("human", "q"), ("robot", "a")]},
    {"image": ["a.jpg", "b.jpg"], "conversations": [("human", "q"), ("gpt", "a")]},
    {"image": "", "conversations": [("human", "q"), ("gpt", "a"), ("human", "q")]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, ENTRIES)
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()
    return tmp_path


def write(folder: Path, entries: list[dict[str, Any]]) -> None:
    turns = [[{"from": who, "value": text} for who, text in e["conversations"]] for e in entries]
    found = [{**e, "conversations": each} for e, each in zip(entries, turns, strict=True)]
    (folder / "mix.json").write_text(json.dumps(found))


def read(folder: Path, **options: Any) -> Any:
    return read_llava("mix", [str(folder / "mix.json")], str(folder), **options)


def test_the_same_as_read_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = {"skip_invalid": True, "cache": str(folder / "cache")}
    caplog.set_level(logging.WARNING)
    anew = read(folder, skip_invalid=True)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2  # the first broken entry, and the empty image
    first = read(folder, **kept)
    caplog.clear()
    entries: list[Path] = []
    original = readers.json_entries
    monkeypatch.setattr(
        readers, "json_entries", lambda file: (entries.append(file), original(file))[1]
    )
    second = read(folder, **kept)
    assert not entries
    assert [record.getMessage() for record in caplog.records] == warnings
    for found in (first, second):
        assert [*found.keys] == [*anew.keys] == ["b.jpg", "a.jpg"]
        assert (found.keys[1], len(found.keys)) == ("a.jpg", 2)
        assert found.left_out == anew.left_out and found.digest == anew.digest
    assert [*second] == [*anew] and len(entries) == 2
    assert second.without_images(["a.jpg"]).keys is None


def test_images_are_looked_for_each_time(folder: Path) -> None:
    write(folder, [ENTRIES[0], ENTRIES[2]])
    cache = str(folder / "cache")
    read(folder, cache=cache)
    (folder / "a.jpg").unlink()
    with pytest.raises(DataError, match=r"\(1\): a.jpg"):
        read(folder, cache=cache)


def test_other_files_and_rules_are_read(folder: Path) -> None:
    cache = str(folder / "cache")
    with pytest.raises(DataError, match="entry 1"):
        read(folder, cache=cache)
    assert len(read(folder, cache=cache, skip_invalid=True).keys) == 2
    with pytest.raises(DataError, match="entry 1"):
        read(folder, cache=cache)
    write(folder, ENTRIES[:1])
    assert [*read(folder, cache=cache).keys] == ["b.jpg"]


def test_damage_is_made_anew(folder: Path) -> None:
    cache = folder / "cache"
    read(folder, cache=str(cache), skip_invalid=True)
    (file,) = cache.glob("*.arrow")
    content = bytearray(file.read_bytes())
    content[content.index(b"b.jpg")] = ord("c")
    file.write_bytes(content)
    assert [*read(folder, cache=str(cache), skip_invalid=True).keys] == ["b.jpg", "a.jpg"]
