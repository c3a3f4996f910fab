"""Proves the files of the sets that others score: VizWiz, LLaVA-Bench, MM-Vet, MMBench."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path

import pytest
from question_files import picture, put, put_lines, read_lines

from dynmoe.errors import DataError
from dynmoe.questions.choices import read_mmbench
from dynmoe.questions.judged import read_llava_bench, read_mm_vet, read_vizwiz

LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_vizwiz(tmp_path: Path) -> None:
    names = ["VizWiz_test_00000000.jpg", "VizWiz_test_00000001.jpg"]
    put(tmp_path / "test.json", [{"image": name, "question": "What is it?"} for name in names])
    for name in names:
        picture(tmp_path / "test" / name)
    found = read_vizwiz(str(tmp_path))
    assert found.questions[0].text == (
        "What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )
    (file,) = found.write(tmp_path / "out", ["Unanswerable.", "The two cans"])
    assert json.loads(file.read_text()) == [
        {"image": names[0], "answer": "unanswerable"},
        {"image": names[1], "answer": "2 cans"},
    ]
    with pytest.raises(DataError, match="vizwiz has no local score"):
        found.score(["a", "b"])


def test_llava_bench(tmp_path: Path) -> None:
    rows = [
        {"question_id": 0, "image": "001.jpg", "text": "Name it.", "category": "conv"},
        {"question_id": 1, "image": "001.jpg", "text": "Describe it.", "category": "detail"},
    ]
    put_lines(tmp_path / "questions.jsonl", rows)
    picture(tmp_path / "images" / "001.jpg")
    found = read_llava_bench(str(tmp_path))
    assert [(question.text, question.kind) for question in found.questions] == [
        ("Name it.", "conv"),
        ("Describe it.", "detail"),
    ]
    (file,) = found.write(tmp_path, ["Diamond Head.", "A\n\nlong answer"])
    assert read_lines(file)[1] == {
        "question_id": 1,
        "prompt": "Describe it.",
        "text": "A\n\nlong answer",
        "answer_id": "1",
        "model_id": "dynmoe",
        "metadata": {},
    }
    assert (found.is_scored, "GPT-4" in found.note) == (False, True)


def test_mm_vet(tmp_path: Path) -> None:
    content = {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5"},
        "v1_1": {"imagename": "v1_1.png", "question": "What is d?", "answer": "1.25"},
    }
    put(tmp_path / "mm-vet.json", content)
    picture(tmp_path / "images" / "v1_0.png")
    with pytest.raises(DataError, match=r"mm_vet: images not in .*/images \(1\): v1_1"):
        read_mm_vet(str(tmp_path))
    picture(tmp_path / "images" / "v1_1.png")
    found = read_mm_vet(str(tmp_path))
    assert [question.text for question in found.questions] == ["What is x?", "What is d?"]
    (file,) = found.write(tmp_path, ["x = -1", "ü"])
    assert file.read_text() == '{\n  "v1_0": "x = -1",\n  "v1_1": "ü"\n}'
    assert (found.is_scored, "GPT-4" in found.note) == (False, True)


COLUMNS = "index question hint A B C D answer category image source l2-category comment split"


def put_mmbench(root: Path, padding: int = 0) -> Path:
    png = picture(root / "x.png", "blue").read_bytes()
    cells = [
        [
            "241",
            'Which "one"?',
            "Look\nhere.",
            "x",
            "y",
            "",
            "z",
            "A",
            "c",
            "",
            "s",
            "l",
            "",
            "dev",
        ],
        ["252", "Is it?", "nan", "yes", "no", "maybe", "None", "B", "c", "", "s", "l", "", "dev"],
    ]
    image = base64.b64encode(png + bytes(padding)).decode()
    rows = [COLUMNS.split(), *([*row[:9], image, *row[10:]] for row in cells)]
    file = root / "mmbench_dev_20230712.tsv"
    with file.open("w", newline="") as opened:
        csv.writer(opened, "excel-tab").writerows(rows)
    return file


def test_mmbench_questions(tmp_path: Path) -> None:
    put_mmbench(tmp_path, padding=200_000)  # a cell longer than the csv module's own limit
    limit = csv.field_size_limit()
    found = read_mmbench(str(tmp_path))
    assert csv.field_size_limit() == limit
    assert [(question.id, question.images) for question in found.questions] == [
        ("241", ("241",)),
        ("252", ("252",)),
    ]
    assert [question.text for question in found.questions] == [
        f'Look\nhere.\nWhich "one"?\nA. x\nB. y{LETTER}',  # the options end at the first empty one
        f"Is it?\nA. yes\nB. no\nC. maybe{LETTER}",
    ]
    assert found.load_image("252").getpixel((0, 0)) == (0, 0, 255)


def test_mmbench_upload(tmp_path: Path) -> None:
    file = put_mmbench(tmp_path)
    found = read_mmbench(str(file))
    (written,) = found.write(tmp_path / "out", ["A", "B. no"])
    assert written.name == "mmbench_dev_20230712_predictions.tsv"
    assert written.read_text() == (
        "index\tquestion\tA\tB\tC\tD\tprediction\tanswer\tsplit\n"
        '241\t"Which ""one""?"\tx\ty\t\tz\tA\tA\tdev\n'
        "252\tIs it?\tyes\tno\tmaybe\tNone\tB. no\tB\tdev\n"
    )
    with pytest.raises(DataError, match="mmbench has no local score"):
        found.score(["A", "B"])


def test_mmbench_refusals(tmp_path: Path) -> None:
    file = put(tmp_path / "mmbench_dev_20230712.tsv", "index\tquestion\tA\n1\t?\tx\n")
    message = f"{file}: no column B, C, D, image. Found index, question, A."
    with pytest.raises(DataError, match=message):
        read_mmbench(str(tmp_path))
    put(file, "index\tquestion\tA\tB\tC\tD\timage\n1\t?\tx\ty\t\t\tabc\n2\t?\n")
    with pytest.raises(DataError, match=f"{file}: expected 7 columns, found 2 in row 3"):
        read_mmbench(str(tmp_path))
    put(file, "index\tquestion\tA\tB\tC\tD\timage\n1\t?\tx\ty\t\t\tabc\n")
    with pytest.raises(DataError, match=f"{file}, row 1: no image"):
        read_mmbench(str(tmp_path)).load_image("1")
