"""Figures of one run, drawn from its records: legible in print, safe for colour-blind readers.

Where the curves of many layers would hide one another, each layer has its own panel.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
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
    RED,
    STEP,
    heat_map,
    lay_out,
    legend_below,
    name_axes,
    over_steps,
    percent_of_rows,
    save,
    whole_numbers,
)
from dynmoe.report.example_figures import draw_examples
from dynmoe.report.mixing import draw_mixing
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
from dynmoe.report.tables import format_result
from dynmoe.report.words import layer_name
from dynmoe.selection import RULES, judged, measured


def draw_all(run: Run) -> list[Path]:
    """Write the figures of a run into `figures/`; return their files."""
    folder = run.folder.path / "figures"
    return [save(figure, folder / f"{name}.png") for name, figure in figures_of(run).items()]


def figures_of(run: Run) -> dict[str, Figure]:
    """The figures of a run that have something to show, by name."""
    training = run.training_routing
    thresholds = [line for line in training if line.get("thresholds") is not None]
    examples = [each for each in run.folder.read("examples") if each["step"] == run.outcome.step]
    slots = {line["layer"]: line["slots"] for line in on_tests(run)}
    fit = run.config.get("data.fit", "pad")
    found = {
        "scores": draw_scores(run),
        "loss": draw_loss(run),
        "experts": draw_experts([run]),
        "k_per_layer": draw_k_over_steps(run, training) if training else None,
        "load": draw_load_by_environment([run]),
        "thresholds": draw_thresholds(run, thresholds) if thresholds else None,
        "k_by_part": draw_k_by_part([run]),
        "load_by_part": draw_load_by_part([run]),
        "mixing": draw_mixing([run]),
        "examples": draw_examples(examples, slots, fit) if slots else None,
    }
    return {name: _alone(drawn) for name, drawn in found.items() if drawn is not None}


def _alone(drawn: Figure | Picture) -> Figure:
    """A figure of a report with its title, which stands beside it there."""
    if isinstance(drawn, Figure):
        return drawn
    letters = round(13 * drawn.figure.get_figwidth())
    drawn.figure.suptitle(textwrap.fill(drawn.alt, letters), fontsize="medium")
    return drawn.figure


# Curves of sets. Black: the reported set, and thinner its environment; red: the validation score
# that selects, or the training loss; the other environments have a colour each, splits a dash.
MAIN, OTHER, SECOND = 2.4, 1.0, RED
OTHERS = tuple(colour for colour in COLOURS if colour != SECOND)

Value = Callable[[Record, str], float]
"""Number of a record and a set; NaN where there is none."""


def draw_scores(run: Run) -> Figure:
    """The reported measure on every set, the validation score that selects, the selected step, and
    the baseline if there is one."""
    figure, (axes,) = lay_out(1, width=7.6, height=4.2)
    measure, reported = run.facts["reported"]["measure"], run.facts["reported"]["sets"]
    factor = run.scale.factor
    steps = [record["step"] for record in run.results]
    legend: list[Line2D] = []
    validates = run.problem.validates and run.outcome.is_selected
    if validates and run.facts["selects"]["sets"] != reported:
        values = [factor * judged(record, run.facts).validation for record in run.results]
        legend += _second(axes, steps, values, "validation (selects)")
    legend += _draw_sets(axes, run, lambda record, name: factor * measured(record, name, measure))
    legend += _marks(axes, run)
    axes.set(xlabel=STEP, ylabel=run.words.column)
    _finish(figure, axes, run, legend)
    figure.suptitle(textwrap.fill(_finding(run), 88), fontsize="medium")
    return figure


def draw_loss(run: Run) -> Figure | None:
    """The loss in training and on every set; None without any."""
    steps = [record["step"] for record in run.results]
    training = [_number(record.get("loss")) for record in run.results]
    if not np.isfinite(training).any():
        return None
    figure, (axes,) = lay_out(1, width=7.6, height=4.2)
    legend = _second(axes, steps, training, "training,\nmean since the\nevaluation before")
    legend += _draw_sets(axes, run, lambda record, name: measured(record, name, "loss"))
    if run.nonfinite_step is not None:
        line = axes.axvline(run.nonfinite_step, color=GREY, linestyle="--")
        line.set_label(f"not finite (step {run.nonfinite_step})")
        legend.append(line)
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.max() > WIDE * positive.min():
        axes.set_yscale("log")
    axes.set(xlabel=STEP, ylabel="loss")
    _finish(figure, axes, run, legend)
    figure.suptitle(f"Loss: {_subject(run)}", fontsize="medium")
    return figure


WIDE = 50
"""Losses that span more than this factor have a logarithmic axis."""


def _draw_sets(axes: Axes, run: Run, value: Value) -> list[Line2D]:
    """Draw a curve for each set that has values; return lines for the legend."""
    steps = [record["step"] for record in run.results]
    curves = {name: [value(record, name) for record in run.results] for name in run.scores}
    places: dict[str, list[str]] = {}
    for name, values in curves.items():
        if np.isfinite(values).any():
            places.setdefault(name.rpartition("/")[0] or name, []).append(name)
    reported, palette = run.facts["reported"]["sets"], itertools.cycle(OTHERS)
    selects = run.problem.validates and run.facts["selects"]["sets"] == reported
    chosen = "reported, selects" if selects else "reported"
    main, others, splits = [], [], dict[str, Any]()
    for index, (place, names) in enumerate(places.items()):
        is_split, is_tested = names != [place], place in run.tested
        own = {
            "color": "black" if is_tested else next(palette),
            "linewidth": OTHER,
            "linestyle": DASHES[0] if is_split else DASHES[index % len(DASHES)],
            **_mark(steps),
        }
        for name, dash in zip(names, itertools.cycle(DASHES)):
            look = own | ({"linestyle": dash} if is_split else {})
            if is_split:
                splits[name.rpartition("/")[2]] = dash
            if name in reported:
                look |= {"linewidth": MAIN, "zorder": 4}
                main.append(Line2D([], [], label=f"{name} ({chosen})", **look))
            axes.plot(steps, curves[name], **look)
        if set(names) - set(reported):
            label = f"{place} ({run.words.mark})" if is_tested else place
            others.append(Line2D([], [], label=label, **own))
    dashes = [
        Line2D([], [], color=GREY, linestyle=dash, linewidth=OTHER, label=f"{split} split")
        for split, dash in splits.items()
    ]
    return [*main, *others, *dashes]


def _second(axes: Axes, steps: Sequence[int], values: Sequence[float], label: str) -> list[Line2D]:
    """Draw the curve beside those of sets: validation, or training."""
    look = {"color": SECOND, "linestyle": "-.", "linewidth": MAIN, "zorder": 5, **_mark(steps)}
    axes.plot(steps, values, **look)
    return [Line2D([], [], label=label, **look)]


def _mark(steps: Sequence[int]) -> dict[str, Any]:
    """A curve of one point has no line to see."""
    return {"marker": "o", "markersize": 5} if len(steps) == 1 else {}


def _finish(figure: Figure, axes: Axes, run: Run, legend: Sequence[Line2D]) -> None:
    over_steps(axes)
    if len(run.results) == 1:
        axes.set_xlim(left=0)
    _add_epochs(axes, run.results)
    figure.legend(handles=legend, loc="outside right center", frameon=False)


def _subject(run: Run) -> str:
    return f"{run.setting} on {run.facts['dataset']}, protocol {run.facts['protocol']}"


def _finding(run: Run) -> str:
    """`DynMoE on ..., protocol domainbed: 61.3 % on 0/in at step 300, chosen by ... validation`."""
    found, rule = run.outcome, run.facts["selection"]
    chosen = f", chosen by {RULES[rule]}" if found.is_selected and run.problem.validates else ""
    sets = ", ".join(run.facts["reported"]["sets"])
    score = format_result(found.accuracy, run.scale)
    return f"{_subject(run)}: {score} on {sets} at step {found.step}{chosen}"


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _marks(axes: Axes, run: Run) -> list[Line2D]:
    """Lines for the selected step and the baseline, for the legend."""
    lines = []
    if run.outcome.is_selected and len(run.results) > 1:
        line = axes.axvline(run.outcome.step, color=GREY, linewidth=1, linestyle="-.", zorder=1)
        line.set_label(f"selected step ({run.outcome.step})")
        lines.append(line)
    baseline, reported = run.facts["baseline"], run.facts["reported"]
    for name in reported["sets"] if baseline else ():
        share = measured(baseline, name, reported["measure"])
        if not math.isnan(share):
            height = run.scale.factor * share
            line = axes.axhline(height, color=GREY, linewidth=1, linestyle=":", zorder=1)
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
    slots = sorted({slot for line in training for slot in line["slots"]})
    figure, panels = lay_out(len(layers), height=2.4, share=True, beside=0)
    # More slots than colours and dashes tell apart have shades, and neighbours differ in dashes.
    few = len(slots) <= len(COLOURS) * len(DASHES)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(slots)))
    styles: dict[int, dict[str, Any]] = {
        slot: {
            "color": COLOURS[place % len(COLOURS)] if few else shades[place],
            "linestyle": DASHES[(place // len(COLOURS) if few else place) % len(DASHES)],
            "linewidth": 1.2,
            "marker": ".",  # An expert that lived for one evaluation has no line.
            "markersize": 3,
        }
        for place, slot in enumerate(slots)
    }
    for layer, axes in zip(layers, panels, strict=True):
        lines = of_layer(training, layer)
        steps = [line["step"] for line in lines]
        by_slot = [dict(zip(line["slots"], line["thresholds"], strict=True)) for line in lines]
        for slot in slots:
            axes.plot(steps, [values.get(slot, math.nan) for values in by_slot], **styles[slot])
        axes.set_title(layer_name(layer))
        over_steps(axes)
    name_axes(figure, "", "threshold")
    figure.suptitle("Thresholds of living experts, by slot", fontsize="medium")
    legend = [Line2D([], [], label=str(slot), **styles[slot]) for slot in slots]
    columns = min(len(slots), int(figure.get_figwidth() / 0.8))
    legend_below(figure, panels, legend, STEP, columns)
    return figure
