"""Proves what holds for every question set, and the sets made in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from question_files import picture, put, read_lines

from dynmoe.errors import ConfigError, DataError
from dynmoe.questions import SETS, read_question_set
from dynmoe.questions.base import FolderSet, Question, Unscored
from dynmoe.questions.exact import ExactMatch

QUESTIONS = [
    Question("1", "is it red?", ("a",), "color"),
    Question("2", "how many?", ("a",), "Count / Sum"),
    Question("3", "is it blue?", ("b",), "color"),
    Question("4", "what?"),
]
ANSWERS = ["yes", "2", "no.", "a cat"]


def exact(questions: list[Question] = QUESTIONS, answers: list[str] = ANSWERS) -> ExactMatch:
    return ExactMatch("toy", questions, answers, lambda key: Image.new("RGB", (1, 1), key))


def test_exact_match_counts_equal_answers() -> None:
    assert exact().score([" Yes.", "two", "NO", "A Cat ."]) == {
        "score": 3 / 4,
        "kind_color": 1.0,
        "kind_count_sum": 0.0,
    }
    assert exact().score([""] * 4)["score"] == 0.0
    assert exact().score(["yes..", "2", "", ""])["score"] == 1 / 4  # one full stop, not two


def test_exact_match_writes_both_answers(tmp_path: Path) -> None:
    (file,) = exact().write(tmp_path / "new", ["yes ", "zwölf", "", "x\ny"])
    assert file == tmp_path / "new" / "toy.jsonl"
    assert read_lines(file)[1] == {
        "question_id": "2",
        "prompt": "how many?",
        "text": "zwölf",
        "answer": "2",
    }
    assert [row["text"] for row in read_lines(file)] == ["yes", "zwölf", "", "x\ny"]


def test_exact_match_loads_what_it_is_given() -> None:
    assert exact().load_image("blue").getpixel((0, 0)) == (0, 0, 255)


def test_answers_are_one_per_question(tmp_path: Path) -> None:
    for use in (exact().score, lambda answers: exact().write(tmp_path, answers)):
        with pytest.raises(ValueError, match="toy: 3 answers to 4 questions"):
            use(["yes"] * 3)


def test_ids_stand_for_one_question() -> None:
    with pytest.raises(DataError, match=r"toy: several questions share an id \(1\): 1\."):
        exact([QUESTIONS[0], QUESTIONS[1], QUESTIONS[0]], ["yes", "2", "yes"])
    with pytest.raises(DataError, match="toy: no questions"):
        exact([], [])
    with pytest.raises(ValueError, match="toy: 4 records of 1 questions"):
        exact(QUESTIONS[:1])


def test_the_digest_is_of_the_content() -> None:
    assert exact().digest == exact().digest == "d057edda7b43d216"
    changed = [Question("1", "is it green?", ("a",), "color"), *QUESTIONS[1:]]
    others = [exact(changed), exact(answers=["no", *ANSWERS[1:]])]
    assert len({exact().digest, *(other.digest for other in others)}) == 3


def test_images_of_a_folder_are_rgb_or_refused(tmp_path: Path) -> None:
    class Exported(Unscored, FolderSet):
        note = "A judge scores it."

        def write(self, folder, answers):
            return []

    Image.new("L", (3, 2), 7).save(tmp_path / "grey.png")
    put(tmp_path / "text.png", "no image")
    exported = Exported("toy", [Question("1", "?", ("grey.png",))], [None], tmp_path)
    image = exported.load_image("grey.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (7, 7, 7))
    for key in ("text.png", "none.png"):
        with pytest.raises(DataError, match=f"{key}: cannot be read as an image"):
            exported.load_image(key)
    assert not exported.is_scored
    with pytest.raises(DataError, match=r"toy has no local score\. A judge scores it\."):
        exported.score(["yes"])


def test_a_folder_below_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "vizwiz" / "test" / "a.png")
    put(tmp_path / "vizwiz" / "test.json", [{"image": "a.png", "question": "q"}])
    for images in (None, "~/vizwiz/test"):
        found = read_question_set("vizwiz", "~/vizwiz", images)
        assert found.image_path("a.png") == tmp_path / "vizwiz" / "test" / "a.png"


def test_every_set_says_what_is_missing_and_where_to_get_it(tmp_path: Path) -> None:
    for name in SETS:
        with pytest.raises(DataError) as error:
            read_question_set(name, str(tmp_path / "none"))
        assert str(error.value).splitlines()[0].endswith(f"is not complete below {tmp_path}/none:")
        assert "Fetch it from https://" in str(error.value)


def test_an_image_folder_of_ones_own_takes_the_place_of_the_default(tmp_path: Path) -> None:
    put(tmp_path / "mm-vet.json", {"v1_0": {"imagename": "x.png", "question": "what?"}})
    picture(tmp_path / "images" / "x.png", "red")
    picture(tmp_path / "other" / "x.png", "blue")
    red, blue = (
        read_question_set("mm_vet", str(tmp_path), images).load_image("x.png").getpixel((0, 0))
        for images in (None, str(tmp_path / "other"))
    )
    assert (red, blue) == ((255, 0, 0), (0, 0, 255))
    with pytest.raises(DataError, match=f"images: no {tmp_path}/nowhere"):
        read_question_set("mm_vet", str(tmp_path), str(tmp_path / "nowhere"))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no question set vqa\. Choose one of vqav2, gqa, "):
        read_question_set("vqa", "/")


def test_reading_needs_no_torch() -> None:
    modules = ", ".join(f"dynmoe.questions.{module}" for module in set(SETS.values()))
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
