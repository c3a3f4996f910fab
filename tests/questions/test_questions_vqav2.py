"""Proves that VQAv2 is read, scored and written as its own tools do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from question_files import picture, put

from dynmoe.errors import DataError
from dynmoe.questions.vqa import read_vqav2

SUFFIX = "\nAnswer the question using a single word or phrase."


def put_questions(root: Path, split: str, ids: list[int], image_split: str) -> Path:
    rows = [{"image_id": id // 1000, "question": f"q{id}?", "question_id": id} for id in ids]
    for id in ids:
        picture(root / image_split / f"COCO_{image_split}_{id // 1000:012d}.jpg")
    content = {"task_type": "Open-Ended", "data_subtype": split, "questions": rows}
    return put(root / f"v2_OpenEnded_mscoco_{split}_questions.json", content)


def put_annotations(root: Path, answers: dict[int, tuple[str, list[str]]]) -> Path:
    rows = [
        {
            "question_id": id,
            "image_id": id // 1000,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": given[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(given, start=1)
            ],
        }
        for id, (kind, given) in answers.items()
    ]
    return put(root / "v2_mscoco_val2014_annotations.json", {"annotations": rows})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put_questions(tmp_path, "val2014", [262148000, 262148001, 393225000], "val2014")
    put_annotations(
        tmp_path,
        {
            393225000: ("other", ["cat"] * 2 + ["dog"] * 8),
            262148000: ("yes/no", ["yes"] * 10),
            262148001: ("number", ["2"] * 3 + ["3"] * 7),
        },
    )
    return tmp_path


def test_questions_and_scores(root: Path) -> None:
    found = read_vqav2(str(root))
    first = found.questions[0]
    assert (first.id, first.text) == ("262148000", f"q262148000?{SUFFIX}")
    assert (first.images, first.kind) == (("COCO_val2014_000000262148.jpg",), "yes/no")
    assert found.load_image(first.images[0]).size == (2, 1)
    number, other = (3 * 2 / 3 + 7) / 10, (2 * 1 / 3 + 8 * 2 / 3) / 10
    assert found.score(["Yes.", "two", "a cat"]) == pytest.approx(
        {
            "score": (1 + number + other) / 3,
            "kind_yes_no": 1.0,
            "kind_number": number,
            "kind_other": other,
        }
    )
    assert found.is_scored


def test_the_results_file_is_what_the_official_loader_takes(root: Path) -> None:
    (file,) = read_vqav2(str(root)).write(root / "out", ["Yes.", "two", "a cat"])
    assert file.name == "v2_OpenEnded_mscoco_val2014_dynmoe_results.json"
    assert json.loads(file.read_text()) == [
        {"question_id": 262148000, "answer": "yes"},
        {"question_id": 262148001, "answer": "2"},
        {"question_id": 393225000, "answer": "cat"},
    ]


def test_test_dev_is_exported_with_the_rest_of_test_unanswered(tmp_path: Path) -> None:
    put_questions(tmp_path, "test-dev2015", [1002, 3004], "test2015")
    found = read_vqav2(str(tmp_path))
    assert not found.is_scored
    assert found.questions[1].images == ("COCO_test2015_000000000003.jpg",)
    message = "vqav2 has no local score. The answers are not public: eval.ai"
    with pytest.raises(DataError, match=message):
        found.score(["a", "b"])
    results = [{"question_id": 1002, "answer": "red"}, {"question_id": 3004, "answer": ""}]
    (file,) = found.write(tmp_path, ["Red!", ""])
    assert json.loads(file.read_text()) == results
    put_questions(tmp_path, "test2015", [9009, 1002, 5005, 3004], "test2015")
    (file,) = read_vqav2(str(tmp_path)).write(tmp_path, ["Red!", ""])
    assert file.name == "v2_OpenEnded_mscoco_test-dev2015_dynmoe_results.json"
    assert json.loads(file.read_text()) == [
        *results,
        {"question_id": 5005, "answer": ""},
        {"question_id": 9009, "answer": ""},
    ]


def test_a_file_chooses_the_split(root: Path) -> None:
    file = put_questions(root, "test2015", [1002], "test2015")
    assert [question.id for question in read_vqav2(str(file)).questions] == ["1002"]
    assert len(read_vqav2(str(root)).questions) == 3
    with pytest.raises(DataError, match="expected one of v2_OpenEnded_mscoco_val2014_questions"):
        read_vqav2(str(root / "v2_mscoco_val2014_annotations.json"))


def test_everything_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_vqav2(str(tmp_path))
    assert str(error.value) == (
        f"VQAv2 is not complete below {tmp_path}:\n"
        f"  questions: no {tmp_path}/v2_OpenEnded_mscoco_val2014_questions.json\n"
        f"  annotations: no {tmp_path}/v2_mscoco_val2014_annotations.json\n"
        f"  images: no {tmp_path}/val2014 or {tmp_path}/images/val2014\n"
        "Fetch it from https://visualqa.org/download.html."
    )


def test_annotations_have_to_be_of_the_questions(root: Path) -> None:
    file = put_annotations(root, {262148000: ("yes/no", ["yes"] * 10), 7: ("other", ["x"] * 10)})
    with pytest.raises(DataError) as error:
        read_vqav2(str(root))
    assert str(error.value) == (
        f"{file}: not the same questions: missing (2): 262148001; 393225000, unknown (1): 7. "
        "The file belongs to another set."
    )


def test_questions_have_ten_answers(root: Path) -> None:
    answers = {
        262148000: ("a", ["yes"]),
        262148001: ("a", ["2"] * 10),
        393225000: ("a", ["x"] * 11),
    }
    put_annotations(root, answers)
    message = r"without 10 answers are questions \(2\): 262148000; 393225000."
    with pytest.raises(DataError, match=message):
        read_vqav2(str(root))


def test_missing_images_are_named(root: Path) -> None:
    (root / "val2014" / "COCO_val2014_000000393225.jpg").unlink()
    with pytest.raises(DataError, match=r"images not in .* \(1\): COCO_val2014_000000393225"):
        read_vqav2(str(root))
