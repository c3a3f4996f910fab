"""easy-VQA (Zhou 2019): 5,000 images of one shape, 48,248 questions; PyPI's package `easy-vqa`.

The package's data folder holds answers.txt and, for train and test, images/<number>.png (64 px) and
questions.json, a list of [question, answer, image number]. The package is located, not imported.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random

from dynmoe.data.vl.conversations import (
    Conversation,
    ImageFolder,
    ReadConversations,
    SourceKind,
    questions_answered,
)
from dynmoe.data.vl.image_use import with_other_images
from dynmoe.data.vl.readers import file_digest
from dynmoe.errors import ConfigError, DataError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch
from dynmoe.questions.files import read_json

Triple = tuple[str, str, int]
"""A question, its answer and the number of its image."""

SHAPES = frozenset({"circle", "rectangle", "triangle"})
COLOURS = frozenset({"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"})
CAPTION_QUESTION = "what is in the image?"


def easy_vqa_source(
    kind: SourceKind, root: str | None = None, max_turns: int = 4
) -> ReadConversations:
    """Training conversations; `root` is the data folder where it is not the package's.

    questions: an image's questions, shuffled, at most `max_turns` in a conversation, as an earlier
    turn may give a later answer away. captions: "a blue circle", from the questions of an image.

    Raises:
        ConfigError: the package is not installed, or a setting is impossible.
        DataError: the folder is not as the package lays it out.
    """
    if kind not in ("captions", "questions"):
        raise ConfigError(f"easy-VQA: expected the kind captions or questions, found {kind!r}.")
    if max_turns < 1:
        raise ConfigError(f"easy-VQA: expected max_turns of 1 or more, found {max_turns}.")
    folder = _folder(root) / "train"
    by_image: dict[int, list[Triple]] = defaultdict(list)
    for triple in _read_triples(folder):
        by_image[triple[2]].append(triple)
    made: list[Conversation] = []
    for number, own in by_image.items():
        made += _captioned(number, own) if kind == "captions" else _asked(number, own, max_turns)
    content = f"{kind} {max_turns} {file_digest(folder / 'questions.json')}"
    digest = sha256(content.encode()).hexdigest()[:16]
    load = ImageFolder(folder / "images").load
    return ReadConversations(f"easy-vqa {kind}", digest, partial(iter, made), load)


def easy_vqa_questions(root: str | None = None, shuffled: bool = False) -> ExactMatch:
    """The test set, of the kinds shape, colour and yes_no; `shuffled` shows another image.

    The text alone gives 0.67 of the answers, and 0.83 of yes and no: most questions ask for
    something that is not there.

    Raises:
        ConfigError: the package is not installed.
        DataError: the folder is not as the package lays it out.
    """
    folder = _folder(root) / "test"
    triples = _read_triples(folder)
    found = ExactMatch(
        "easy_vqa",
        [
            Question(str(index), question, (f"{image}.png",), _kind(answer))
            for index, (question, answer, image) in enumerate(triples)
        ],
        [answer for _, answer, _ in triples],
        ImageFolder(folder / "images").load,
    )
    return with_other_images(found) if shuffled else found


def caption_of(triples: Sequence[Triple]) -> str | None:
    """A caption of an image's one shape from its questions and answers; None if they name nothing.

    "what is the blue shape?" "circle" names both its colour and its shape. "is there a blue
    shape?" "yes" names one of them, and so does "is no blue shape present?" "no".
    """
    said: set[str] = set()
    for question, answer, _ in triples:
        words = set(re.findall(r"[a-z]+", question))
        if answer in SHAPES | COLOURS:
            said |= {answer} | words
        elif (answer == "yes") != bool(words & {"no", "not"}):
            said |= words
    shape, colour = min(said & SHAPES, default=""), min(said & COLOURS, default="")
    return f"a {colour} {shape or 'shape'}".replace("  ", " ") if shape or colour else None


def _kind(answer: str) -> str:
    return "shape" if answer in SHAPES else "colour" if answer in COLOURS else "yes_no"


def _captioned(number: int, triples: Sequence[Triple]) -> list[Conversation]:
    caption = caption_of(triples)
    return [] if caption is None else [_conversation(number, 0, [(CAPTION_QUESTION, caption)])]


def _asked(number: int, triples: Sequence[Triple], max_turns: int) -> list[Conversation]:
    mixed = Random(number).sample(triples, len(triples))
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


def _read_triples(folder: Path) -> list[Triple]:
    file = folder / "questions.json"
    try:
        triples = [(str(text), str(answer), int(image)) for text, answer, image in read_json(file)]
    except (ValueError, TypeError):
        raise DataError(f"{file}: expected a list of [question, answer, image number].") from None
    ImageFolder(folder / "images").check((f"{image}.png" for _, _, image in triples), str(file))
    return triples
