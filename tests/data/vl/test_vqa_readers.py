"""Proves how tables of questions and easy-VQA become conversations and question sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe.data.vl import readers
from dynmoe.data.vl.content import baselines, trained_on
from dynmoe.data.vl.conversations import Conversation, questions_answered
from dynmoe.data.vl.readers import (
    caption_of,
    easy_vqa_questions,
    easy_vqa_source,
    read_rows,
    vqa_questions,
    vqa_table,
)
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

ROWS: list[dict[str, Any]] = [
    {"id": "a1", "question": "what?", "answer": "cat", "image": "x.png", "kind": "animal"},
    {"id": "a2", "question": "two, or more?", "answers": ["1", "2", "2", "1"], "image": ""},
    {"id": "", "question": "red?", "answer": "no", "image": "x.png"},
]
SUFFIX = "\nAnswer briefly."


def images(folder: Path, *names: str) -> str:
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / name)
    return str(folder)


def table(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    if name.endswith(".csv"):
        columns = ["id", "question", "answer", "answers", "image", "kind"]
        lines = [columns]
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            lines.append([cell if isinstance(cell, str) else json.dumps(cell) for cell in cells])
        text = "\n".join(
            ",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines
        )
    else:
        text = json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize("name", ["vqa.json", "vqa.jsonl", "vqa.csv"])
def test_a_table(tmp_path: Path, name: str) -> None:
    folder = images(tmp_path / "images", "x.png")
    file = table(tmp_path, name, ROWS)
    source = vqa_table("pets", file, folder, SUFFIX)
    assert list(source) == [
        questions_answered("a1", [(f"what?{SUFFIX}", "cat")], ["x.png"]),
        questions_answered("a2", [(f"two, or more?{SUFFIX}", "1")]),
        questions_answered("2", [(f"red?{SUFFIX}", "no")], ["x.png"]),
    ]
    assert source.load_image("x.png").getpixel((0, 0)) == (1, 2, 3)
    questions = vqa_questions("pets", file, folder, SUFFIX)
    assert questions.questions == [
        Question("a1", f"what?{SUFFIX}", ("x.png",), "animal"),
        Question("a2", f"two, or more?{SUFFIX}"),
        Question("2", f"red?{SUFFIX}", ("x.png",)),
    ]
    assert questions.score(["Cat.", "1", "yes"]) == {"score": 2 / 3, "kind_animal": 1}
    assert source.digest != vqa_table("pets", file, folder).digest


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": " ", "answer": "x"},
            ", row 1: expected a question, found question=' ', answer='x'.",
        ),
        (
            {"question": "q"},
            ", row 1: expected an answer, or a list answers, each text, a number, true or false; "
            "found question='q'.",
        ),
        (
            {"question": "q", "answers": "x"},
            ", row 1: expected an answer, or a list answers, each text, a number, true or false; "
            "found question='q', answers='x'.",
        ),
        (
            {"question": "q", "answer": "a", "image": {"path": 1}},
            ", row 1: expected image to be a path or a list of them, found {'path': 1}.",
        ),
    ],
)
def test_a_broken_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = table(tmp_path, "vqa.json", [{"question": "q", "answer": 0}, row])
    with pytest.raises(DataError) as error:
        vqa_table("pets", file)
    assert str(error.value) == file + message


NO_ANSWER = [
    {"answer": None},
    {"answers": [None, None, "yes"]},
    {"answer": float("nan")},
    {"answer": float("inf")},
    {"answer": ["yes", "no"]},
    {"answer": {"text": "yes"}},
    {"answers": [["yes"]]},
    {"answers": [{"text": "yes"}]},
    {"answers": [{"answer": None}]},
    {"answers": "yes"},
    {"answers": 0, "answer": "yes"},
    {"answers": ["yes", " "]},
    {},
]


@pytest.mark.parametrize("answered", NO_ANSWER)
@pytest.mark.parametrize("name", ["vqa.json", "vqa.jsonl"])
def test_what_is_no_answer_is_refused(tmp_path: Path, name: str, answered: Any) -> None:
    file = table(tmp_path, name, [{"question": "q", "answer": "a"}, {"question": "q", **answered}])
    with pytest.raises(DataError, match=f"^{file}, (row|entry) 1: (expected an answer|not JSON)"):
        list(read_rows(Path(file)))


@pytest.mark.parametrize(
    ("answered", "text"),
    [
        ({"answer": 0}, "0"),
        ({"answer": 2.5}, "2.5"),
        ({"answer": False}, "False"),
        ({"answers": [0, 0, "yes"]}, "0"),
        (
            {"answers": [{"answer": "no"}, {"answer": "yes", "answer_id": 2}, {"answer": "yes"}]},
            "yes",
        ),
        ({"answers": [], "answer": "x"}, "x"),
        ({"answers": None, "answer": "None"}, "None"),
    ],
)
def test_texts_numbers_and_booleans_are_answers(tmp_path: Path, answered: Any, text: str) -> None:
    file = table(tmp_path, "vqa.jsonl", [{"question": "q", **answered}])
    assert [row.answer for row in read_rows(Path(file))] == [text]


def test_ids_and_kinds_that_are_false_are_kept(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "kind": 0},
        {"id": 0, "kind": False},
        {"question_id": 7},
        {"id": None},
    ]
    file = table(tmp_path, "vqa.jsonl", [{"question": "q", "answer": "a", **row} for row in rows])
    found = vqa_questions("pets", file).questions
    assert [(each.id, each.kind) for each in found] == [
        ("1", "0"),
        ("0", "False"),
        ("7", ""),
        ("3", ""),
    ]


@pytest.mark.parametrize("key", ["ID", "Kind", "kinds", " id"])
def test_other_spellings_of_columns_are_refused(tmp_path: Path, key: str) -> None:
    file = table(tmp_path, "vqa.jsonl", [{"question": "q", "answer": "a", key: "x"}])
    with pytest.raises(DataError, match=f"row 0: the key '{key}' is not read. Call it (id|kind)"):
        list(read_rows(Path(file)))


@pytest.mark.parametrize("name", ["vqa.CSV", "vqa.tsv", "vqa.TSV", "vqa.tab"])
def test_suffixes_of_tables(tmp_path: Path, name: str) -> None:
    delimiter = "," if name == "vqa.CSV" else "\t"
    lines = ["question", " answer"], ["what, or who?", "a cat"], ["null?", "null"]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines)
    (tmp_path / name).write_text(text)
    found = [(row.question, row.answer) for row in read_rows(tmp_path / name)]
    assert found == [("what, or who?", "a cat"), ("null?", "null")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what,a.jpg\n", "line 2: expected 3 cells, as in the header, found 2"),
        ("what,a.jpg,x,y\n", "line 2: expected 3 cells, as in the header, found 4"),
        ('"what,a.jpg,x\nwho,b.jpg,y\n', "line 3: unexpected end of data"),
        ('what,a.jpg,x\n"who,b.jpg,y\nhow,"c.jpg",z\n', "line 4: ',' expected after"),
        ('how,a.jpg,"6\nwho,b.jpg,12""\n', "line 3: unexpected end of data"),
        ("", "expected rows with question and answer, found none"),
    ],
)
def test_stray_quotes_and_short_rows(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "vqa.csv").write_text(f"question,image,answer\n{text}")
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(tmp_path / "vqa.csv"))
    assert str(tmp_path / "vqa.csv") in str(error.value)


def test_a_cell_of_several_rows_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = "question,image,answer\n"
    (tmp_path / "vqa.csv").write_text(f'{header}how?,,"6\nwho?,,12"\n')  # inches
    assert len(list(read_rows(tmp_path / "vqa.csv"))) == 1
    assert "line 2: a cell looks like several rows. A cell with the delimiter" in caplog.text
    caplog.clear()
    (tmp_path / "vqa.csv").write_text(f'{header}"how?\nA. 6, B. 7",,"say ""6"""\n')
    assert [row.answer for row in read_rows(tmp_path / "vqa.csv")] == ['say "6"']
    assert not caplog.text


