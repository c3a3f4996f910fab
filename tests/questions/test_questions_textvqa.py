"""Proves that TextVQA is read, scored and written as LLaVA's eval_textvqa.py does."""

from __future__ import annotations

from pathlib import Path

import pytest
from question_files import picture, put, put_lines, read_lines

from dynmoe.errors import DataError
from dynmoe.questions.vqa import read_textvqa

SUFFIX = "\nAnswer the question using a single word or phrase."
OCR = "\nReference OCR token: DAKOTA, DIGITAL"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = [
        {
            "question_id": 34602,
            "image_id": "003a8ae2ef43b901",
            "question": "what is the brand of this camera?",
            "answers": ["dakota digital"] * 2 + ["Dakota"] * 8,
        },
        {
            "question_id": 34603,
            "image_id": "003a8ae2ef43b901",
            "question": "how many?",
            "answers": ["two"] * 10,
        },
    ]
    put(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    picture(tmp_path / "train_images" / "003a8ae2ef43b901.jpg")
    return tmp_path


def put_ocr(root: Path, *questions: str) -> Path:
    image = "003a8ae2ef43b901"
    rows = [
        {"question_id": image, "image": f"{image}.jpg", "text": question + OCR + SUFFIX}
        for question in questions
    ]
    return put_lines(root / "llava_textvqa_val_v051_ocr.jsonl", rows)


def test_questions_and_scores(root: Path) -> None:
    found = read_textvqa(str(root))
    assert [(question.id, question.text) for question in found.questions] == [
        ("34602", f"What is the brand of this camera?{SUFFIX}"),
        ("34603", f"How many?{SUFFIX}"),
    ]
    assert found.questions[0].images == ("003a8ae2ef43b901.jpg",)
    assert found.score(["Dakota Digital.", "2"]) == {
        "score": pytest.approx(((2 * 1 / 3 + 8 * 2 / 3) / 10 + 1) / 2)
    }
    assert found.score(["", ""]) == {"score": 0.0}


def test_llavas_questions_are_asked_where_they_are_there(root: Path) -> None:
    put_ocr(root, "How many?", "What is the brand of this camera?")
    found = read_textvqa(str(root))
    assert [(question.id, question.text) for question in found.questions] == [
        ("34602", f"What is the brand of this camera?{OCR}{SUFFIX}"),
        ("34603", f"How many?{OCR}{SUFFIX}"),
    ]
    (root / "llava_textvqa_val_v051_ocr.jsonl").unlink()
    assert found.digest != read_textvqa(str(root)).digest


def test_llavas_questions_have_to_be_the_same(root: Path) -> None:
    file = put_ocr(root, "How many?", "Where?")
    with pytest.raises(DataError) as error:
        read_textvqa(str(root))
    assert str(error.value) == (
        f"{file}: not the same questions: missing (1): "
        "('003a8ae2ef43b901', 'what is the brand of this camera?'), "
        "unknown (1): ('003a8ae2ef43b901', 'where?'). The file belongs to another set."
    )


@pytest.mark.parametrize("with_ocr", [False, True])
def test_the_answers_are_what_eval_textvqa_reads(root: Path, with_ocr: bool) -> None:
    if with_ocr:
        put_ocr(root, "How many?", "What is the brand of this camera?")
    found = read_textvqa(str(root))
    (file,) = found.write(root, ["Dakota", "two\nthree"])
    rows = read_lines(file)
    assert file.name == "textvqa_answers.jsonl"
    assert rows[1] == {
        "question_id": "003a8ae2ef43b901",
        "prompt": found.questions[1].text,
        "text": "two\nthree",
        "answer_id": "003a8ae2ef43b901",
        "model_id": "dynmoe",
        "metadata": {},
    }
    # Its prompt_processor knows two forms, of two lines or of three with the OCR words between.
    assert [len(row["prompt"].split("\n")) for row in rows] == [2 + with_ocr] * 2
    assert [row["prompt"].split("\n")[0].lower() for row in rows] == [
        "what is the brand of this camera?",
        "how many?",
    ]


def test_questions_have_ten_answers(root: Path) -> None:
    row = {"question_id": 1, "image_id": "x", "question": "?", "answers": ["a"] * 9}
    file = put(root / "TextVQA_0.5.1_val.json", {"data": [row]})
    with pytest.raises(DataError) as error:
        read_textvqa(str(root))
    assert str(error.value) == f"{file}: without 10 answers are questions (1): 1."
