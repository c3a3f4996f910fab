"""The training conversations of a vision-language run and the questions that measure it.

There is one function for each kind of data. A stage's name is `align`, `instruct` or `moe`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from dynmoe.data.vl import readers
from dynmoe.data.vl.conversations import (
    IMAGE_PLACEHOLDER,
    Conversation,
    ConversationSource,
    SourceKind,
)
from dynmoe.data.vl.scenes import scene_questions, scene_source
from dynmoe.errors import DataError
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
    """Scores on the first set without its images (`baselines`)."""
    sources: Mapping[str, Callable[[], ConversationSource]] = field(default_factory=dict)
    """The same conversations by where they are from, for a mixture; empty: all from one place."""


def scenes(stage: str, px: int, train_scenes: int, test_scenes: int, seed: int = 0) -> Content:
    """Rendered scenes (dynmoe/data/vl/scenes.py): captions to align, then questions.

    The set `shuffled` asks the questions of `test` about other questions' images: a right answer
    comes from the text, or by chance, as the other image may have the same answer. Sources of
    questions are `BY_IMAGES`.
    """
    test = scene_questions(seed, test_scenes, px)
    read = partial(scene_source, seed=seed, size=train_scenes, px=px)
    found = _captions_then_questions(stage, read, test, test.with_other_images())
    if stage == "align":
        return found
    kinds = {name: partial(_of_images, read, n) for n, name in enumerate(BY_IMAGES)}
    return replace(found, sources=kinds)


BY_IMAGES = ("text", "one_image", "two_images")
"""Sources of scenes: conversations about so many images."""


def _of_images(read: Callable[[SourceKind], ConversationSource], number: int) -> ConversationSource:
    return read("questions").only(partial(_has_images, number), BY_IMAGES[number])


def _has_images(number: int, conversation: Conversation) -> bool:
    return len(conversation.images) == number


def easy_vqa(
    stage: str, root: str | None, max_turns: int, test_questions: int | None = None
) -> Content:
    """easy-VQA (dynmoe/data/vl/readers.py): statements about its images to align, then questions.

    ``test_questions`` of the test set are asked, evenly spread; None: all. There is a set
    `shuffled` as in `scenes`; answers are few, so another image often has the same one.
    """
    whole = readers.easy_vqa_questions(root)
    # Images are exchanged in the whole set, so that a question's other image is always the same.
    test, shuffled = (each.spread(test_questions) for each in (whole, whole.with_other_images()))
    read = cache(partial(readers.easy_vqa_source, root=root, max_turns=max_turns))
    return _captions_then_questions(stage, read, test, shuffled)


def _captions_then_questions(
    stage: str,
    read: Callable[[SourceKind], ConversationSource],
    test: ExactMatch,
    shuffled: ExactMatch,
) -> Content:
    return Content(
        lambda: read("captions" if stage == "align" else "questions"),
        {"test": test, "shuffled": shuffled},
        lambda: _texts(read("captions"), read("questions")),
        lambda: _without_images(test, read("questions")),
    )


def _texts(*sources: ConversationSource) -> Iterator[str]:
    for source in sources:
        for conversation in source:
            yield from (message.text for message in conversation.messages)


def _without_images(test: ExactMatch, source: ConversationSource) -> dict[str, Any]:
    found = baselines(test, source)
    return {
        "name": "most frequent answer to the same question",
        "scores": {"test": {"score": found["question only"]}},
        "majority": found["majority"],
    }


def baselines(questions: ExactMatch, training: Iterable[Conversation]) -> dict[str, float]:
    """Scores in [0, 1] of two answerers that see no image.

    majority: always the most frequent answer of the training conversations. question only: the
    most frequent answer to the same question, or the majority's if training never asks it.

    Raises:
        DataError: no conversations.
    """
    answers: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation in training:
        turns = iter(conversation.messages)
        for question, answer in zip(turns, turns, strict=True):
            by_question[_bare(question.text)][answer.text] += 1
            answers[answer.text] += 1
    if not answers:
        raise DataError(f"{questions.name}: no training conversations to take answers from.")
    ((majority, _),) = answers.most_common(1)
    asked = [by_question.get(_bare(question.text), answers) for question in questions.questions]
    return {
        "majority": questions.score([majority] * len(asked))["score"],
        "question only": questions.score([each.most_common(1)[0][0] for each in asked])["score"],
    }


def trained_on(questions: ExactMatch, source: ConversationSource) -> int:
    """The number of questions that training asks of the same image files with the same answer."""

    def row(question: str, answer: str, images: Iterable[Path | None]) -> tuple[str, ...]:
        return (_bare(question), answer.strip(), *map(str, images))

    wanted = [
        row(question.text, answer, map(questions.image_path, question.images))
        for question, answer in zip(questions.questions, questions.records, strict=True)
    ]
    if source.image_path is None:
        return 0
    found: set[tuple[str, ...]] = set()
    for conversation in source:
        turns = iter(conversation.messages)
        images = [source.image_path(key) for key in conversation.images]
        found |= {row(ask.text, say.text, images) for ask, say in zip(turns, turns, strict=True)}
    return sum(each in found for each in wanted)


def _bare(question: str) -> str:
    return question.replace(IMAGE_PLACEHOLDER, "").strip()


def llava(
    stage: str,
    root: str,
    files: Mapping[str, Sequence[str]],
    image_placement: readers.Placement = "llava",
    skip_invalid: bool = False,
    cache: str | None = None,
) -> Content:
    """LLaVA's conversation files of a stage, each a source. Questions come from
    ``data.question_sets``.

    ``image_placement``, ``skip_invalid``, ``cache``: see ``readers.read_llava``.

    Raises:
        DataError: in reading, a file, an image or an entry that is not as it should be.
    """
    folder = Path(root).expanduser()

    def read(names: Sequence[str]) -> ConversationSource:
        paths = [str(folder / name) for name in names]
        rest = image_placement, skip_invalid, cache
        return readers.read_llava("LLaVA", paths, str(folder), *rest)

    own = files[stage]
    stems = [Path(name).stem for name in own]
    names = stems if len(set(stems)) == len(stems) else own
    each = {name: partial(read, [file]) for name, file in zip(names, own, strict=True)}
    return Content(partial(read, own), sources=each)


def vqa(
    root: str, train: str, test: str, images: str, suffix: str, skip_invalid: bool = False
) -> Content:
    """Tables of questions, images and answers (dynmoe/data/vl/readers.py), the same in all stages.

    ``skip_invalid``: see ``readers.vqa_table``.

    Raises:
        DataError: a table or image that is not as it should be.
    """
    folder = Path(root).expanduser()

    @cache
    def read() -> ConversationSource:
        table = str(folder / train)
        return readers.vqa_table("VQA", table, str(folder / images), suffix, skip_invalid)

    table = str(folder / test)
    questions = readers.vqa_questions("test", table, str(folder / images), suffix, skip_invalid)
    shown = [question for question in questions.questions if question.images]
    sets = {"test": questions}
    if len({question.images for question in shown}) > 1:
        sets["shuffled"] = questions.with_other_images()
    return Content(read, sets, lambda: _texts(read()), lambda: _without_images(questions, read()))


def science_qa(root: str) -> Content:
    """ScienceQA's training questions, the same in all stages, and its test set."""
    folder = str(Path(root).expanduser())
    return Content(lambda: readers.science_qa(folder), {"scienceqa": read_scienceqa(folder)})


def questions_only() -> Content:
    """Nothing to train on: questions come from ``data.question_sets``."""
    return Content(None)
