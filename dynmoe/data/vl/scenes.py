"""Scenes: any number of conversations about drawn images, without a file.

A scene is up to four coloured shapes in a grid of 3 x 3 cells. Everything is a function of a seed
and an index. Words are few, lower case, and separated by spaces. Training and test share no scene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from dynmoe.data.vl.conversations import (
    Conversation,
    ConversationSource,
    SourceKind,
    questions_answered,
    text_digest,
)
from dynmoe.errors import ConfigError
from dynmoe.questions.base import Question
from dynmoe.questions.exact import ExactMatch

if TYPE_CHECKING:
    import PIL.Image

CAPTION_QUESTION = "what is in the image ?"
TEXT_ONLY = 0.05
"""Share of training conversations with a sum and no image."""

TWO_IMAGES = 0.05
"""Share of training conversations with two images."""

FEWEST_TURNS, MOST_TURNS = 2, 5
DIGESTED = 100  # conversations that the digest is computed from


def scene_source(kind: SourceKind, seed: int, size: int, px: int = 48) -> ConversationSource:
    """Conversations about `size` training scenes, `px` pixels wide and high.

    captions: one turn, all objects of a scene in order. questions: 2 to 5 turns, each of another
    kind; a few conversations are about two images ("in the first image , ..."), a few about none.

    Raises:
        ConfigError: no such kind, size or image side.
    """
    if kind not in ("captions", "questions"):
        raise ConfigError(f"scenes: expected the kind captions or questions, found {kind!r}.")
    _check(size, px)
    read = partial(_conversations, kind, seed, size, px)
    content = f"(SceneSource({kind=}, {seed=}, {size=}, {px=}), {list(islice(read(), DIGESTED))})"
    return ConversationSource(f"scenes {kind}", text_digest(content), read, draw_image)


def _conversations(kind: SourceKind, seed: int, size: int, px: int) -> Iterator[Conversation]:
    make = _described if kind == "captions" else _discussed
    for index in range(size):
        yield make(str(index), Random(f"{kind} {seed} {index}"), px)


ANSWER_TOKENS = 6


def scene_questions(seed: int, size: int, px: int = 48) -> ExactMatch:
    """Questions about test scenes, kinds alternating.

    Raises:
        ConfigError: no such size or image side.
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
    return ExactMatch("scenes", questions, answers, draw_image, ANSWER_TOKENS)


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


# Scenes as text and as an image.

GRID = 3
CELLS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
SHAPES = ("circle", "square", "triangle")
COLOURS = {  # RGB; the background is a dark grey
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 90, 240),
    "yellow": (240, 220, 50),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
MOST = 4
"""Objects of a scene, at most; at least one."""

ALIKE = 0.4
"""Probability that an object takes the shape, and the colour, of an earlier one."""

SMALLEST = 24
"""Side of an image in pixels, at least: 8 for a cell."""

FINER = 8  # of a shape's mask, before it is scaled down
TEST_SHARE = 5  # one scene of so many is a test scene


class Thing(NamedTuple):
    colour: str
    shape: str
    cell: int


Scene = tuple[Thing, ...]
"""In the order of cells; no two things are alike in both colour and shape."""


def draw_scene(random: Random, test: bool) -> Scene:
    """A random scene, of the test scenes or of the training scenes.

    Which of them a scene is, jitter aside, depends on a checksum of it: they share no scene.
    """
    while True:
        scene = _any_scene(random)
        if (crc32(_text(scene).encode()) % TEST_SHARE == 0) == test:
            return scene


def scene_key(scene: Scene, px: int, jitter: int) -> str:
    """The scene as text, "48px 8123: red circle 0, blue square 4".

    It names the image's side, the seed of its background and jitter, and the colour, shape and cell
    of every object.

    Raises:
        ConfigError: no such image side.
    """
    if px < SMALLEST or px % GRID:
        raise ConfigError(
            f"scenes of {px} px: expected a multiple of {GRID}, {SMALLEST} or more, as 48."
        )
    return f"{px}px {jitter}: {_text(scene)}"


def read_scene(key: str) -> Scene:
    things = (text.split(" ") for text in key.partition(": ")[2].split(", "))
    return tuple(Thing(colour, shape, int(cell)) for colour, shape, cell in things)


def draw_image(key: str) -> PIL.Image.Image:
    """The image of a key, RGB; the same on every machine."""
    from PIL import Image

    size, jitter = key.partition(": ")[0].split("px ")
    px, random = int(size), Random(int(jitter))
    cell_px = px // GRID
    pixels = np.full((px, px, 3), 20 + int(40 * random.random()), dtype=np.float32)
    for colour, shape, cell in read_scene(key):
        side = round(cell_px * (0.75 + 0.2 * random.random()))
        top, left = (int((cell_px - side + 1) * random.random()) for _ in range(2))
        row, column = divmod(cell, GRID)
        area = pixels[row * cell_px + top :, column * cell_px + left :][:side, :side]
        area += _mask(shape, side) * (np.array(COLOURS[colour], np.float32) - area)
    return Image.fromarray(pixels.astype(np.uint8))


