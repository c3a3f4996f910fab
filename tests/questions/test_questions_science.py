"""Proves that ScienceQA is read, parsed, scored and written as LLaVA and ScienceQA do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from question_files import picture, put, read_lines

from dynmoe.errors import DataError
from dynmoe.questions.choices import parse_choice, read_scienceqa

INSTRUCTION = "\nAnswer with the option's letter from the given choices directly."


def problem(answer: int, choices: list[str], subject: str, grade: int, hint="", image=None):
    return {
        "question": "Which  one?",
        "choices": choices,
        "answer": answer,
        "hint": hint,
        "image": image,
        "task": "closed choice",
        "grade": f"grade{grade}",
        "subject": subject,
        "lecture": "",
        "solution": "",
        "split": "test",
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    problems = {
        "1": problem(0, ["x", "y"], "natural science", 2),  # not of the test set
        "4": problem(1, ["x", "y"], "natural science", 6, hint="Look.", image="image.png"),
        "5": problem(2, ["x", "y", "z"], "language science", 7),
        "11": problem(0, ["x", "y"], "social science", 12, image="image.png"),
    }
    put(tmp_path / "problems.json", problems)
    put(tmp_path / "pid_splits.json", {"train": ["1"], "test": ["4", "5", "11"]})
    picture(tmp_path / "images" / "test" / "4" / "image.png")
    picture(tmp_path / "images" / "test" / "11" / "image.png")
    return tmp_path


def test_questions(root: Path) -> None:
    found = read_scienceqa(str(root)).questions
    assert [(question.id, question.images, question.kind) for question in found] == [
        ("4", ("4/image.png",), "natural science"),
        ("5", (), "language science"),
        ("11", ("11/image.png",), "social science"),
    ]
    assert [question.text for question in found[:2]] == [
        f"Context: Look.\nWhich one?\nA. x\nB. y{INSTRUCTION}",
        f"Which one?\nA. x\nB. y\nC. z{INSTRUCTION}",
    ]


@pytest.mark.parametrize(
    ("answer", "choices", "place"),
    [
        ("B", 2, 1),
        ("C", 2, -1),  # there are two options only
        ("E", 5, 4),
        ("F", 5, -1),
        ("b", 2, -1),
        ("B. because", 2, 1),
        ("B.", 2, -1),  # as in LLaVA: neither a letter alone nor "B. "
        ("Because", 2, -1),
        ("So: The answer is B.", 2, 1),
        ("The answer is B", 2, -1),
        ("The answer is A. The answer is B.", 2, -1),
        ("AB", 2, -1),
        ("", 2, -1),
    ],
)
def test_answers_are_parsed(answer: str, choices: int, place: int) -> None:
    assert parse_choice(answer, choices) == place


def test_scores(root: Path) -> None:
    found = read_scienceqa(str(root))
    assert found.score(["B", "C. z", "no idea"]) == {
        "score": 2 / 3,
        "img": 1 / 2,
        "txt": 1.0,
        "no": 1.0,
        "nat": 1.0,
        "soc": 0.0,
        "lan": 1.0,
        "g1_6": 1.0,
        "g7_12": 1 / 2,
    }


def test_columns_without_questions_are_left_out(root: Path) -> None:
    put(root / "pid_splits.json", {"test": ["5"]})
    assert read_scienceqa(str(root)).score(["A"]) == {
        "score": 0.0,
        "no": 0.0,
        "lan": 0.0,
        "g7_12": 0.0,
    }


def test_files_are_what_both_evaluators_read(root: Path) -> None:
    found = read_scienceqa(str(root))
    answers, result = found.write(root / "out", ["B", " The answer is C.", "no idea"])
    rows = read_lines(answers)
    assert answers.name == "scienceqa_answers.jsonl"
    assert [(row["question_id"], row["text"]) for row in rows] == [
        ("4", "B"),
        ("5", "The answer is C."),
        ("11", "no idea"),
    ]
    assert rows[0]["prompt"] == f"<image>\n{found.questions[0].text}"
    assert rows[1]["prompt"] == found.questions[1].text
    assert result.name == "scienceqa_result.json"
    assert json.loads(result.read_text()) == {
        "acc": pytest.approx(200 / 3),
        "correct": 2,
        "count": 3,
        "results": {"4": 1, "5": 2, "11": -1},
        "outputs": {"4": "B", "5": "The answer is C.", "11": "no idea"},
    }


def llava_row(id: str, text: str) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "The answer is A."}]
    return {"id": id, "conversations": turns}


def test_llavas_questions_are_asked_where_they_are_there(root: Path) -> None:
    rows = [llava_row("11", "Look\n<image>"), llava_row("5", "Think"), llava_row("4", "<image>\nA")]
    file = put(root / "llava_test_CQM-A.json", rows)
    texts = [question.text for question in read_scienceqa(str(root)).questions]
    assert texts == [f"{text}{INSTRUCTION}" for text in ("A", "Think", "Look")]
    put(file, [*rows[:2], llava_row("7", "x")])
    with pytest.raises(DataError, match=r"missing \(1\): 4, unknown \(1\): 7"):
        read_scienceqa(str(root))


def test_refusals(root: Path) -> None:
    put(root / "pid_splits.json", {"test": ["4", "6", "8"]})
    with pytest.raises(DataError, match=r"problems of test that are missing .* \(2\): 6; 8"):
        read_scienceqa(str(root))
    put(root / "pid_splits.json", {"val": ["4"]})
    with pytest.raises(DataError, match="expected an object with an array of ids under 'test'"):
        read_scienceqa(str(root))
    put(root / "pid_splits.json", {"test": ["4"]})
    (root / "images" / "test" / "4" / "image.png").unlink()
    with pytest.raises(DataError, match=r"scienceqa: images not in .* \(1\): 4/image.png"):
        read_scienceqa(str(root))
