"""Scenes: up to four coloured shapes in a grid of 3 x 3 cells, as text and as an image.

A scene's key is its text, "48px 8123: red circle 0, blue square 4": the image's side, what its
background and jitter are drawn from, and colour, shape and cell of every object.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from dynmoe.errors import ConfigError

if TYPE_CHECKING:
    import PIL.Image

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
    """The scene as text. Raises ConfigError: no such image side."""
    if px < SMALLEST or px % GRID:
        raise ConfigError(
            f"scenes of {px} px: expected a multiple of {GRID}, {SMALLEST} or more, as 48."
        )
    return f"{px}px {jitter}: {_text(scene)}"


def read_scene(key: str) -> Scene:
    things = (text.split(" ") for text in key.partition(": ")[2].split(", "))
    return tuple(Thing(colour, shape, int(cell)) for colour, shape, cell in things)


def draw_image(key: str) -> PIL.Image.Image:
    """The image of a key, RGB; the same for ever."""
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
    """Of a polygon in the unit square, y downwards."""
    if shape == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    return [(0.5, 0.02), (1, 0.94), (0, 0.94)]  # triangle
