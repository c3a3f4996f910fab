"""Images that are missing or damaged are found before training, or left out and counted."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynmoe import image_files
from dynmoe.data import vqa
from dynmoe.data.base import StepPlan
from dynmoe.data.vl.content import llava
from dynmoe.data.vl.module import VisionLanguageData
from dynmoe.errors import DataError
from dynmoe.image_files import Survey

NAMES = ("whole.png", "cut.jpg", "text.png", "gone.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A question about each of `NAMES`, to train on and to be answered, and a broken row."""
    (tmp_path / "images").mkdir()
    picture = io.BytesIO()
    Image.radial_gradient("L").save(picture, "JPEG")
    (tmp_path / "images" / "cut.jpg").write_bytes(picture.getvalue()[:2000])
    (tmp_path / "images" / "text.png").write_text("no image")
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "whole.png")
    rows: list[dict[str, Any]] = [
        {"question": "what is it?", "answer": "cat", "image": name} for name in NAMES
    ]
    put(tmp_path, "some.jsonl", rows[:2])
    put(tmp_path, "more.jsonl", rows[:3])
    put(tmp_path, "all.jsonl", [*rows, {"question": "what?", "answer": None}])
    turns = [{"from": "human", "value": "<image>\\nq"}, {"from": "gpt", "value": "a"}]
    put(tmp_path, "llava.jsonl", [{"image": f"images/{n}", "conversations": turns} for n in NAMES])
    return tmp_path


def put(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))


def data(root: Path, table: str, content: Any = None, **settings: Any) -> VisionLanguageData:
    skip = settings.get("skip_invalid", False)
    own = partial(vqa, str(root), table, table, "images", "", skip)
    made = VisionLanguageData(
        name="own",
        content=content or own,
        image_size=8,
        patch_size=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        template="simple",
        question_template="simple",
        batch_size=2,
        **settings,
    )
    made.connect(StepPlan(seed=0, steps=1))
    return made


def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(root: Path) -> None:
    made = data(root, "some.jsonl")
    made.setup()
    (batch,) = made.train_dataloader()
    assert batch.tokens["images"].shape == (2, 3, 8, 8)
    assert made.left_out == {}


@pytest.mark.parametrize(
    ("table", "verify", "bad"),
    [
        ("some.jsonl", "decode", ["cut.jpg"]),  # as of image folders, and in mode=check
        ("more.jsonl", "header", ["text.png"]),
        ("more.jsonl", "decode", ["cut.jpg", "text.png"]),
    ],
)
def test_damaged_images_are_found_before_training(
    root: Path, table: str, verify: Any, bad: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        data(root, table, verify=verify).setup()
    message = str(error.value)
    assert f"unreadable images: {len(bad)}" in message and "data.skip_invalid=true" in message
    assert [name for name in NAMES if f"images/{name}: " in message] == bad
    data(root, table, verify="none").setup()


def test_images_are_not_opened_again_by_the_next_start(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"cache": str(root / "cache")}
    data(root, "some.jsonl", **settings).setup()
    opened: list[int] = []
    look = image_files._look

    def counted(paths: list[Path], decode: bool, description: str) -> Survey:
        opened.append(len(paths))
        return look(paths, decode, description)

    monkeypatch.setattr(image_files, "_look", counted)
    data(root, "some.jsonl", **settings).setup()
    assert sum(opened) == 0
    with pytest.raises(DataError, match=r"cut\.jpg"):  # as in mode=check
        data(root, "some.jsonl", verify="decode", **settings).setup()
    assert sum(opened) > 0


def test_missing_images_are_found_before_training(root: Path) -> None:
    with pytest.raises(DataError, match=r"all.jsonl, row 4: expected an answer"):
        data(root, "all.jsonl").setup()


def test_what_is_bad_is_left_out_and_counted(root: Path) -> None:
    made = data(root, "all.jsonl", skip_invalid=True)
    made.setup()
    conversations = "conversations with images that are missing or cannot be read"
    questions = "test: questions with images that are missing or cannot be read"
    broken = "entries that break a rule"
    shuffled = {f"shuffled: {broken}": 1, questions.replace("test", "shuffled"): 3}
    assert made.left_out == {
        broken: 1,
        conversations: 3,
        f"test: {broken}": 1,
        questions: 3,
        **shuffled,
    }
    assert made.sizes == {"train": 1, "test": 1, "shuffled": 1}
    assert made.stores["train"].images(0) == ["whole.png"]


def test_bad_images_of_conversation_files_are_left_out(root: Path) -> None:
    content = llava("moe", str(root), {"moe": ["llava.jsonl"]}, skip_invalid=True)
    made = data(root, "", lambda: content, skip_invalid=True)
    assert [each.images for each in made._sources["train"]] == [("images/whole.png",)]
    content = llava("moe", str(root), {"moe": ["llava.jsonl"]})
    with pytest.raises(DataError, match=r"images not in .*gone.png.*data.skip_invalid=true"):
        assert data(root, "", lambda: content)._sources
