"""Figures of one run, drawn from its records: legible in print, safe for colour-blind readers.

Where the curves of many layers would hide one another, each layer has its own panel.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dynmoe.records import Record
from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    COLOURS,
    DASHES,
    GREY,
    STEP,
    heat_map,
    lay_out,
    over_steps,
    percent_of_rows,
    save,
    whole_numbers,
)
from dynmoe.report.example_figures import draw_examples
from dynmoe.report.part_figures import draw_k_by_part, draw_load_by_part
from dynmoe.report.routing_figures import (
    draw_experts,
    draw_load_by_environment,
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
    found = {
        "scores": draw_scores(run),
        "experts": draw_experts([run]),
        "k_per_layer": draw_k_over_steps(run, training) if training else None,
        "load": draw_load_by_environment([run]),
        "thresholds": draw_thresholds(run, thresholds) if thresholds else None,
        "k_by_part": draw_k_by_part([run]),
        "load_by_part": draw_load_by_part([run]),
        "examples": draw_examples_of(run),
    }
    folder = run.folder.path / "figures"
    return [
        save(_titled(figure), folder / f"{name}.png")
        for name, figure in found.items()
        if figure is not None
    ]


def _titled(figure: Figure | Picture) -> Figure:
    """A picture has its title beside it in a report; alone it needs a heading."""
    if isinstance(figure, Picture):
        width = round(13 * figure.figure.get_figwidth())  # letters
        figure.figure.suptitle(textwrap.fill(figure.alt, width), fontsize="medium")
        return figure.figure
    return figure


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


def draw_examples_of(run: Run) -> Figure | None:
    """Answered questions at the reported step; None where none are recorded."""
    examples = [each for each in run.folder.read("examples") if each["step"] == run.outcome.step]
    slots = {line["layer"]: line["slots"] for line in on_tests(run)}
    return draw_examples(examples, slots, run.config.get("data.fit", "pad")) if slots else None
