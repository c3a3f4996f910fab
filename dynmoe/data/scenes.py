"""Scenes: conversations about drawn images, without end and without a file.

Everything is a function of a seed and an index: `scene_images.py` draws, `scene_questions.py` asks.
The words are few, lower case, and parted by spaces. Training and test share no scene.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Literal

from dynmoe.data.conversations import Conversation, questions_answered
from dynmoe.data.image_use import with_other_images
from dynmoe.data.scene_images import draw_image, draw_scene, scene_key
from dynmoe.data.scene_questions import KINDS, Asked, ask_sum, caption
from dynmoe.errors import ConfigError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

if TYPE_CHECKING:
    import PIL.Image

Kind = Literal["captions", "questions"]

CAPTION_QUESTION = "what is in the image ?"
TEXT_ONLY = 0.05
"""Share of training conversations with a sum and no image; `TWO_IMAGES` of those with two."""

TWO_IMAGES = 0.05
FEWEST_TURNS, MOST_TURNS = 2, 5
DIGESTED = 100  # conversations that stand for all of a source


@dataclass(frozen=True)
class SceneSource:
    """A `ConversationSource` of `size` training scenes, `px` pixels wide and high.

    captions: one turn, all objects of a scene in order. questions: 2 to 5 turns, each of another
    kind; a few conversations are about two images ("in the first image , ..."), a few about none.
    """

    kind: Kind
    seed: int
    size: int
    px: int

    @property
    def name(self) -> str:
        return f"scenes {self.kind}"

    @cached_property
    def digest(self) -> str:
        content = repr((self, list(islice(self, DIGESTED))))
        return sha256(content.encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[Conversation]:
        make = _described if self.kind == "captions" else _discussed
        for index in range(self.size):
            random = Random(f"{self.kind} {self.seed} {index}")
            yield make(str(index), random, self.px)

    def load_image(self, key: str) -> PIL.Image.Image:
        return draw_image(key)


def scene_source(kind: Kind, seed: int, size: int, px: int = 48) -> SceneSource:
    """Training conversations; raises ConfigError: no such kind, size or image side."""
    if kind not in ("captions", "questions"):
        raise ConfigError(f"scenes: expected the kind captions or questions, found {kind!r}.")
    _check(size, px)
    return SceneSource(kind, seed, size, px)


def scene_questions(seed: int, size: int, px: int = 48, shuffled: bool = False) -> ExactMatch:
    """Questions about test scenes, each kind in turn; `shuffled` shows another question's image.

    A model that looks at the image does no better on the shuffled set than by the text alone.
    """
    _check(size, px)
    kinds = sorted(KINDS)
    questions: list[Question] = []
    answers: list[str] = []
    for index in range(size):
        random = Random(f"test {seed} {index}")
        scene, kind = draw_scene(random, test=True), kinds[index % len(kinds)]
        asked = KINDS[kind](scene, random)
        key = scene_key(scene, px, random.randrange(10**6))
        questions.append(Question(str(index), asked.question, (key,), kind))
        answers.append(asked.answer)
    found = ExactMatch("scenes", questions, answers, draw_image)
    return with_other_images(found) if shuffled else found


def _check(size: int, px: int) -> None:
    if size < 1:
        raise ConfigError(f"scenes: expected a size of 1 or more, found {size}.")
    scene_key((), px, 0)


def _described(name: str, random: Random, px: int) -> Conversation:
    scene = draw_scene(random, test=False)
    key = scene_key(scene, px, random.randrange(10**6))
    return questions_answered(name, [(CAPTION_QUESTION, caption(scene))], [key])


def _discussed(name: str, random: Random, px: int) -> Conversation:
    chance = random.random()
    if chance < TEXT_ONLY:
        return questions_answered(name, [ask_sum(random)])
    number = 2 if chance < TEXT_ONLY + TWO_IMAGES else 1
    scenes = [draw_scene(random, test=False) for _ in range(number)]
    keys = [scene_key(scene, px, random.randrange(10**6)) for scene in scenes]
    turns: list[Asked] = []
    for kind in random.sample(sorted(KINDS), random.randint(FEWEST_TURNS, MOST_TURNS)):
        which = random.randrange(number)
        question, answer = KINDS[kind](scenes[which], random)
        where = f"in the {('first', 'second')[which]} image , " if number > 1 else ""
        turns.append(Asked(where + question, answer))
    return questions_answered(name, turns, keys)