def _any_scene(random: Random) -> Scene:
    number = 1 + int(MOST * random.random())
    cells = sorted(random.sample(range(GRID * GRID), number))
    colours, shapes = list(COLOURS), list(SHAPES)
    things: list[Thing] = []
    for cell in cells:
        while True:
            colour, shape = random.choice(colours), random.choice(shapes)
            if things and random.random() < ALIKE:
                colour = random.choice(things).colour
            if things and random.random() < ALIKE:
                shape = random.choice(things).shape
            if all(thing[:2] != (colour, shape) for thing in things):
                break
        things.append(Thing(colour, shape, cell))
    return tuple(things)


def _text(scene: Scene) -> str:
    return ", ".join(f"{colour} {shape} {cell}" for colour, shape, cell in scene)


@cache
def _mask(shape: str, side: int) -> npt.NDArray[np.float32]:
    """[side, side, 1]: how much of each pixel the shape covers."""
    from PIL import Image, ImageDraw

    fine = side * FINER
    image = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((0, 0, fine - 1, fine - 1), fill=255)
    else:
        pen.polygon([(x * fine, y * fine) for x, y in _corners(shape)], fill=255)
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[:, :, None] / np.float32(255)


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a polygon in the unit square, y downwards."""
    if shape == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    return [(0.5, 0.02), (1, 0.94), (0, 0.94)]  # triangle


# Questions about a scene: five kinds, each with exactly one right answer.
#
# Answers are balanced so that a question's text alone says little about its answer: the most
# frequent answer to each question is right for 0.28 of the test questions, the most frequent answer
# of all for 0.10 (tests/data/vl/test_scenes.py).

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURAL = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
OF_ALL = 0.15
"""Probability that a count is that of all objects."""

RARER = 2.0
"""A count is asked for this much more often than the next lower one, where a scene has both."""


class Asked(NamedTuple):
    question: str
    answer: str


def caption(scene: Scene) -> str:
    """All objects in the order of cells, top left to bottom right."""
    return " , ".join(f"a {t.colour} {t.shape} at the {CELLS[t.cell]}" for t in scene)


def ask_colour(scene: Scene, random: Random) -> Asked:
    """Ask for the colour of an object, named by its shape if that is unique, or by its position."""
    thing = random.choice(scene)
    if _once(thing.shape, scene) and random.random() < 0.5:
        return Asked(f"what colour is the {thing.shape} ?", thing.colour)
    return Asked(f"what colour is the object at the {CELLS[thing.cell]} ?", thing.colour)


def ask_shape(scene: Scene, random: Random) -> Asked:
    """Ask for the shape of an object, named by its colour if that is unique, or by its position."""
    thing = random.choice(scene)
    if _once(thing.colour, scene) and random.random() < 0.5:
        return Asked(f"what shape is the {thing.colour} object ?", thing.shape)
    return Asked(f"what shape is at the {CELLS[thing.cell]} ?", thing.shape)


def ask_count(scene: Scene, random: Random) -> Asked:
    """Ask for the number of all objects, of a shape or of a colour."""
    if random.random() < OF_ALL:
        return Asked("how many objects are there ?", NUMBERS[len(scene)])
    counts = {plural: sum(t.shape == shape for t in scene) for shape, plural in PLURAL.items()}
    counts |= {f"{colour} objects": sum(t.colour == colour for t in scene) for colour in COLOURS}
    found = sorted(set(counts.values()))
    count = random.choices(found, [RARER**number for number in found])[0]
    what = random.choice([what for what, number in counts.items() if number == count])
    return Asked(f"how many {what} are there ?", NUMBERS[count])


def ask_exists(scene: Scene, random: Random) -> Asked:
    """Ask whether an object is there; an absent one differs in one feature from a present one."""
    thing = random.choice(scene)
    answer = random.choice(("yes", "no"))
    colour, shape = thing.colour, thing.shape
    if answer == "no":
        present = {(t.colour, t.shape) for t in scene}
        near = [(colour, other) for other in SHAPES] + [(other, shape) for other in COLOURS]
        colour, shape = random.choice([pair for pair in near if pair not in present])
    return Asked(f"is there a {colour} {shape} ?", answer)


def ask_position(scene: Scene, random: Random) -> Asked:
    """Ask for the position of an object; no two objects are alike."""
    thing = random.choice(scene)
    return Asked(f"where is the {thing.colour} {thing.shape} ?", CELLS[thing.cell])


KINDS: dict[str, Callable[[Scene, Random], Asked]] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "exists": ask_exists,
    "position": ask_position,
}


def ask_sum(random: Random) -> Asked:
    """Ask for a sum or a difference of two numbers, all from zero to nine; needs no scene."""
    larger = random.randrange(len(NUMBERS))
    part = random.randrange(larger + 1)
    if random.random() < 0.5:
        return Asked(f"what is {NUMBERS[part]} plus {NUMBERS[larger - part]} ?", NUMBERS[larger])
    return Asked(f"what is {NUMBERS[larger]} minus {NUMBERS[part]} ?", NUMBERS[larger - part])


def _once(feature: str, scene: Scene) -> bool:
    return sum(feature in thing for thing in scene) == 1
