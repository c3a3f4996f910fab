"""Proves how LLaVA's files become conversations, and how broken ones are refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe.data.vl.conversations import Conversation, ImageFolder, Message, image_keys
from dynmoe.data.vl.readers import read_entry, read_llava
from dynmoe.errors import ConfigError, DataError


def entry(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    return {"id": "33", **fields, "conversations": conversations}


def read(*turns: tuple[str, str], placement: Any = "llava", **fields: Any) -> list[tuple[str, str]]:
    found = read_entry(entry(*turns, **fields), 5, "file", placement)
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


@pytest.mark.parametrize("value", [["a.jpg"], "a.jpg"])
def test_images_are_read_as_image(value: Any) -> None:
    turns = [("human", "q"), ("gpt", "a")]
    found = read_entry(entry(*turns, images=value), 0, "file")  # type: ignore[arg-type]
    assert found == read_entry(entry(*turns, image="a.jpg"), 0, "file")  # type: ignore[arg-type]
    assert found is not None and found.images == ("a.jpg",)


@pytest.mark.parametrize(
    "key",
    ["Image", "img", "image_path", "image_file", "imgs", "picture", "Photo", "imgae", "IMAGES"],
)
def test_other_names_of_images_are_refused(key: str) -> None:
    with pytest.raises(DataError, match=f"the key '{key}' is not read.*Call it image"):
        read_entry(entry(("human", "q"), ("gpt", "a"), **{key: "a.jpg"}), 0, "file")
    with pytest.raises(DataError, match=f"the key '{key}' is not read"):
        image_keys({"question": "q", "answer": "a", key: "a.jpg"}, "file")


def test_keys_about_an_image_may_stand_beside_it() -> None:
    turns = [("human", "q"), ("gpt", "a")]
    about = {"image_size": [3, 4], "model": "x", "image_id": 5, "images": None}
    found = read_entry(entry(*turns, image="a.jpg", **about), 0, "file")  # type: ignore[arg-type]
    assert found is not None and found.images == ("a.jpg",)
    for nothing in ({"img": ""}, {"video": None}, {"videos": []}):
        assert read_entry(entry(*turns, **nothing), 0, "file") is not None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "about",
    [
        {"image_id": 5},
        {"image_id": "000123"},
        {"image_size": [3, 4]},
        {"photo_credit": "J. Doe, Reuters/AP"},
        {"imagenet": {"wnid": "n02084071"}},
        {"picture_count": 0.5},
    ],
)
def test_text_may_have_keys_about_images(about: dict[str, Any]) -> None:
    turn = {"from": "gpt", "value": "a", **about}
    turns = [{"from": "human", "value": "q"}, turn]
    found = read_entry({"id": "0", "conversations": turns, **about}, 0, "file")
    assert found is not None and found.images == ()
    assert image_keys({"question": "q", "answer": "a", **about}, "file") == ()


@pytest.mark.parametrize(
    "value",
    [
        "a.JPEG",
        "train/a.webp",
        "https://x.org/a.png?size=9",
        "data:image/png;base64,eA==",
        "/9j/" + "A" * 300,
        '["a.jpg"]',
        ["a", "b.tif"],
        [{"path": "a.png", "bytes": None}],
    ],
)
def test_images_under_any_key_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="the key 'photo_of_it' is not read"):
        image_keys({"question": "q", "photo_of_it": value}, "file")
    turn = {"from": "human", "value": "q", "photo_of_it": value}
    with pytest.raises(DataError, match="turn 0: the key 'photo_of_it' is not read"):
        read_entry({"conversations": [turn]}, 0, "file")


@pytest.mark.parametrize(("id", "name"), [(0, "0"), (False, "False"), ("", "5"), (None, "5")])
def test_only_a_missing_id_is_replaced(id: Any, name: str) -> None:
    found = read_entry(entry(("human", "q"), ("gpt", "a"), id=id), 5, "file")
    assert found is not None and found.id == name


def test_openai_messages() -> None:
    image = {"type": "image_url", "image_url": {"url": "a.jpg"}}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "It."},
    ]
    found = read_entry({"messages": messages}, 0, "file")
    assert found == Conversation(
        "0", (Message("user", "<image>\nWhat is it?"), Message("assistant", "It.")), ("a.jpg",)
    )
    messages[1]["content"][0] = {"type": "image"}
    assert read_entry({"messages": messages, "images": ["a.jpg"]}, 0, "file") == found
    messages[1]["content"] = "<image>\nWhat is it?"
    assert read_entry({"conversations": messages, "image": "a.jpg"}, 0, "file") == found


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://x.org/a.jpg"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,eA=="}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "text", "text": None},
        "q",
    ],
)
def test_other_parts_of_messages_are_refused(part: Any) -> None:
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]
    with pytest.raises(DataError, match="turn 0: expected texts, and images with a path"):
        read_entry({"messages": messages}, 0, "file")


def test_half_a_character_is_no_text() -> None:
    with pytest.raises(DataError, match=r"turn 1: expected .from.*and a text .value."):
        read(("human", "q"), ("gpt", "\ud800"))


def test_the_placement_of_moe_llava(tmp_path: Path) -> None:
    turns = [("human", "What is it? \n<image> "), ("gpt", "It.")]
    assert read(*turns, image="x", placement="as_is")[0] == ("user", "What is it? \n<image> ")
    file = put(tmp_path, "mix.json", [entry(("human", "q"), ("gpt", "a"))])
    sources = [read_llava("mix", [file], image_placement=each) for each in ("llava", "as_is")]
    assert sources[0].digest != sources[1].digest
    with pytest.raises(ConfigError, match="image_placement=front: expected llava or as_is"):
        read_llava("mix", [file], image_placement="front")  # type: ignore[arg-type]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    whole = [("human", "q"), ("gpt", "a")]
    entries = [
        entry(("system", "s"), *whole),
        entry(("system", "s"), *whole),
        entry(("gpt", "hi"), *whole, ("human", "r")),
        entry(("human", "q")),
    ]
    found = read_llava("mix", [put(tmp_path, "mix.json", entries)])
    assert found.left_out == {
        "system turns: a template has its own": 2,
        "turns before the first question": 1,
        "questions at the end without an answer": 1,
        "entries without an answer to a question": 1,
    }
    assert len(list(found)) == len(list(found)) == 3


def test_broken_entries_are_left_out_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [("human", "q"), ("gpt", "a")]
    entries = [entry(("human", "q"), ("robot", "a")), entry(*whole), entry(*whole, img="a.jpg")]
    file = put(tmp_path, "mix.json", [*entries, entry(*whole, image="gone.jpg")])
    found = read_llava("mix", [file], str(tmp_path), skip_invalid=True)
    assert found.left_out == {"entries that break a rule": 2}
    assert [each.images for each in found] == [(), ("gone.jpg",)]
    assert f"the first of the entries that break a rule: {file}, entry 0" in caplog.text
    kept = found.without_images(["gone.jpg"])
    assert [each.images for each in kept] == [()] and kept.digest != found.digest
    assert pickle.loads(pickle.dumps(kept.read)) is not None  # for the processes of a loader


def test_a_file_without_conversations(tmp_path: Path) -> None:
    file = put(tmp_path, "mix.json", [])
    with pytest.raises(DataError, match=f"^{file}: no conversations in it"):
        read_llava("mix", [file])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mix.json")
    with pytest.raises(DataError, match=r"mix.json: cannot be read: it is a pipe"):
        read_llava("mix", [str(tmp_path / "mix.json")])
    os.mkfifo(tmp_path / "a.png")
    file = put(tmp_path, "own.json", [entry(("human", "q"), ("gpt", "a"), image="a.png")])
    with pytest.raises(DataError, match=r"images not in .* \(1\): a.png"):
        read_llava("mix", [file], str(tmp_path))


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
            "conversation '1': expected a list conversations, or a list messages, found the keys "
            "id, text",
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
            {"id": 1, "conversations": [{"from": [], "value": "q"}]},
            "conversation '1', turn 0: expected \"from\" (human, user, gpt, assistant, system) "
            "and a text \"value\", found {'from': [], 'value': 'q'}",
        ),
        (
            {"id": 1, "conversations": [], "messages": []},
            "conversation '1': expected a list conversations, or a list messages, found the keys "
            "id, conversations, messages",
        ),
        (
            {"id": [1], "conversations": []},
            "expected id to be text or a number, found [1]",
        ),
        (
            {"id": 1, "conversations": [{"from": "human", "value": "q", "image": "a.jpg"}]},
            "conversation '1', turn 0: the key 'image' is not read. Name the images of an entry in "
            "its image, in the order of their <image>",
        ),
        (
            entry(("human", "q"), ("gpt", "a"), image="a.jpg", images=["b.jpg"]),
            "conversation '33': has both image and images. Keep one of them",
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
    assert str(error.value).replace("entry 1: ", "entry 1, ") == f"{file}, entry 1, {problem}."


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
        "fetch what it lacks. Or leave out what needs them: data.skip_invalid=true."
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
