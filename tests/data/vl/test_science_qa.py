"""Proves that ScienceQA is trained on as it is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe.data.vl.conversations import questions_answered
from dynmoe.data.vl.readers import science_qa
from dynmoe.errors import DataError
from dynmoe.questions.choices import read_scienceqa


def problem(**fields: Any) -> dict[str, Any]:
    row = {"question": "Which?", "choices": ["ice", "fire"], "answer": 1, "hint": "", "image": None}
    return row | {"grade": "grade3", "subject": "natural science"} | fields


def put(root: Path, problems: dict[str, Any], **splits: list[str]) -> str:
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps(splits))
    for split in ("train", "val", "test"):
        folder = root / "images" / split / "2"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(folder / "image.png")
    return str(root)


PROBLEMS = {
    "1": problem(hint="It is  cold."),
    "2": problem(image="image.png", answer=0),
}
INSTRUCTION = "Answer with the option's letter from the given choices directly."
FIRST = f"Context: It is cold.\nWhich?\nA. ice\nB. fire\n{INSTRUCTION}"
SECOND = f"Which?\nA. ice\nB. fire\n{INSTRUCTION}"


def test_problems_of_a_split(tmp_path: Path) -> None:
    root = put(tmp_path, PROBLEMS, train=["2", "1"], val=["1"], test=["1", "2"])
    source = science_qa(root)
    assert (source.name, list(source)) == (
        "scienceqa train",
        [
            questions_answered("2", [(SECOND, "A")], ["2/image.png"]),
            questions_answered("1", [(FIRST, "B")]),
        ],
    )
    assert source.load_image("2/image.png").size == (2, 2)
    assert [each.id for each in science_qa(root, split="val")] == ["1"]
    assert source.digest != science_qa(root, split="val").digest


def test_it_is_asked_as_the_test_set_is(tmp_path: Path) -> None:
    root = put(tmp_path, PROBLEMS, train=["1", "2"], test=["1", "2"])
    asked = [each.messages[0].text.removeprefix("<image>\n") for each in science_qa(root)]
    test = read_scienceqa(root)
    assert asked == [question.text for question in test.questions]
    assert test.score([each.messages[1].text for each in science_qa(root)])["score"] == 1


@pytest.mark.parametrize("broken", [{}, {"2": problem(answer=2)}, {"2": problem(answer="A")}])
def test_broken_problems(tmp_path: Path, broken: dict[str, Any]) -> None:
    root = put(tmp_path, {"1": problem()} | broken, train=["1", "2"])
    with pytest.raises(DataError) as error:
        science_qa(root)
    assert str(error.value) == (
        f"{root}/problems.json: problems of train that are missing or whose answer is not the "
        "place of a choice (1): 2."
    )


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pid_splits\.json: expected an object with an array"):
        science_qa(put(tmp_path, PROBLEMS, test=["1"]))
    root = put(tmp_path, PROBLEMS, train=["2"])
    (tmp_path / "images" / "train" / "2" / "image.png").unlink()
    with pytest.raises(DataError, match=r"problems\.json: images not in .* \(1\): 2/image\.png\."):
        science_qa(root)
