"""Which documents a corpus has, and the set of each."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from tiny_lm import documents, write_corpus

from dynmoe.data.lm import documents as documents_module
from dynmoe.data.lm.documents import Corpus, digest, folder_corpus, gloss_corpus
from dynmoe.data.text.sources import read_glosses
from dynmoe.errors import DataError


def corpus(root: Path, **settings: Any) -> Corpus:
    usual: dict[str, Any] = {
        "text_key": "text",
        "unit": "line",
        "validation": 0.2,
        "test": 0.2,
        "trial_seed": 0,
    }
    return folder_corpus(root, **{**usual, **settings})


def everything(found: Corpus) -> list[str]:
    return sorted(text for documents in found.sets.values() for text in documents)


def test_glosses_keep_the_dev_set_of_the_classification_unseen() -> None:
    found = gloss_corpus(0)
    train, dev = (set(read_glosses(split).texts[0]) for split in ("train", "dev"))
    assert set(found.sets["train"]) == train
    assert set(found.sets["validation"]) | set(found.sets["test"]) == dev
    assert not set(found.sets["validation"]) & set(found.sets["test"])
    assert list(map(len, found.sets.values())) == [4000, 396, 404]
    assert gloss_corpus(1).sets["validation"] != found.sets["validation"]


def test_every_document_is_in_one_set(tmp_path: Path) -> None:
    written = write_corpus(tmp_path)
    found = corpus(tmp_path)
    assert everything(found) == sorted(written)
    assert list(found.sets) == ["train", "validation", "test"] and all(found.sets.values())
    assert found.sets["train"] != [text for text in written if text in found.sets["train"]]


def test_the_deal_follows_the_texts_alone(tmp_path: Path) -> None:
    """Copies share a set, and neither order nor names of files matter."""
    texts = documents(60)
    for root, content in (("a", texts), ("b", [*reversed(texts), *texts])):
        (tmp_path / root).mkdir()
        (tmp_path / root / f"{root}.txt").write_text("\n".join(content))
    first, second = corpus(tmp_path / "a"), corpus(tmp_path / "b")
    for name, once in first.sets.items():
        assert sorted([*once, *once]) == sorted(second.sets[name])
    assert digest(first.sets) != digest(second.sets)
    assert digest(first.sets) == digest(corpus(tmp_path / "a").sets)


def test_a_larger_corpus_moves_no_document(tmp_path: Path) -> None:
    texts = documents(60)
    file = tmp_path / "a.txt"
    file.write_text("\n".join(texts[:30]))
    before = corpus(tmp_path)
    file.write_text("\n".join(texts))
    after = corpus(tmp_path)
    assert all(set(before.sets[name]) <= set(after.sets[name]) for name in before.sets)


def test_units_and_formats(tmp_path: Path) -> None:
    text = "one\ntwo\n\nthree\n \n\nfour\n"
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(text)
    parts = {
        "file": [text.rstrip("\n")],
        "paragraph": ["one\ntwo", "three", "four"],
        "line": ["one", "two", "three", "four"],
    }
    more = documents(30)
    parquet.write_table(pyarrow.table({"text": more, "n": range(30)}), tmp_path / "b.parquet")
    (tmp_path / ".hidden.txt").write_text("unseen")
    for unit, expected in parts.items():
        assert everything(corpus(tmp_path, unit=unit)) == sorted([*expected, *more])


def test_the_last_ending_says_the_format(tmp_path: Path) -> None:
    texts = documents(30)
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (tmp_path / "x.txt.jsonl").write_text(lines)
    (tmp_path / "y.jsonl.txt").write_text("plain")
    assert everything(corpus(tmp_path)) == sorted([*texts, "plain"])


def test_sets_by_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = documents(30)
    (tmp_path / "valid").mkdir()
    (tmp_path / "a.txt").write_text("\n".join(texts[:20]))
    (tmp_path / "valid" / "b.txt").write_text("\n".join(texts[19:25]))
    with caplog.at_level(logging.WARNING):
        found = corpus(tmp_path, validation=["valid/*"], test=0)
    assert set(found.sets) == {"train", "validation"}
    assert sorted(found.sets["validation"]) == sorted(texts[19:25])
    assert "1 of 6 documents of validation are training documents too" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.md", "text", "no text files"),
        ("a.txt", "one document", "data.unit"),
        ("a.jsonl", '{"body": "x"}', "data.text_key"),
        ("a.jsonl", "{", "a.jsonl: not one JSON object per line"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt.gz", b"\x1f\x8b\x08 damaged", "gzip"),
        ("a.parquet", b"PAR1", "a.parquet"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=expected):
        corpus(tmp_path, unit="file")


def test_what_cannot_be_read_can_be_left_out(tmp_path: Path) -> None:
    written = write_corpus(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    rows = [{"text": "fine, and new"}, {"text": None}, {"other": 1}]
    lines = [*map(json.dumps, rows), '{"text": "cut sho', '{"text": "\\ud83d"}', '{"text": [1]}']
    lines.append('{"text": "after them"}')
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = corpus(tmp_path, skip_invalid=True)
    assert everything(found) == sorted([*written, "fine, and new", "after them"])
    assert found.left_out == {
        "files that cannot be read": 1,
        "lines that are no JSON object": 1,
        "rows without a text": 4,
    }


def test_what_was_left_out_is_named_where_nothing_remains(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{\n{"body": "x"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"no document of 0 .*no JSON object: 1.*skip_invalid") as e:
        corpus(tmp_path, skip_invalid=True)
    assert "rows without a text: 1" in str(e.value) and "be read: 1" in str(e.value)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "elsewhere")
    root = tmp_path / "root"
    root.mkdir()
    for name in ("a", "b", ".hidden"):
        (root / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "round").symlink_to(root, target_is_directory=True)
    assert everything(corpus(root)) == sorted(written)
    (root / "own").mkdir()
    (root / "own" / "a.txt").write_text("held out")
    (root / "all").symlink_to(root / "own", target_is_directory=True)
    assert corpus(root, test=["own/*"]).sets["test"] == ["held out"]


def test_patterns_without_a_file_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a document is read."""
    write_corpus(tmp_path)
    monkeypatch.setattr(documents_module, "_documents", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match=r"data\.validation=\['\*'\]: no file of .* for train"):
        corpus(tmp_path, validation=["*"])
    with pytest.raises(DataError, match=r"data\.test=\['\*\.txt'\]: no file of 2 .* for test"):
        corpus(tmp_path, validation=["first*"], test=["*.txt"])
    with pytest.raises(DataError, match=r"data\.test=\['nothing\*'\].*patterns"):
        corpus(tmp_path, test=["nothing*"])
