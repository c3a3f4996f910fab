"""Proves that POPE is read, scored and written as its evaluate.py does."""

from __future__ import annotations

from pathlib import Path

import pytest
from question_files import picture, put_lines, read_lines

from dynmoe.errors import DataError
from dynmoe.questions.yes_no import read_pope, says_yes

LABELS = ["yes", "yes", "no", "no"]


def put_split(root: Path, name: str, labels: list[str] = LABELS) -> Path:
    picture(root / "val2014" / "COCO_val2014_000000000001.jpg")
    rows = [
        {
            "question_id": number,
            "image": "COCO_val2014_000000000001.jpg",
            "text": f"Is there a thing {number} in the image?",
            "label": label,
        }
        for number, label in enumerate(labels)
    ]
    return put_lines(root / name, rows)


def test_questions_of_the_splits_that_are_there(tmp_path: Path) -> None:
    put_split(tmp_path, "coco/coco_pope_random.json")
    put_split(tmp_path, "coco_pope_adversarial.jsonl", ["no"])
    found = read_pope(str(tmp_path)).questions
    ids = ["adversarial/0", "random/0", "random/1", "random/2", "random/3"]
    assert [question.id for question in found] == ids
    assert [question.kind for question in found] == ["adversarial", *["random"] * 4]
    assert found[2].text == (
        "Is there a thing 1 in the image?\nAnswer the question using a single word or phrase."
    )
    assert found[2].images == ("COCO_val2014_000000000001.jpg",)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no, there is none", False),
        ("There is not a dog", False),
        ("NO", True),  # the official rule knows No, no and not
        ("nothing", True),
        ("Yes. There is no other", True),  # the first sentence decides
        (" no", False),
        ("", True),
    ],
)
def test_answers_are_parsed(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_scores(tmp_path: Path) -> None:
    put_split(tmp_path, "coco_pope_adversarial.json")
    put_split(tmp_path, "coco_pope_popular.json")
    found = read_pope(str(tmp_path))
    # adversarial: TP 1, FN 1, FP 1, TN 1. popular: TP 2, FP 1, TN 1.
    assert found.score(["Yes", "No", "yes", "no", "yes", "yes", "yes", "no"]) == pytest.approx(
        {
            "score": (0.5 + 0.8) / 2,
            "adversarial_accuracy": 0.5,
            "adversarial_precision": 0.5,
            "adversarial_recall": 0.5,
            "adversarial_f1": 0.5,
            "adversarial_yes_ratio": 0.5,
            "popular_accuracy": 0.75,
            "popular_precision": 2 / 3,
            "popular_recall": 1.0,
            "popular_f1": 0.8,
            "popular_yes_ratio": 0.75,
        }
    )


def test_a_precision_of_nothing_is_nothing(tmp_path: Path) -> None:
    put_split(tmp_path, "coco_pope_random.json")
    scores = read_pope(str(tmp_path)).score(["no"] * 4)
    assert (scores["random_precision"], scores["score"], scores["random_accuracy"]) == (0, 0, 0.5)


def test_answers_are_what_evaluate_py_reads(tmp_path: Path) -> None:
    put_split(tmp_path, "coco_pope_random.json", ["yes", "no"])
    put_split(tmp_path, "coco_pope_popular.json", ["no"])
    files = read_pope(str(tmp_path)).write(tmp_path, ["No, not at all.", "Yes", ""])
    names = ["coco_pope_popular_answers", "coco_pope_random_answers"]
    names += ["pope_questions", "pope_answers"]
    assert [file.name for file in files] == [f"{name}.jsonl" for name in names]
    popular, random, asked, answered = map(read_lines, files)
    first = {"question_id": 0, "question": "Is there a thing 0 in the image?"}
    assert popular == [{**first, "answer": "No, not at all.", "text": "No, not at all."}]
    assert [(row["question_id"], row["answer"]) for row in random] == [(1, "Yes"), (2, "")]
    # eval_pope.py: an answer's category is that of the question with its id.
    categories = {row["question_id"]: row["category"] for row in asked}
    assert [(categories[row["question_id"]], row["text"]) for row in answered] == [
        ("popular", "No, not at all."),
        ("random", "Yes"),
        ("random", ""),
    ]


def test_ids_are_those_of_llavas_questions(tmp_path: Path) -> None:
    put_split(tmp_path, "coco_pope_random.json", ["yes", "no"])
    (*_, asked, _) = read_pope(str(tmp_path)).write(tmp_path, ["Yes", "No"])
    rows = [{**row, "question_id": 70 + row["question_id"]} for row in read_lines(asked)]
    put_lines(tmp_path / "llava_pope_test.jsonl", rows)
    (*_, answered) = read_pope(str(tmp_path)).write(tmp_path, ["Yes", "No"])
    assert [row["question_id"] for row in read_lines(answered)] == [70, 71]


def test_another_version_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put_split(tmp_path, "coco_pope_random.json", ["yes", "no"])
    read_pope(str(tmp_path))
    assert "POPE: 2 questions in random; published numbers rest on the 8910" in caplog.text
    assert "e3e3926" in caplog.text


def test_wrong_values_are_refused(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "a.jpg", "text": None, "label": "yes"}
    file = put_lines(tmp_path / "coco_pope_random.json", [row])
    (tmp_path / "val2014").mkdir()
    with pytest.raises(DataError, match=f"{file}: .*line 1 has text=None, which is no text"):
        read_pope(str(tmp_path))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_pope(str(tmp_path))
    for split in ("adversarial", "popular", "random"):
        assert f"  {split}: no {tmp_path}/coco_pope_{split}.json or " in str(error.value)
    file = put_split(tmp_path, "coco_pope_random.json", ["yes", "maybe"])
    message = f"{file}: question 1: expected the label yes or no, found 'maybe'."
    with pytest.raises(DataError, match=message):
        read_pope(str(tmp_path))
