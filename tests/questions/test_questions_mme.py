"""Proves that MME is read in both layouts, scored and written as its calculation.py does."""

from __future__ import annotations

from pathlib import Path

import pytest
from question_files import picture, put

from dynmoe.errors import DataError
from dynmoe.questions.yes_no import COGNITION, PERCEPTION, parse_answer, read_mme

ASK = "Is it {}? Please answer yes or no."


def put_task(root: Path, task: str, stems: list[str], folders: bool = False) -> None:
    images = root / task / "images" if folders else root / task
    texts = root / task / "questions_answers_YN" if folders else root / task
    for stem in stems:
        picture(images / f"{stem}.png")
        put(texts / f"{stem}.txt", f"{ASK.format('a')}\tYes\r\n{ASK.format('b')}\tNo\r\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images of existence in folders of their own, one of every other task beside its text."""
    for task in (*PERCEPTION, *COGNITION):
        put_task(tmp_path, task, ["0001"])
    (tmp_path / "existence").rename(tmp_path / "gone")
    put_task(tmp_path, "existence", ["0002", "0001"], folders=True)
    return tmp_path


def test_questions(root: Path) -> None:
    found = read_mme(str(root)).questions
    assert [question.id for question in found[:6]] == [
        *("existence/0001/0", "existence/0001/1", "existence/0002/0", "existence/0002/1"),
        *("count/0001/0", "count/0001/1"),
    ]
    assert found[0].text == "Is it a?\nAnswer the question using a single word or phrase."
    assert (found[0].images, found[0].kind) == (("existence/images/0001.png",), "existence")
    assert found[4].images == ("count/0001.png",)
    assert len(found) == 2 * (14 + 1)


@pytest.mark.parametrize("folder", ["MME_Benchmark", "MME_Benchmark_release_version/MME_Benchmark"])
def test_the_zips_folders_are_found(tmp_path: Path, folder: str) -> None:
    for task in (*PERCEPTION, *COGNITION):
        put_task(tmp_path / folder, task, ["x"])
    found = read_mme(str(tmp_path))
    assert found.load_image(found.questions[-1].images[0]).size == (2, 1)


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("Yes", "yes"),
        ("no", "no"),
        ("No, it is not", "no"),
        ("not", "no"),
        ("know", "no"),  # by the official rule
        ("a yes", "other"),  # only four characters count
        ("a\n\tno", "no"),  # those of the line in the results file
        ("", "other"),
        ("Maybe", "other"),
    ],
)
def test_answers_are_parsed(answer: str, parsed: str) -> None:
    assert parse_answer(answer) == parsed


def test_points(root: Path) -> None:
    found = read_mme(str(root))
    answers = ["Yes", "No"] * 15
    assert found.score(answers)["score"] == 1.0
    # existence: 3 of 4 answers, 1 of 2 images: 75 + 50. OCR: 1 of 2, none: 50. code: none.
    answers[0] = "Maybe"
    ocr = 2 * (1 + PERCEPTION.index("OCR"))
    answers[ocr] = "no"
    answers[-2:] = ["", ""]
    scores = found.score(answers)
    assert scores == {
        "score": (8 * 200 + 125 + 50) / 2000,
        "perception_points": 8 * 200 + 125 + 50,
        "cognition_points": 600,
        **{f"{task.lower()}_points": 200 for task in (*PERCEPTION, *COGNITION)},
        "existence_points": 125,
        "ocr_points": 50,
        "code_reasoning_points": 0,
    }


def test_results_are_what_calculation_py_reads(root: Path) -> None:
    found = read_mme(str(root))
    files = found.write(root / "out", ["Yes", "no,\tnot\nat all", "", "No"] + ["Yes", "No"] * 13)
    assert [file.name for file in files] == [f"{task}.txt" for task in (*PERCEPTION, *COGNITION)]
    assert files[0].read_text() == (
        "0001.png\tIs it a? Please answer yes or no.\tYes\tYes\n"
        "0001.png\tIs it b? Please answer yes or no.\tNo\tno, not at all\n"
        "0002.png\tIs it a? Please answer yes or no.\tYes\t\n"
        "0002.png\tIs it b? Please answer yes or no.\tNo\tNo\n"
    )
    assert all(len(line.split("\t")) == 4 for file in files for line in file.open())


def test_images_may_be_elsewhere(root: Path) -> None:
    for task in (*PERCEPTION, *COGNITION):
        for stem in ("0001", "0002"):
            picture(root / "pictures" / task / f"{stem}.jpg", "blue")
    found = read_mme(str(root), str(root / "pictures"))
    assert found.questions[0].images == ("existence/0001.jpg",)
    assert found.load_image("existence/0001.jpg").getpixel((0, 0))[2] > 200


def test_everything_wrong_is_named(root: Path) -> None:
    (root / "color" / "0001.png").unlink()
    put(root / "count" / "0001.txt", "Is it?\tYes\n")
    put(root / "scene" / "0001.txt", "Is it?\tYes\nIs it?\tPerhaps\n")
    (root / "OCR" / "0001.txt").unlink()
    with pytest.raises(DataError) as error:
        read_mme(str(root))
    assert str(error.value) == (
        "MME cannot be read:\n"
        f"  {root}/count/0001.txt: expected two lines: question, tab, Yes or No\n"
        f"  {root}/color/0001.txt: no image 0001 in {root}/color\n"
        f"  {root}/scene/0001.txt: expected two lines: question, tab, Yes or No\n"
        f"  {root}/OCR: no texts"
    )


def test_all_tasks_are_needed(root: Path) -> None:
    (root / "posters").rename(root / "away")
    with pytest.raises(DataError, match=f"posters: no {root}/posters or {root}/MME_Benchmark_"):
        read_mme(str(root))
