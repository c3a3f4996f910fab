"""easy-VQA (Zhou 2019): 5,000 images of one shape, 48,248 questions; PyPI's package `easy-vqa`.

Its data folder holds answers.txt and, for train and test, images/<number>.png (64 px) and
questions.json, a list of [question, answer, image number]. The package is found, never imported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Literal

from dynmoe.data.vl.conversations import (
    Conversation,
    ConversationList,
    ImageFolder,
    questions_answered,
)
from dynmoe.data.vl.image_use import with_other_images
from dynmoe.data.vl.readers import file_digest
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch
from dynmoe.questions.files import read_json

Kind = Literal["captions", "questions"]
Row = tuple[str, str, int]

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
CAPTION_QUESTION = "what is in the image?"


def easy_vqa_source(kind: Kind, root: str | None = None, max_turns: int = 4) -> ConversationList:
    """Training conversations; `root` is the data folder where it is not the package's.

    questions: those of an image, shuffled, `max_turns` to a conversation, as an earlier turn may
    give a later one away. captions: "a blue circle" from what the questions of an image say.

    Raises:
        ConfigError: the package is not installed, or a setting is impossible.
        DataError: the folder is not as the package lays it out.
    """
    if kind not in ("captions", "questions"):
        raise ConfigError(f"easy-VQA: expected the kind captions or questions, found {kind!r}.")
    if max_turns < 1:
        raise ConfigError(f"easy-VQA: expected max_turns of 1 or more, found {max_turns}.")
    folder = _folder(root) / "train"
    rows = _read(folder)
    by_image: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        by_image[row[2]].append(row)
    made: list[Conversation] = []
    for number, own in by_image.items():
        made += _captioned(number, own) if kind == "captions" else _asked(number, own, max_turns)
    content = f"{kind} {max_turns} {file_digest(folder / 'questions.json')}"
    digest = sha256(content.encode()).hexdigest()[:16]
    return ConversationList(f"easy-vqa {kind}", digest, made, ImageFolder(folder / "images").load)


def easy_vqa_questions(root: str | None = None, shuffled: bool = False) -> ExactMatch:
    """The test set, of the kinds shape, colour and yes_no; `shuffled` shows another image.

    The text alone gives 0.67 of the answers, and 0.83 of yes and no: most questions ask for what is
    not there.

    Raises:
        ConfigError: the package is not installed.
        DataError: the folder is not as the package lays it out.
    """
    folder = _folder(root) / "test"
    rows = _read(folder)
    found = ExactMatch(
        "easy_vqa",
        [
            Question(str(index), question, (f"{image}.png",), _kind(answer))
            for index, (question, answer, image) in enumerate(rows)
        ],
        [answer for _, answer, _ in rows],
        ImageFolder(folder / "images").load,
    )
    return with_other_images(found) if shuffled else found


def caption_of(rows: Sequence[Row]) -> str | None:
    """What an image's questions and answers say of its one shape; None if nothing.

    "what is the blue shape?" "circle" names both its colour and its shape. "is there a blue
    shape?" "yes" names one of them, and so does "is no blue shape present?" "no".
    """
    said: set[str] = set()
    for question, answer, _ in rows:
        words = set(re.findall(r"[a-z]+", question))
        if answer in SHAPES | COLOURS:
            said |= {answer} | words
        elif (answer == "yes") != bool(words & {"no", "not"}):
            said |= words
    shape, colour = min(said & SHAPES, default=""), min(said & COLOURS, default="")
    return f"a {colour} {shape or 'shape'}".replace("  ", " ") if shape or colour else None


def _kind(answer: str) -> str:
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"


def _captioned(number: int, rows: Sequence[Row]) -> list[Conversation]:
    caption = caption_of(rows)
    return [] if caption is None else [_conversation(number, 0, [(CAPTION_QUESTION, caption)])]


def _asked(number: int, rows: Sequence[Row], max_turns: int) -> list[Conversation]:
    mixed = Random(number).sample(rows, len(rows))
    turns = [(question, answer) for question, answer, _ in mixed]
    starts = range(0, len(turns), max_turns)
    return [_conversation(number, start, turns[start : start + max_turns]) for start in starts]


def _conversation(number: int, start: int, turns: Sequence[tuple[str, str]]) -> Conversation:
    return questions_answered(f"{number}-{start}", turns, (f"{number}.png",))


def _folder(root: str | None) -> Path:
    if root is not None:
        return Path(root)
    package = find_spec("easy_vqa")
    if package is None or package.origin is None:
        raise ConfigError(
            "easy-VQA is not installed: pip install easy-vqa, or give the folder with its train/ "
            "and test/ as data.content.root."
        )
    return Path(package.origin).parent / "data"


def _read(folder: Path) -> list[Row]:
    file = folder / "questions.json"
    try:
        rows = [(str(text), str(answer), int(image)) for text, answer, image in read_json(file)]
    except (ValueError, TypeError):
        raise DataError(f"{file}: expected a list of [question, answer, image number].") from None
    ImageFolder(folder / "images").check((f"{image}.png" for _, _, image in rows), str(file))
    return rows
