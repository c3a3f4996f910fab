"""Proves what is refused in the files of question sets, and what does not matter."""

from __future__ import annotations

from pathlib import Path

import pytest
from question_files import picture, put

from dynmoe.errors import DataError
from dynmoe.questions.files import (
    check_images,
    check_same,
    locate,
    read_lines,
    read_list,
    read_object,
)


def refusal(use, *arguments) -> str:
    with pytest.raises(DataError) as error:
        use(*arguments)
    return str(error.value)


def test_byte_order_mark_line_ends_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\r\n{"a": "x\u2028y"}')
    assert read_lines(file, ["a"]) == [{"a": 1}, {"a": "x\u2028y"}]
    file = put(tmp_path / "a.json", '\ufeff[{"a": 1},\r\n {"a": 2}]\r\n')
    assert read_list(file, ["a"]) == [{"a": 1}, {"a": 2}]


def test_a_list_may_be_under_a_key(tmp_path: Path) -> None:
    file = put(tmp_path / "a.json", {"data": [{"a": 1}]})
    assert read_list(file, ["a"], "data") == [{"a": 1}]
    assert refusal(read_list, file, ["a"], "rows") == f"{file}: expected an array under 'rows'."
    assert refusal(read_list, file, ["a"]) == f"{file}: expected an array."
    assert refusal(read_object, put(file, []), ["a"]) == f"{file}: expected an object."


def test_fields_are_checked_for_all_entries_at_once(tmp_path: Path) -> None:
    file = put(tmp_path / "a.jsonl", '{"a": 1}\n[]\n{"a": 1, "b": 2}\n{}\n')
    assert refusal(read_lines, file, ["a", "b"]) == (
        f"{file}: expected objects with a, b. "
        "Others (3): line 1 has no b; line 2 is not an object; line 4 has no a, b."
    )
    file = put(tmp_path / "a.json", {"x": {"a": 1}, **{str(n): {} for n in range(6)}})
    assert refusal(read_object, file, ["a"]).endswith(
        "Others (6): entry 0 has no a; entry 1 has no a; entry 2 has no a; entry 3 has no a; "
        "entry 4 has no a and more."
    )


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = put(tmp_path / "a.json", '{"a": ')
    assert refusal(read_object, file, []).startswith(f"{file}: not JSON: Expecting value: line 1")
    assert refusal(read_lines, put(file, '{"a": 1}\n{"a"\n'), []).startswith(
        f"{file}, line 2: not JSON:"
    )
    file.write_bytes(b'{"a": "\xff"}')
    assert refusal(read_lines, file, []) == (
        f"{file}: not UTF-8 (byte 0xff: invalid start byte). Convert it to UTF-8."
    )
    assert refusal(read_lines, tmp_path / "b.json", []) == (
        f"{tmp_path}/b.json: cannot be read: No such file or directory."
    )


def test_everything_missing_is_named_at_once(tmp_path: Path) -> None:
    put(tmp_path / "c.json", {})
    wanted = {"questions": ["a.json", "data/a.json"], "answers": ["c.json"], "images": ["/nowhere"]}
    assert refusal(locate, "Toy", tmp_path, wanted, "https://toy.org") == (
        f"Toy is not complete below {tmp_path}:\n"
        f"  questions: no {tmp_path}/a.json or {tmp_path}/data/a.json\n"
        "  images: no /nowhere\n"
        "Fetch it from https://toy.org."
    )
    assert locate("Toy", tmp_path, {"answers": ["b.json", "c.json"]}, "") == {
        "answers": tmp_path / "c.json"
    }


def test_missing_images_are_counted_once_each(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    keys = [f"{n}.png" for n in (0, 1, 1, 2, 3, 4, 5, 6)]
    assert refusal(check_images, "Toy", tmp_path, keys) == (
        f"Toy: images not in {tmp_path} (6): 1.png; 2.png; 3.png; 4.png; 5.png and more. "
        "Give the folder from which these paths start, and fetch what it lacks."
    )
    check_images("Toy", tmp_path, ["0.png"])


def test_ids_have_to_be_the_same(tmp_path: Path) -> None:
    check_same(tmp_path, [2, 1], [1, 2])
    assert refusal(check_same, tmp_path, [2, 3], [1, 2]) == (
        f"{tmp_path}: not the same questions: missing (1): 1, unknown (1): 3. "
        "The file belongs to another set."
    )