@pytest.mark.parametrize("name", ["vqa.json", "vqa.jsonl", "vqa.csv"])
def test_an_empty_table(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[]" if name == "vqa.json" else "")
    for read in (vqa_table, vqa_questions):
        with pytest.raises(DataError, match=rf"{name}: expected rows with question and answer"):
            read("pets", str(tmp_path / name))


def test_a_table_lacks_its_images(tmp_path: Path) -> None:
    file = table(tmp_path, "vqa.jsonl", ROWS)
    with pytest.raises(DataError, match=r"vqa\.jsonl: images not in .* \(1\): x\.png\. Give the"):
        vqa_questions("pets", file, images(tmp_path / "images"))


def test_answers_in_csv_are_json(tmp_path: Path) -> None:
    (tmp_path / "vqa.csv").write_text("question,answers\nq,one|two\n")
    with pytest.raises(DataError, match=r"Expected CSV whose answers are JSON lists\."):
        vqa_table("pets", str(tmp_path / "vqa.csv"))


EASY = [
    ["what is the blue shape?", "circle", 3],
    ["is there a red shape?", "no", 3],
    ["is no blue shape present?", "no", 3],
    ["what color is the shape?", "teal", 5],
]


def easy(root: Path) -> str:
    for split in ("train", "test"):
        images(root / split / "images", "3.png", "5.png")
        (root / split / "questions.json").write_text(json.dumps(EASY))
    return str(root)


def test_easy_vqa_to_train_on(tmp_path: Path) -> None:
    source = easy_vqa_source("questions", easy(tmp_path), max_turns=2)
    found = {each.id: each for each in source}
    assert list(found) == ["3-0", "3-2", "5-0"]
    assert [(len(each.messages), each.images) for each in source] == [
        (4, ("3.png",)),
        (2, ("3.png",)),
        (2, ("5.png",)),
    ]
    texts = [
        (question.text, answer.text)
        for each in source
        for question, answer in zip(each.messages[::2], each.messages[1::2], strict=True)
    ]
    assert sorted((text.replace("<image>\n", ""), answer) for text, answer in texts) == sorted(
        (question, answer) for question, answer, _ in EASY
    )
    assert source.load_image("3.png").size == (4, 4)


def test_easy_vqa_to_align_with(tmp_path: Path) -> None:
    source = easy_vqa_source("captions", easy(tmp_path))
    assert list(source) == [
        questions_answered("3-0", [("what is in the image?", "a blue circle")], ["3.png"]),
        questions_answered("5-0", [("what is in the image?", "a teal shape")], ["5.png"]),
    ]
    digests = [easy_vqa_source("questions", str(tmp_path), turns).digest for turns in (1, 2)]
    assert len({source.digest, *digests}) == 3


@pytest.mark.parametrize(
    ("asked", "caption"),
    [
        ([("is there a red shape?", "yes"), ("is a circle present?", "no")], "a red shape"),
        ([("is there not a circle?", "no"), ("is no red shape present?", "yes")], "a circle"),
        ([("is there not a circle?", "yes"), ("is there a red shape?", "no")], None),
        ([("what is the color of the triangle?", "gray")], "a gray triangle"),
    ],
)
def test_what_questions_say_of_an_image(asked: list[tuple[str, str]], caption: str | None) -> None:
    assert caption_of([(question, answer, 0) for question, answer in asked]) == caption


def test_easy_vqa_to_be_answered(tmp_path: Path) -> None:
    root = easy(tmp_path)
    questions = easy_vqa_questions(root)
    assert [each.kind for each in questions.questions] == ["shape", "yes_no", "yes_no", "colour"]
    assert questions.score(["circle", "no", "yes", "red"]) == {
        "score": 0.5,
        "kind_colour": 0,
        "kind_shape": 1,
        "kind_yes_no": 0.5,
    }
    shuffled = questions.with_other_images()
    assert [each.images for each in shuffled.questions] == [("5.png",)] * 3 + [("3.png",)]


def test_easy_vqa_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    message = r"^easy-VQA is not installed: .* as data\.content\.root\.$"
    with pytest.raises(ConfigError, match=message):
        easy_vqa_source("questions")


def test_easy_vqa_is_found_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "easy_vqa").mkdir()
    (tmp_path / "easy_vqa" / "__init__.py").write_text("raise ImportError")
    easy(tmp_path / "easy_vqa" / "data")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(easy_vqa_questions().questions) == len(EASY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "texts"}, "easy-VQA: expected the kind captions or questions, found 'texts'."),
        (
            {"kind": "questions", "max_turns": 0},
            "easy-VQA: expected max_turns of 1 or more, found 0.",
        ),
    ],
)
def test_impossible_settings(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        easy_vqa_source(root=easy(tmp_path), **arguments)
    assert str(error.value) == message


def test_easy_vqa_is_damaged(tmp_path: Path) -> None:
    root = easy(tmp_path)
    (tmp_path / "test" / "images" / "5.png").unlink()
    with pytest.raises(DataError, match=r"questions\.json: images not in .* \(1\): 5\.png\."):
        easy_vqa_questions(root)
    for rows in ([["q", "a"]], [["q", None, 1]], [["q", "a", "1"]], [], {"q": "a"}):
        (tmp_path / "train" / "questions.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=r"a list of \[question, answer, image number\]"):
            easy_vqa_source("questions", root)


def no_image(key: str) -> Image.Image:
    raise AssertionError(key)


def test_baselines_are_those_of_the_training_answers() -> None:
    training = [
        questions_answered("0", [("colour ?", "red"), ("many ?", "one")], ["x"]),
        questions_answered("1", [("colour ?", "red"), ("where ?", "top")], ["y"]),
        questions_answered("2", [("many ?", "two"), ("many ?", "two")]),
    ]
    asked = ["colour ?", "many ?", "where ?", "shape ?"]
    questions = [Question(text, text) for text in asked]
    found = ExactMatch("own", questions, ["red", "one", "top", "red"], no_image)
    assert baselines(found, training) == {"majority": 0.5, "question only": 0.75}
    with pytest.raises(DataError, match="own: no training conversations to take answers from"):
        baselines(found, list[Conversation]())


def test_other_images_are_others() -> None:
    keys: list[tuple[str, ...]] = [("x",), ("x",), (), ("y",), ("x", "y"), ("x",)]
    questions = [Question(str(n), "q", images) for n, images in enumerate(keys)]
    found = ExactMatch("own", questions, ["a"] * 6, no_image).with_other_images()
    assert found.name == "own_shuffled"
    assert [each.images for each in found.questions] == [
        ("y",),
        ("y",),
        (),
        ("x", "y"),
        ("x",),
        ("y",),
    ]
    with pytest.raises(DataError, match="own: expected two images or more, found 1"):
        ExactMatch("own", questions[:3], ["a"] * 3, no_image).with_other_images()


def test_some_questions_evenly_spread() -> None:
    questions = [Question(str(n), f"{n} ?", (f"{n}.png",)) for n in range(7)]
    whole = ExactMatch("own", questions, list("abcdefg"), no_image)
    assert all(whole.spread(number) is whole for number in (None, 7, 9))
    some = whole.spread(3)
    assert [question.id for question in some.questions] == ["0", "2", "4"]
    assert some.records == ["a", "c", "e"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "vqa.json",
            '[{"question": "q", "answer": "a"}, {"question": "q", "answer": 1, "answer": 2}]',
        ),
        ("vqa.jsonl", '{"question": "q", "answer": 1, "answer": 2}'),
        ("vqa.jsonl", '{"question": "q", "answers": [{"answer": 1, "answer": 2}]}'),
        ("vqa.json", '[{"question": "q", "answers": [{"answer": 1, "answer": 2}]}]'),
    ],
)
def test_a_repeated_key_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="the key 'answer' twice"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize(("name", "other"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", ",")])
def test_a_table_with_other_separators_than_its_suffix_says(
    tmp_path: Path, name: str, other: str
) -> None:
    (tmp_path / name).write_text(f"question{other}answer\nwhat?{other}red\n")
    with pytest.raises(DataError, match=r"The separator of .csv is a comma, of .tsv a tab"):
        list(read_rows(tmp_path / name))


def test_answer_and_answers_agree_or_are_refused(tmp_path: Path) -> None:
    both = {"question": "q", "answers": ["red", "blue"], "answer": "blue"}
    file = table(tmp_path, "a.jsonl", [both, both | {"answers": [], "answer": "x"}])
    assert [row.answer for row in read_rows(Path(file))] == ["blue", "x"]
    file = table(tmp_path, "a.jsonl", [both | {"answers": ["red", "red", "blue"]}])
    with pytest.raises(DataError, match=r"row 0: answer 'blue' is not the most frequent"):
        list(read_rows(Path(file)))


def test_empty_images_beside_others_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = images(tmp_path / "images", "x.png")
    rows = [{"question": "q", "answer": "a", "image": name} for name in ("x.png", "", "")]
    list(vqa_table("pets", table(tmp_path, "a.jsonl", rows), folder))
    assert caplog.text.count("2 rows have an empty image") == 1
    caplog.clear()
    vqa_table("pets", table(tmp_path, "a.jsonl", rows[1:]), folder)
    assert not caplog.text


def test_questions_that_training_asks_too_are_counted(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "x.png", "y.png")
    row = {"question": "what?", "image": "x.png", "answer": "cat"}
    rows = [row, row | {"answer": "dog"}, row | {"image": "y.png"}, row | {"question": "who?"}]
    questions = vqa_questions("pets", table(tmp_path, "test.jsonl", rows), folder, SUFFIX)
    training = table(tmp_path, "train.csv", [row])
    assert trained_on(questions, vqa_table("pets", training, folder, SUFFIX)) == 1
    other = images(tmp_path / "others", "x.png")
    assert trained_on(questions, vqa_table("pets", training, other, SUFFIX)) == 0
