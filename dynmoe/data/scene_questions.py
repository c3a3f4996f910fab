"""What is asked about a scene: five kinds of question, each with exactly one right answer.

Answers are dealt out so that a question's text alone says little about its answer: with the most
frequent answer to each question 0.28 of the test answers are right, with the most frequent of all
0.10 (tests/data/test_scenes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from dynmoe.data.scene_images import CELLS, COLOURS, SHAPES, Scene

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
    """By shape where only one object has it, or by position."""
    thing = random.choice(scene)
    if _once(thing.shape, scene) and random.random() < 0.5:
        return Asked(f"what colour is the {thing.shape} ?", thing.colour)
    return Asked(f"what colour is the object at the {CELLS[thing.cell]} ?", thing.colour)


def ask_shape(scene: Scene, random: Random) -> Asked:
    """By colour where only one object has it, or by position."""
    thing = random.choice(scene)
    if _once(thing.colour, scene) and random.random() < 0.5:
        return Asked(f"what shape is the {thing.colour} object ?", thing.shape)
    return Asked(f"what shape is at the {CELLS[thing.cell]} ?", thing.shape)


def ask_count(scene: Scene, random: Random) -> Asked:
    """Of all objects, of a shape or of a colour."""
    if random.random() < OF_ALL:
        return Asked("how many objects are there ?", NUMBERS[len(scene)])
    counts = {plural: sum(t.shape == shape for t in scene) for shape, plural in PLURAL.items()}
    counts |= {f"{colour} objects": sum(t.colour == colour for t in scene) for colour in COLOURS}
    found = sorted(set(counts.values()))
    count = random.choices(found, [RARER**number for number in found])[0]
    what = random.choice([what for what, number in counts.items() if number == count])
    return Asked(f"how many {what} are there ?", NUMBERS[count])


def ask_exists(scene: Scene, random: Random) -> Asked:
    """Yes of an object of the scene, no of one that differs from such an object in one feature."""
    thing = random.choice(scene)
    answer = random.choice(("yes", "no"))
    colour, shape = thing.colour, thing.shape
    if answer == "no":
        present = {(t.colour, t.shape) for t in scene}
        near = [(colour, other) for other in SHAPES] + [(other, shape) for other in COLOURS]
        colour, shape = random.choice([pair for pair in near if pair not in present])
    return Asked(f"is there a {colour} {shape} ?", answer)


def ask_position(scene: Scene, random: Random) -> Asked:
    """Of an object, as no two are alike."""
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
    """Without a scene: a sum or a difference of two numbers, all from zero to nine."""
    larger = random.randrange(len(NUMBERS))
    part = random.randrange(larger + 1)
    if random.random() < 0.5:
        return Asked(f"what is {NUMBERS[part]} plus {NUMBERS[larger - part]} ?", NUMBERS[larger])
    return Asked(f"what is {NUMBERS[larger]} minus {NUMBERS[part]} ?", NUMBERS[larger - part])


def _once(feature: str, scene: Scene) -> bool:
    return sum(feature in thing for thing in scene) == 1
