"""Proves how LLaVA's files become conversations, and how broken ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe.data.vl.conversations import Conversation, ImageFolder, Message
from dynmoe.data.vl.readers import read_entry, read_llava
from dynmoe.errors import DataError


def entry(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": "33", **fields, "conversations": conversations}


def read(*turns: tuple[str, str], **fields: Any) -> list[tuple[str, str]]:
    found = read_entry(entry(*turns, **fields), 5, "file")
    assert found is not None
    return [tuple(message) for message in found.messages]


def put(folder: Path, name: str, entries: list[dict[str, Any]]) -> str:
    text = json.dumps(entries) if name.endswith(".json") else "\n".join(map(json.dumps, entries))
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("value", "image", "text"),
    [
        ("<image>\nWhat is it?", "a.jpg", "<image>\nWhat is it?"),
        ("What is it?\n<image>", "a.jpg", "<image>\nWhat is it?"),
        ("What is it?", "a.jpg", "<image>\nWhat is it?"),
        ("What is it?", ["a.jpg", "b.jpg"], "<image>\n<image>\nWhat is it?"),
        ("Is <image> like <image>?", ["a.jpg", "b.jpg"], "Is <image> like <image>?"),
        ("What is an <image> tag?", None, "What is an <image > tag?"),
        ("What is it?", "", "What is it?"),
    ],
)
def test_placeholders(value: str, image: Any, text: str) -> None:
    assert read(("human", value), ("gpt", "It."), image=image) == [
        ("user", text),
        ("assistant", "It."),
    ]


def test_images_of_several_turns_stay_in_their_turns() -> None:
    turns = [("human", "this\n<image>"), ("gpt", "a"), ("human", "that\n<image>"), ("gpt", "b")]
    assert read(*turns, image=["x", "y"])[::2] == [
        ("user", "<image>\nthis"),
        ("user", "<image>\nthat"),
    ]


def test_only_what_answers_a_human_is_kept() -> None:
    turns = [("system", "be kind"), ("gpt", "hi"), ("human", "q"), ("gpt", "a"), ("human", "r")]
    assert read(*turns) == [("user", "q"), ("assistant", "a")]
    assert read(("user", "q"), ("assistant", "a")) == [("user", "q"), ("assistant", "a")]
    assert read_entry(entry(("gpt", "hi"), ("human", "q")), 0, "file") is None


def test_files_in_turn(tmp_path: Path) -> None:
    one = [entry(("human", "q"), ("gpt", "a"), id=7), entry(("gpt", "hi"))]
    two = [entry(("human", "<image>\nr"), ("gpt", "b"), image="sub/x.png")]
    two[0]["id"] = None
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("L", (3, 2), 200).save(tmp_path / "images" / "sub" / "x.png")
    files = [put(tmp_path, "one.json", one), put(tmp_path, "two.jsonl", two)]
    source = read_llava("mix", files, str(tmp_path / "images"))
    expected = [
        Conversation("7", (Message("user", "q"), Message("assistant", "a"))),
        Conversation(
            "0", (Message("user", "<image>\nr"), Message("assistant", "b")), ("sub/x.png",)
        ),
    ]
    assert (source.name, list(source), list(source)) == ("mix", expected, expected)
    image = source.load_image("sub/x.png")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (3, 2), (200, 200, 200))
    assert source.digest != read_llava("mix", files[:1]).digest
    assert len(source.digest) == 16


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (
            {"id": 1, "text": "x"},
            "conversation '1': expected a list conversations, found the keys id, text",
        ),
        (
            entry(("human", "q"), ("robot", "a")),
            "conversation '33', turn 1: expected \"from\" (human, user, gpt, assistant, system) "
            "and a text \"value\", found {'from': 'robot', 'value': 'a'}",
        ),
        (
            entry(("human", "q"), ("gpt", None)),  # type: ignore[arg-type]
            "conversation '33', turn 1: expected \"from\" (human, user, gpt, assistant, system) "
            "and a text \"value\", found {'from': 'gpt', 'value': None}",
        ),
        (
            entry(("human", "q"), ("gpt", "a"), image=[3]),
            "conversation '33': expected image to be a path or a list of them, found [3]",
        ),
        (
            entry(("human", "q"), ("gpt", "a"), video="x.mp4"),
            "conversation '33': has a video; only images can be shown. Take the entry out",
        ),
        (
            entry(("human", "q\n<image>"), ("gpt", "a")),
            "conversation '33': the first turn has <image>, but there is no image",
        ),
        (
            entry(("human", "<image><image>"), ("gpt", "a"), image="x"),
            "conversation '33': expected as many <image> as images, found 2 and 1",
        ),
        (
            entry(("human", "q"), ("human", "r"), ("gpt", "a")),
            "conversation '33': expected alternating user and assistant, the assistant last; "
            "found user, user, assistant",
        ),
    ],
)
def test_broken_entries(tmp_path: Path, broken: dict[str, Any], problem: str) -> None:
    file = put(tmp_path, "mix.json", [entry(("human", "q"), ("gpt", "a")), broken])
    with pytest.raises(DataError) as error:
        list(read_llava("mix", [file]))
    assert str(error.value) == f"{file}, entry 1, {problem}."


def test_missing_images_are_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "0.jpg").touch()
    keys = ["there/0.jpg", *(f"there/{n}.jpg" for n in range(1, 7)), "gone/1.jpg", "gone/1.jpg"]
    entries = [entry(("human", "q"), ("gpt", "a"), image=key) for key in keys]
    file = put(tmp_path, "mix.json", entries)
    with pytest.raises(DataError) as error:
        read_llava("mix", [file], str(tmp_path))
    assert str(error.value) == (
        f"{file}: images not in {tmp_path} (7): there/1.jpg; there/2.jpg; there/3.jpg; "
        "there/4.jpg; there/5.jpg and more. Give the folder from which these paths start, and "
        "fetch what it lacks."
    )
    with pytest.raises(DataError, match=r"image there/0\.jpg: no image folder given\."):
        read_llava("mix", [file])
    with pytest.raises(DataError, match=r"there/0\.jpg: cannot be read as an image"):
        ImageFolder(tmp_path).load("there/0.jpg")


def test_no_such_files(tmp_path: Path) -> None:
    gone, folder = str(tmp_path / "gone.json"), str(tmp_path / "images")
    with pytest.raises(DataError) as error:
        read_llava("mix", [gone], folder)
    assert str(error.value) == f"data mix: no file {gone}, no image folder {folder}."
