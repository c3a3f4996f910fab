"""Figures of one run, drawn from its records: legible in print, safe for colour-blind readers.

Where the curves of many layers would hide one another, each layer has its own panel. The last
figure shows answered questions, with the experts that every patch and every word used.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageOps

from dynmoe.records import Record
from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    BLUE,
    COLOURS,
    DASHES,
    GREY,
    RED,
    STEP,
    PlainFigure,
    heat_map,
    lay_out,
    over_steps,
    percent_of_rows,
    save,
    whole_numbers,
)
from dynmoe.report.routing_figures import (
    draw_experts,
    draw_k_by_part,
    draw_load_by_environment,
    draw_load_by_part,
    layers_of,
    of_layer,
    on_tests,
)
from dynmoe.report.run import Run
from dynmoe.report.words import layer_name
from dynmoe.selection import measured, selected


def draw_all(run: Run) -> list[Path]:
    """Write the figures of a run into `figures/`, and leave out those with nothing to show."""
    training = [line for line in run.routing if line["source"] == "train"]
    thresholds = [line for line in training if line.get("thresholds") is not None]
    examples = [each for each in run.folder.read("examples") if each["step"] == run.outcome.step]
    slots = {line["layer"]: line["slots"] for line in on_tests(run)}
    fit = run.config.get("data.fit", "pad")
    found = {
        "scores": draw_scores(run),
        "experts": draw_experts([run]),
        "k_per_layer": draw_k_over_steps(run, training) if training else None,
        "load": draw_load_by_environment([run]),
        "thresholds": draw_thresholds(run, thresholds) if thresholds else None,
        "k_by_part": draw_k_by_part([run]),
        "load_by_part": draw_load_by_part([run]),
        "examples": draw_examples(examples, slots, fit) if slots else None,
    }
    written = []
    for name, drawn in found.items():
        figure = drawn.figure if isinstance(drawn, Picture) else drawn
        if isinstance(drawn, Picture):  # its title stands beside it in a report; here it is alone
            letters = round(13 * drawn.figure.get_figwidth())
            drawn.figure.suptitle(textwrap.fill(drawn.alt, letters), fontsize="medium")
        if figure is not None:
            written.append(save(figure, run.folder.path / "figures" / f"{name}.png"))
    return written


def draw_scores(run: Run) -> Figure:
    """The reported measure on every set, the selected step, and the baseline if there is one.

    An environment has one colour, its splits have a dash each.
    """
    figure, (axes,) = lay_out(1, width=7.6, height=4)
    measure = run.facts["reported"]["measure"]
    steps = [record["step"] for record in run.results]
    places: dict[str, list[str]] = {}
    for name in run.scores:
        place, _, split = name.rpartition("/")
        places.setdefault(place or split, []).append(name)
    legend: list[Line2D] = []
    splits: dict[str, Any] = {}
    for index, (place, names) in enumerate(places.items()):
        is_reported = place in run.tested
        style: dict[str, Any] = {
            "color": "black" if is_reported else COLOURS[index % len(COLOURS)],
            "linestyle": DASHES[index % len(DASHES)] if len(names) == 1 else "-",
            "linewidth": 2.6 if is_reported else 1.3,
            "marker": "." if len(names) == 1 else None,
            "zorder": 3 if is_reported else 2,
        }
        for name, dash in zip(names, DASHES, strict=False):
            values = [100 * measured(record, name, measure) for record in run.results]
            own = style | ({"linestyle": dash} if len(names) > 1 else {})
            axes.plot(steps, values, **own)
            if len(names) > 1:
                splits[name.rpartition("/")[2]] = dash
        label = f"{place} ({run.words.mark})" if is_reported else place
        legend.append(Line2D([], [], label=label, **style))
    legend += [
        Line2D([], [], color=GREY, linestyle=dash, label=f"{split} split")
        for split, dash in splits.items()
    ]
    legend += _marks(axes, run)
    facts = run.facts
    title = f"{facts['algorithm']} on {facts['dataset']}, protocol {facts['protocol']}"
    axes.set(xlabel=STEP, ylabel=run.words.column, title=title)
    over_steps(axes)
    _add_epochs(axes, run.results)
    title = "evaluated on"
    figure.legend(handles=legend, loc="outside right center", frameon=False, title=title)
    return figure


def _marks(axes: Axes, run: Run) -> list[Line2D]:
    """Lines for the selected step and the baseline, for the legend."""
    lines = []
    choice = selected(run.results, run.facts)
    if choice is not None:
        line = axes.axvline(choice["step"], color=GREY, linewidth=1, linestyle="-.")
        line.set_label(f"selected step ({choice['step']})")
        lines.append(line)
    baseline, reported = run.facts["baseline"], run.facts["reported"]
    for name in reported["sets"] if baseline else ():
        share = measured(baseline, name, reported["measure"])
        if not math.isnan(share):
            line = axes.axhline(100 * share, color=GREY, linewidth=1, linestyle=":")
            line.set_label(f"{baseline['name']},\n{name}")
            lines.append(line)
    return lines


def _add_epochs(axes: Axes, results: Sequence[Record]) -> None:
    """A second axis at the top; epochs are proportional to steps, from wherever they start."""
    first, last = results[0], results[-1]
    if last.get("epoch", 0) == first.get("epoch", 0):
        return
    per_epoch = (last["step"] - first["step"]) / (last["epoch"] - first["epoch"])
    epochs = axes.secondary_xaxis(
        "top",
        functions=(
            lambda step: first["epoch"] + np.subtract(step, first["step"]) / per_epoch,
            lambda epoch: first["step"] + np.subtract(epoch, first["epoch"]) * per_epoch,
        ),
    )
    epochs.set_xlabel("epoch")
    epochs.xaxis.set_major_locator(whole_numbers())


def draw_k_over_steps(run: Run, training: Sequence[Record]) -> Figure:
    """Mean k per layer over the steps; beside it how k spreads over tokens at the end."""
    layers = layers_of(run)
    figure, (curves, spread) = lay_out(2, width=6, height=max(3, 0.9 + 0.32 * len(layers)))
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    histograms = []
    for index, layer in enumerate(layers):
        lines = of_layer(training, layer)
        curves.plot(
            [line["step"] for line in lines],
            [line["mean_k"] for line in lines],
            color=colours[index],
            linestyle=DASHES[index % len(DASHES)],  # Neighbours have almost the same colour.
            marker="." if len(lines) == 1 else None,  # of one point there is no line to see
            label=layer_name(layer),
        )
        histograms.append(lines[-1]["k_hist"])
    curves.set(xlabel=STEP, ylabel="mean k (experts per training token)", title="over training")
    over_steps(curves)
    k = range(max(map(len, histograms)))
    rows = list(map(layer_name, layers))
    heat_map(spread, percent_of_rows(histograms, len(k)), rows=rows, columns=k)
    spread.set(xlabel="k (experts per token)", title="at the end: share of training tokens, in %")
    figure.suptitle("How many experts a token activates")
    figure.legend(loc="outside right center", frameon=False, title="MoE layer")
    return figure


def draw_thresholds(run: Run, training: Sequence[Record]) -> Figure:
    """The threshold of every living expert over the steps; a gap where its slot was empty."""
    layers = layers_of(run)
    figure, panels = lay_out(len(layers), share=True)
    slots = sorted({slot for line in training for slot in line["slots"]})
    styles: dict[int, dict[str, Any]] = {
        slot: {
            "color": COLOURS[slot % len(COLOURS)],
            "linestyle": DASHES[slot // len(COLOURS) % len(DASHES)],
            "marker": ".",  # An expert that lived for one evaluation has no line.
            "markersize": 3,
        }
        for slot in slots
    }
    for layer, axes in zip(layers, panels, strict=True):
        lines = of_layer(training, layer)
        steps = [line["step"] for line in lines]
        by_slot = [dict(zip(line["slots"], line["thresholds"], strict=True)) for line in lines]
        for slot in slots:
            axes.plot(steps, [values.get(slot, math.nan) for values in by_slot], **styles[slot])
        axes.set_title(layer_name(layer))
        over_steps(axes)
    figure.supxlabel(STEP)
    figure.supylabel("threshold")
    figure.suptitle("Thresholds of living experts")
    legend = [Line2D([], [], label=str(slot), **styles[slot]) for slot in slots]
    figure.legend(handles=legend, loc="outside right center", frameon=False, title="slot")
    return figure


# Answered questions, from `examples.jsonl`. Lengths are in points of 1/72 inch: text of one width
# per letter and boxes around it are laid out together.

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
    """The first questions, in the first and the last MoE layer; None without MoE layers.

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
    text_from = MARGIN + (1 + len(layers)) * (PICTURE + GAP)
    line = WORD + len(layers) * STRIP + LINE
    heights = [max(PICTURE, HEAD + len(each) * line) + GAP + TITLE for each in lines]
    width, height = text_from + TEXT + MARGIN, TITLE + sum(heights) + GAP + LEGEND
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
    figure.legend(
        handles=[Patch(facecolor=c, edgecolor=GREY, label=text) for text, c in labels.items()],
        title="experts of a layer (slots) that a token used; bold: the answer",
        loc="lower center",
        ncols=8,
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
