"""Pictures of answered questions, with the experts that every patch and every word used.

Lengths are in points of 1/72 inch: text of one width per letter and boxes around it are laid out
together.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageOps

from dynmoe.records import Record
from dynmoe.report.drawing import BLUE, COLOURS, GREY, RED, PlainFigure
from dynmoe.report.words import layer_name

Experts = tuple[int, ...]
"""Slots of the experts that served a token."""

MOST_EXAMPLES = 4
MOST_LINES = 4
"""Lines of words; a longer prompt is cut at its beginning."""
LONGEST_WORD = 14
MOST_NUMBERED = 8
"""Patches per row up to which their experts are written on them."""

MARGIN, GAP, PICTURE, TEXT = 10, 8, 108, 352
TITLE = 10
LETTER, PADDING, WORD, STRIP, LINE = 4.6, 5, 11, 10, 9
"""Width of a letter and room around words; heights of a word, of the strip of a layer below it, and
of the room between lines."""
HEAD, LEGEND = 30, 34
MONOSPACE: dict[str, Any] = {"family": "monospace", "fontsize": 7.5, "va": "center"}

OTHERS, NONE = "#D9D9D9", "#FFFFFF"
OPACITY, PALE = 0.65, 0.75


class Word(NamedTuple):
    text: str
    used: tuple[Experts, ...]
    """Experts in each shown layer; empty for the place of an image."""
    is_answer: bool

    @property
    def width(self) -> float:
        return PADDING + LETTER * max(len(text) for text in (self.text, *map(_text, self.used)))


def draw_examples(
    examples: Sequence[Record], slots: Mapping[str, Sequence[int]], fit: str = "pad"
) -> Figure | None:
    """The first questions, or blocks of a text, in the first and the last MoE layer; None without
    MoE layers.

    `slots`: the living experts of each layer, in the order of a token's 0s and 1s; `fit`: how the
    model sees an image that is no square (pad, crop, stretch).
    """
    shown = [example for example in examples if example["experts"]][:MOST_EXAMPLES]
    if not shown:
        return None
    names = list(shown[0]["experts"])
    layers = list(dict.fromkeys((names[0], names[-1])))
    used = [{name: _used(each, name, slots) for name in layers} for each in shown]
    lines = [_lines(each, found) for each, found in zip(shown, used, strict=True)]
    colours = _colours(shown, used)
    pictures = any(example["image"] is not None for example in shown)
    text_from = MARGIN + pictures * (1 + len(layers)) * (PICTURE + GAP)
    line = WORD + len(layers) * STRIP + LINE
    heights = [max(PICTURE, HEAD + len(each) * line) + GAP + TITLE for each in lines]
    width, height = text_from + TEXT + MARGIN, TITLE + sum(heights) + GAP + LEGEND
    height += 0 if pictures else LINE  # a second row of the legend
    figure = PlainFigure(figsize=(width / 72, height / 72))

    def panel(x: float, top: float, wide: float, high: float) -> Axes:
        place = (x / width, 1 - (top + high) / height, wide / width, high / height)
        axes = figure.add_axes(place)
        axes.set_axis_off()
        return axes

    top = GAP + TITLE
    for example, found, rows, high in zip(shown, used, lines, heights, strict=True):
        axes = panel(text_from, top, TEXT, high)
        axes.set(xlim=(0, TEXT), ylim=(high, 0))
        _show_question(axes, example)
        _show_words(axes, rows, layers, colours)
        if example["image"] is not None:
            picture = _square(example["image"], fit)
            panels = [
                panel(MARGIN + place * (PICTURE + GAP), top, PICTURE, PICTURE)
                for place in range(1 + len(layers))
            ]
            panels[0].imshow(picture)
            for axes, name in zip(panels[1:], layers, strict=True):
                _show_patches(axes, picture, _of_patches(example, found[name]), colours)
                axes.set_title(layer_name(name), fontsize="x-small", pad=2)
        top += high
    labels = {_text(each): colour for each, colour in colours.items() if colour in COLOURS}
    labels |= {"others": OTHERS} if OTHERS in colours.values() else {}
    answers = "; bold: the answer" if any(example["answer"] for example in shown) else ""
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=GREY, label=text) for text, c in labels.items()],
        title=f"experts of a layer (slots) that a token used{answers}",
        loc="lower center",
        ncols=8 if pictures else 4,
        frameon=False,
        fontsize="small",
        title_fontsize="small",
    )
    return figure


def is_right(example: Record) -> bool | None:
    """Whether the answer is the right one, letter case and a final full stop aside; None where
    there is no single right answer."""
    if example["right"] is None:
        return None
    given, right = (example[key].strip().lower().removesuffix(".") for key in ("answer", "right"))
    return bool(given == right)


def _used(example: Record, layer: str, slots: Mapping[str, Sequence[int]]) -> list[Experts]:
    """Return the experts of each token."""
    bits = example["experts"][layer]
    living = slots.get(layer, range(len(bits[0])))
    return [
        tuple(slot for slot, bit in zip(living, token, strict=True) if bit == "1") for token in bits
    ]


def _colours(
    examples: Sequence[Record], used: Sequence[Mapping[str, Sequence[Experts]]]
) -> dict[Experts, str]:
    """Return colours of the most frequent sets of experts; all others share one colour.

    In each example and layer all patches count as much as all words.
    """
    counts: dict[Experts, float] = defaultdict(float)
    for example, found in zip(examples, used, strict=True):
        kinds = Counter(word is None for word in example["tokens"])
        for word, *sets in zip(example["tokens"], *found.values(), strict=True):
            for experts in sets:
                counts[experts] += 1 / kinds[word is None]
    counts.pop((), None)
    frequent = sorted(counts, key=lambda experts: (-counts[experts], experts))[: len(COLOURS)]
    ordered = sorted(frequent, key=lambda experts: (len(experts), experts))
    colours = dict(zip(ordered, COLOURS, strict=False))
    return {**colours, **{each: OTHERS for each in counts if each not in colours}, (): NONE}


def _text(experts: Experts) -> str:
    return ",".join(map(str, experts)) or "–"


def _lines(example: Record, used: Mapping[str, Sequence[Experts]]) -> list[list[Word]]:
    """Break the words of prompt and answer into lines; the patches of an image are one word."""
    lines: list[list[Word]] = [[]]
    room = TEXT - _margin(list(used))
    before: str | None = ""
    for place, token in enumerate(example["tokens"]):
        if token is not None:
            experts = tuple(of_layer[place] for of_layer in used.values())
            word = Word(_plain(token), experts, place >= example["answer_from"])
        else:
            word = Word("(image)", (), False)
        if token is not None or before is not None:  # the first patch represents its image
            if sum(each.width for each in lines[-1]) + word.width > room:
                lines.append([])
            lines[-1].append(word)
        before = token
    return lines[-MOST_LINES:]


def _plain(word: str) -> str:
    """Return the visible text of a token; a dot for one that only marks a beginning or an end."""
    text = word.replace("\n", "↵").strip() or "·"
    return text if len(text) <= LONGEST_WORD else f"{text[: LONGEST_WORD - 1]}…"


def _margin(layers: Sequence[str]) -> float:
    """Room for the layers' names before their strips."""
    return 0.8 * LETTER * max(len(layer_name(name)) for name in layers) + PADDING


