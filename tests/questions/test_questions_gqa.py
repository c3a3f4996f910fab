"""Proves that GQA is read, scored and written as its eval.py and LLaVA do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from question_files import picture, put

from dynmoe.errors import DataError
from dynmoe.questions.exact import read_gqa

ROWS = {
    "201307251": ("Is it overcast?", "n1", "no", "verify"),
    "201640614": ("Who is wearing the dress?", "n1", "woman", "query"),
    "202225914": ("Is the door open?", "n2", "yes", "verify"),
}


def put_gqa(root: Path, folder: str = "") -> None:
    content = {
        id: {
            "question": text,
            "imageId": image,
            "answer": answer,
            "isBalanced": True,
            "types": {"detailed": "x", "semantic": "attr", "structural": kind},
        }
        for id, (text, image, answer, kind) in ROWS.items()
    }
    put(root / folder / "testdev_balanced_questions.json", content)
    for image in ("n1", "n2"):
        picture(root / "images" / f"{image}.jpg")


@pytest.mark.parametrize("folder", ["", "data", "questions1.2"])
def test_questions_and_scores(tmp_path: Path, folder: str) -> None:
    put_gqa(tmp_path, folder)
    found = read_gqa(str(tmp_path))
    first = found.questions[0]
    assert first.id == "201307251"
    assert first.text == "Is it overcast?\nAnswer the question using a single word or phrase."
    assert (first.images, first.kind) == (("n1.jpg",), "verify")
    assert found.score(["No.", "woman", "no"]) == {
        "score": 2 / 3,
        "kind_query": 1.0,
        "kind_verify": 0.5,
    }
    # All full stops at the end go, nothing else: neither articles nor punctuation.
    assert found.score(["no...", "the woman", "yes!"])["score"] == 1 / 3
    assert found.score(["", "", ""])["score"] == 0.0


def test_the_predictions_are_what_eval_py_reads(tmp_path: Path) -> None:
    put_gqa(tmp_path)
    found = read_gqa(str(tmp_path))
    answers = ["No.", " Woman", ""]
    (file,) = found.write(tmp_path, answers)
    assert file.name == "testdev_balanced_predictions.json"
    written = json.loads(file.read_text())
    assert written == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "201640614", "prediction": "woman"},
        {"questionId": "202225914", "prediction": ""},
    ]
    # eval.py's accuracy
    predictions = {row["questionId"]: row["prediction"] for row in written}
    questions = json.loads((tmp_path / "testdev_balanced_questions.json").read_text())
    right = [float(predictions[id] == questions[id]["answer"]) for id in questions]
    assert found.score(answers)["score"] == sum(right) / len(right)


def test_questions_without_answers_are_refused(tmp_path: Path) -> None:
    put_gqa(tmp_path)
    file = put(
        tmp_path / "testdev_balanced_questions.json", {"1": {"question": "?", "imageId": "n1"}}
    )
    with pytest.raises(DataError) as error:
        read_gqa(str(tmp_path))
    assert str(error.value) == (
        f"{file}: expected objects with question, imageId, answer, types. "
        "Others (1): entry 1 has no answer, types."
    )
