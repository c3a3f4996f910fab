"""What a vision-language run trains on in each stage, and the questions it is measured by.

One function for each kind of data. A stage's name is `align`, `instruct` or `moe`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dynmoe.data import scenes as drawn
from dynmoe.data.conversations import ConversationSource
from dynmoe.data.image_use import baselines
from dynmoe.questions.base import QuestionSet
from dynmoe.questions.exact import ExactMatch


@dataclass(frozen=True)
class Content:
    train: ConversationSource
    sets: Mapping[str, QuestionSet] = field(default_factory=dict)
    """The first is the one reported."""
    words: Callable[[], Iterable[str]] | None = None
    """Texts that hold every word of all stages, for a vocabulary of the data's own."""
    baseline: dict[str, Any] | None = None
    """How far one comes on the first set without its images (`image_use.baselines`)."""


def scenes(stage: str, px: int, train_scenes: int, test_scenes: int, seed: int = 0) -> Content:
    """Rendered scenes (dynmoe/data/scenes.py): captions to align, then questions.

    The set `shuffled` has the questions of `test` about images of others: what is right there was
    not seen.
    """
    train = {
        kind: drawn.scene_source(kind, seed, train_scenes, px) for kind in ("captions", "questions")
    }
    test = drawn.scene_questions(seed, test_scenes, px)
    return Content(
        train["captions" if stage == "align" else "questions"],
        {"test": test, "shuffled": drawn.scene_questions(seed, test_scenes, px, shuffled=True)},
        lambda: _texts(*train.values()),
        _without_images("test", test, train["questions"]),
    )


def _texts(*sources: ConversationSource) -> Iterator[str]:
    for source in sources:
        for conversation in source:
            yield from (message.text for message in conversation.messages)


def _without_images(name: str, test: ExactMatch, source: ConversationSource) -> dict[str, Any]:
    found = baselines(test, source)
    return {
        "name": "most frequent answer to the same question",
        f"{name}_score": found["question only"],
        "majority": found["majority"],
    }