def _show_question(axes: Axes, example: Record) -> None:
    """Write the question, the answer, and the right answer if it is different."""
    letters = TEXT // 5
    question = textwrap.shorten(example["question"], letters, placeholder=" …")
    axes.text(0, 5, question, fontsize="medium", va="center")
    right = is_right(example)
    mark, colour = {True: ("✓", BLUE), False: ("✗", RED), None: ("", "black")}[right]
    instead = f"   (right: {example['right']})" if right is False else ""
    answer = textwrap.shorten(f"{mark} {example['answer']}{instead}", letters, placeholder=" …")
    axes.text(0, 18, answer, color=colour, fontsize="medium", fontweight="bold", va="center")


def _show_words(
    axes: Axes,
    lines: Sequence[Sequence[Word]],
    layers: Sequence[str],
    colours: Mapping[Experts, str],
) -> None:
    """Write words, each with the experts that it used on a strip for each layer below."""
    top: float = HEAD
    for cells in lines:
        for place, name in enumerate(layers):
            middle = top + WORD + (place + 0.5) * STRIP
            axes.text(0, middle, layer_name(name), color=GREY, **{**MONOSPACE, "fontsize": 6})
        x = _margin(layers)
        for cell in cells:
            middle = x + cell.width / 2
            weight = "bold" if cell.is_answer else "normal"
            axes.text(middle, top + WORD / 2, cell.text, ha="center", weight=weight, **MONOSPACE)
            for place, experts in enumerate(cell.used):
                y, colour = top + WORD + place * STRIP, colours[experts]
                axes.add_patch(
                    Rectangle((x + 0.5, y + 0.5), cell.width - 1, STRIP - 1, facecolor=colour)
                )
                ink: dict[str, Any] = {"color": _ink(colour), **MONOSPACE, "fontsize": 6.5}
                axes.text(middle, y + STRIP / 2, _text(experts), ha="center", **ink)
            x += cell.width
        top += WORD + len(layers) * STRIP + LINE


def _ink(colour: str, opacity: float = 1) -> str:
    """Black or white, whichever can be read on the colour, of that opacity on pale grey."""
    light = opacity * np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) + (1 - opacity) * PALE
    return "white" if light < 0.5 else "black"


def _square(image: str, fit: str) -> Image.Image:
    """An image, PNG in base64, as the model sees it."""
    picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
    side = max(picture.size)
    if fit == "crop":
        return ImageOps.fit(picture, (min(picture.size), min(picture.size)))
    if fit == "stretch":
        return picture.resize((side, side))
    return ImageOps.pad(picture, (side, side), color=(128, 128, 128))


def _of_patches(example: Record, used: Sequence[Experts]) -> list[list[Experts]]:
    """Return the experts of the patches of the first image, by rows."""
    places = [place for place, word in enumerate(example["tokens"]) if word is None]
    patches = [used[place] for place in places[: example["image_tokens"]]]
    side = math.isqrt(len(patches))
    return [patches[row * side : (row + 1) * side] for row in range(side)]


def _show_patches(
    axes: Axes,
    picture: Image.Image,
    patches: Sequence[Sequence[Experts]],
    colours: Mapping[Experts, str],
) -> None:
    """Draw the image in pale grey below the colours of its patches' experts."""
    side = len(patches)
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    grey = ImageOps.autocontrast(picture.convert("L"))
    axes.imshow(grey, cmap="gray", vmin=-255, vmax=255, extent=extent)
    shades = np.array([[to_rgb(colours[experts]) for experts in row] for row in patches])
    axes.imshow(shades, alpha=OPACITY, extent=extent, interpolation="nearest")
    if side > MOST_NUMBERED:
        return
    edges = np.arange(side + 1) - 0.5
    axes.hlines(edges, -0.5, side - 0.5, color="white", linewidth=0.6)
    axes.vlines(edges, -0.5, side - 0.5, color="white", linewidth=0.6)
    for y, row in enumerate(patches):
        for x, experts in enumerate(row):
            ink = _ink(colours[experts], OPACITY)
            text = _text(experts)
            size = min(5.5, 28 / max(1, len(text)))  # as wide as its patch
            axes.text(x, y, text, color=ink, fontsize=size, ha="center", va="center")
