"""Proves what is read of TSV and JSONL files, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from dynmoe.data.text.sources import TextTable, first_file, read_table
from dynmoe.errors import DataError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_tsv_knows_no_quotes_and_breaks_lines_at_line_feeds_only(tmp_path: Path) -> None:
    text = 'id\ttext\tlabel\n0\t"open\r quote\u2028and\x85more\t1\n1\tplain"\t0\n'
    assert read_table(written(tmp_path / "a.tsv", text), ("text",), ("label", "gone")) == TextTable(
        {"text": ['"open\r quote\u2028and\x85more', 'plain"'], "label": ["1", "0"]}, [0, 1], 0
    )


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbftext\tlabel\r\nbonjour\xc3\xa9\t1\r\n\r\n"
    packed = gzip.compress(content) if name.endswith("gz") else content
    table = read_table(written(tmp_path / name, packed), ("text", "label"))
    assert table == TextTable({"text": ["bonjouré"], "label": ["1"]}, [0], 0)


def test_short_rows_are_dropped_and_counted_in_the_row_numbers(tmp_path: Path) -> None:
    file = written(tmp_path / "a.tsv", "label\ttext\n1\tone\n0\n1\t\n0\tfour\textra\n")
    assert read_table(file, ("text", "label")) == TextTable(
        {"text": ["one", "", "four"], "label": ["1", "1", "0"]}, [0, 2, 3], 1
    )


def test_a_given_header_serves_where_the_first_line_is_none(tmp_path: Path) -> None:
    bare = written(tmp_path / "a.tsv", "x\t1\ny\t0\n")
    headed = written(tmp_path / "b.tsv", "label\ttext\n1\tx\n0\ty\n")
    for file in (bare, headed):
        table = read_table(file, ("text", "label"), header=("text", "label"))
        assert table == TextTable({"text": ["x", "y"], "label": ["1", "0"]}, [0, 1], 0)


def test_jsonl(tmp_path: Path) -> None:
    rows = '{"text": "x", "label": 1}\n{"text": "y"}\n{"text": null, "label": 0}\n'
    file = written(tmp_path / "a.jsonl", rows)
    assert read_table(file, ("text",), ("label",)) == TextTable(
        {"text": ["x"], "label": ["1"]}, [0], 2
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "no column text. Found an empty file."),
        ("a.tsv", "id\tlabel\n", "no column text. Found id, label."),
        ("a.tsv", "text\ttext\tlabel\nx\ty\t1\n", "several columns are called text."),
        ("a.jsonl", '{"text": "x", "text": "y"}\n', "an object has the key 'text' twice"),
        ("a.tsv", "text,label\nx,1\n", "expected columns separated by tabs, found commas"),
        ("a.tsv", b"text\ncaf\xe9\n", "not UTF-8 (byte 0xe9"),
        ("a.tsv.gz", b"text\n", "damaged gzip file"),
        ("a.tsv.gz", gzip.compress(b"text\n" * 100, mtime=0)[:-12], "damaged gzip file"),
        ("a.jsonl", "text\n", "not one JSON object per line"),
        ("a.jsonl", "[1]\n", "not one JSON object per line"),
        ("a.jsonl", "[" * 100_000, "not one JSON object per line"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = written(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read_table(file, ("text",))
    assert str(error.value).startswith(f"{file}: {message}")


def test_json_fields_keep_what_is_there(tmp_path: Path) -> None:
    """A 0 and an empty text are values; NaN, which pandas writes, is none; a list is no text."""
    rows = ['{"text": "", "label": 0}', '{"text": "x", "label": NaN}', '{"text": 7, "label": 1.0}']
    file = written(tmp_path / "a.JSONL", "\n".join(rows))
    table = read_table(file, ("text", "label"))
    assert table == TextTable({"text": ["", "7"], "label": ["0", "1"]}, [0, 2], 1)
    written(file, '{"text": ["x", "y"]}')
    with pytest.raises(DataError, match=r"a.JSONL, row 0, text: expected text or a number, found"):
        read_table(file, ("text",))


def test_suffixes_in_any_case_and_pipes(tmp_path: Path) -> None:
    file = written(tmp_path / "Train.TSV.GZ", gzip.compress(b"text\nx\n"))
    assert first_file([tmp_path / "train.tsv"]) == file
    assert read_table(file, ("text",)).columns == {"text": ["x"]}
    exact = written(tmp_path / "train.tsv", "text\n")
    assert first_file([tmp_path / "train.tsv"]) == exact
    os.mkfifo(tmp_path / "dev.tsv")
    pipe = first_file([tmp_path / "dev.tsv"])
    assert pipe is not None
    with pytest.raises(DataError, match=r"dev.tsv: .*pipe"):
        read_table(pipe, ("text",))


def test_the_first_file_plain_before_packed(tmp_path: Path) -> None:
    names = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    assert first_file(names) is None
    packed = written(tmp_path / "b.tsv.gz", "")
    assert first_file(names) == packed
    assert first_file([written(names[1], ""), names[0]]) == names[1]
