"""The training conversations of a vision-language run and the questions that measure it.

There is one function for each kind of data. A stage's name is `align`, `instruct` or `moe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dynmoe.data.vl import readers
from dynmoe.data.vl.conversations import ConversationSource, SourceKind
from dynmoe.data.vl.easy_vqa import easy_vqa_questions, easy_vqa_source
from dynmoe.data.vl.image_use import baselines, spread, with_other_images
from dynmoe.data.vl.scenes import scene_questions, scene_source
from dynmoe.questions.base import QuestionSet
from dynmoe.questions.choices import read_scienceqa
from dynmoe.questions.exact import ExactMatch


@dataclass(frozen=True)
class Content:
    """Conversations, question sets and facts about them, read when they are needed."""

    train: Callable[[], ConversationSource] | None
    """Reads the conversations, which an evaluation does not need; None: nothing to train on."""
    sets: Mapping[str, QuestionSet] = field(default_factory=dict)
    """The first is the one reported."""
    words: Callable[[], Iterable[str]] | None = None
    """Texts with every word of all stages, to make a vocabulary from."""
    baseline: Callable[[], dict[str, Any]] | None = None
    """Scores on the first set without its images (`image_use.baselines`)."""


def scenes(stage: str, px: int, train_scenes: int, test_scenes: int, seed: int = 0) -> Content:
    """Rendered scenes (dynmoe/data/vl/scenes.py): captions to align, then questions.

    The set `shuffled` asks the questions of `test` about other questions' images: a right answer
    comes from the text, or by chance, as the other image may have the same answer.
    """

    def read(kind: SourceKind) -> ConversationSource:
        return scene_source(kind, seed, train_scenes, px)

    test = scene_questions(seed, test_scenes, px)
    return Content(
        lambda: read("captions" if stage == "align" else "questions"),
        {"test": test, "shuffled": scene_questions(seed, test_scenes, px, shuffled=True)},
        lambda: _texts(read("captions"), read("questions")),
        lambda: _without_images("test", test, read("questions")),
    )


def _texts(*sources: ConversationSource) -> Iterator[str]:
    for source in sources:
        for conversation in source:
            yield from (message.text for message in conversation.messages)


def _without_images(name: str, test: ExactMatch, source: ConversationSource) -> dict[str, Any]:
    found = baselines(test, source)
    return {
        "name": "most frequent answer to the same question",
        "scores": {name: {"score": found["question only"]}},
        "majority": found["majority"],
    }


def easy_vqa(
    stage: str, root: str | None, max_turns: int, test_questions: int | None = None
) -> Content:
    """easy-VQA (dynmoe/data/vl/easy_vqa.py): statements about its images to align, then questions.

    ``test_questions`` of the test set are asked, evenly spread; None: all. There is a set
    `shuffled` as in `scenes`; answers are few, so another image often has the same one.
    """

    @cache
    def read(kind: SourceKind) -> ConversationSource:
        return easy_vqa_source(kind, root, max_turns)

    test, shuffled = (
        spread(easy_vqa_questions(root, shuffled), test_questions) for shuffled in (False, True)
    )
    return Content(
        lambda: read("captions" if stage == "align" else "questions"),
        {"test": test, "shuffled": shuffled},
        lambda: _texts(read("captions"), read("questions")),
        lambda: _without_images("test", test, read("questions")),
    )


def llava(stage: str, root: str, files: Mapping[str, Sequence[str]]) -> Content:
    """LLaVA's conversation files of a stage. Questions come from ``data.question_sets``.

    Raises:
        DataError: in reading, a file, an image or an entry that is not as it should be.
    """
    folder = Path(root).expanduser()

    def read() -> ConversationSource:
        paths = [str(folder / name) for name in files[stage]]
        return readers.read_llava("LLaVA", paths, str(folder))

    return Content(read)


def vqa(root: str, train: str, test: str, images: str, suffix: str) -> Content:
    """Tables of questions, images and answers (dynmoe/data/vl/readers.py), the same in all stages.

    Raises:
        DataError: a table or image that is not as it should be.
    """
    folder = Path(root).expanduser()

    @cache
    def read() -> ConversationSource:
        return readers.vqa_table("VQA", str(folder / train), str(folder / images), suffix)

    questions = readers.vqa_questions("test", str(folder / test), str(folder / images), suffix)
    shown = [question for question in questions.questions if question.images]
    sets = {"test": questions}
    if len({question.images for question in shown}) > 1:
        sets["shuffled"] = with_other_images(questions)
    return Content(
        read,
        sets,
        lambda: _texts(read()),
        lambda: _without_images("test", questions, read()),
    )


def science_qa(root: str) -> Content:
    """ScienceQA's training questions, the same in all stages, and its test set."""
    return Content(lambda: readers.science_qa(root), {"scienceqa": read_scienceqa(root)})


def questions_only() -> Content:
    """Nothing to train on: questions come from ``data.question_sets``."""
    return Content(None)
