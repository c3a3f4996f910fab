"""Pictures that compare the settings of one problem: the claim, cost and accuracy, curves.

Dense is black, adaptive settings are coloured, the grid of fixed mixtures is grey; markers and
dashes say the same in black and white. A picture without anything to show is None.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, PercentFormatter

from dynmoe.report.claim import LEVEL, Claim, Rival, Verdict, columns, score_cells
from dynmoe.report.costs import Mode, Timings, model_costs
from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    BLUE,
    COLOURS,
    GREY,
    RED,
    STEP,
    Point,
    lay_out,
    name_axes,
    name_points,
    over_steps,
    scatter,
    set_apart,
)
from dynmoe.report.run import Run, environments
from dynmoe.report.words import capital
from dynmoe.selection import judged

Style = Mapping[str, Any]
"""For `Axes.plot`."""

BEATS: Style = {"color": BLUE, "marker": "^", "linestyle": "none"}
OPEN: Style = {"color": GREY, "marker": "o", "linestyle": "none", "markerfacecolor": "white"}
BELOW: Style = {"color": RED, "marker": "v", "linestyle": "none"}

LOOKS: dict[Verdict, Style] = {
    "beats": BEATS,
    "is below": BELOW,
    "cannot be told from": OPEN,
    "unknown": OPEN,
}

MARKS: dict[Rival, str] = {"best": ", best", "worst": ", worst"}

DENSE: Style = {"color": "black", "marker": "s", "linestyle": "--"}
FIXED: Style = {"color": GREY, "marker": "o", "linestyle": "-"}
ADAPTIVE: tuple[Style, ...] = (
    {"color": BLUE, "marker": "D", "linestyle": "-"},
    {"color": RED, "marker": "P", "linestyle": "-."},
    {"color": COLOURS[2], "marker": "X", "linestyle": ":"},
)


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """Colour, marker and dash of each setting."""
    adaptive = itertools.cycle(ADAPTIVE)
    kinds = {run.setting: run.kind for run in runs}
    return {
        setting: DENSE if kind == "dense" else FIXED if kind == "fixed" else next(adaptive)
        for setting, kind in kinds.items()
    }


def draw_claim(claim: Claim) -> Picture | None:
    """An adaptive setting minus the mean of the grid, dense, and every setting of the grid."""
    whole = claim.overall
    marks: defaultdict[str, str] = defaultdict(str)
    for rival, mark in MARKS.items():
        for difference in whole.against(rival):
            marks[difference.setting] += mark
    shown = [*whole.against("mean"), *whole.against("dense"), *whole.against("grid")]
    if not shown:
        return None
    figure, (axes,) = lay_out(1, width=7, height=0.8 + 0.25 * len(shown), beside=0)
    for row, each in enumerate(shown):
        look = LOOKS[each.verdict]
        low, high = each.interval or (math.nan, math.nan)
        axes.plot([100 * low, 100 * high], [row, row], color=look["color"], linewidth=1.4)
        axes.plot(100 * each.mean, row, markersize=7, **look)
    names = [
        f"{each.setting}{marks[each.setting]}" if each.setting else "mean of the grid"
        for each in shown
    ]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.axvline(0, color="black", linewidth=0.8)
    count = len(whole.repetitions)
    points = "percentage points" if claim.words.scale == "%" else "points"
    axes.set_xlabel(f"difference in {claim.words.noun}, {points} (n = {count})")
    axes.set_title(f"{claim.setting} minus …")
    axes.grid(axis="x", alpha=0.25)
    handles = [
        Line2D([], [], **look, label=label)
        for look, label in ((BEATS, "better"), (OPEN, "cannot be told apart"), (BELOW, "worse"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return Picture(
        "claim",
        figure,
        f"Paired differences in {claim.words.noun} with bootstrap intervals: {claim.setting} minus "
        "the mean of the grid, dense, and every setting of the grid",
        f"Right of 0 {claim.setting} is better. Lines are 95 % bootstrap intervals over matched "
        f"repetitions, too narrow for few of them; the mark is by a paired t test (p < {LEVEL}, "
        f"not corrected for {len(shown)} comparisons).",
    )


def draw_curves(runs: Sequence[Run]) -> Picture | None:
    """What is reported on each test environment over training, every setting."""
    places = environments(runs)
    if not places or all(len(run.results) == 1 for run in runs):  # of one step there is no curve
        return None
    style, words = styles(runs), runs[0].words
    wide = len(places) == 1
    figure, panels = lay_out(
        len(places), 6 if wide else 2.9, 3.6 if wide else 2.3, beside=0, share=True
    )
    for place, axes in zip(places, panels, strict=True):
        for setting, look in style.items():
            members = [run for run in runs if (run.setting, run.environment) == (setting, place)]
            if not members:
                continue
            curves = [_curve(run) for run in members]
            steps = sorted(set().union(*curves))
            values = np.array([_carried_on(curve, steps) for curve in curves])
            mean = np.nanmean(values, axis=0)
            in_grid = members[0].kind == "fixed"
            axes.plot(
                steps,
                mean,
                color=look["color"],
                linestyle=look["linestyle"],
                linewidth=0.8 if in_grid else 2,
                alpha=0.6 if in_grid else 1,
                zorder=2 if in_grid else 3,
            )
            if not in_grid:
                band = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
                axes.fill_between(steps, *band, color=look["color"], alpha=0.15, linewidth=0)
                selected = float(np.mean([run.outcome.step for run in members]))
                height = np.interp(selected, steps, mean)
                axes.plot(selected, height, color=look["color"], marker=look["marker"], zorder=4)
        axes.set_title(f"{words.place} {place}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=words.unit.strip()))
        over_steps(axes)
    scale = "" if words.unit else f", {words.scale}"  # a unit stands at the ticks
    name_axes(figure, STEP, f"{words.measure} on the {words.place}{scale}")
    figure.legend(handles=_legend(runs, style), loc="outside upper center", ncols=4, frameon=False)
    caption = (
        "Mean over seeds; bands span the lowest to the highest seed. Each grey line is one "
        "setting of the grid. "
    )
    if not runs[0].problem.validates:
        caption += f"A marker stands at the last step, whose {words.nouns} are reported."
    else:
        caption += (
            "A marker stands at the mean of the steps that selection chose, "
            f"whose {words.nouns} are reported."
        )
    if any(run.facts.get("patience") is not None for run in runs):
        caption += (
            " It is on the mean curve: reported is each run at its own step. Where patience ended "
            "a run before others, its last value goes on."
        )
    return Picture(
        "curves",
        figure,
        f"{capital(words.measure)} on each {words.place} over training",
        caption,
    )


def _curve(run: Run) -> dict[int, float]:
    """What would be reported of each step."""
    return {record["step"]: judged(record, run.facts).test for record in run.results}


def _carried_on(curve: Mapping[int, float], steps: Sequence[int]) -> list[float]:
    """Its values at the steps; after its end the last one, or the mean would be of other runs."""
    last = max(curve)
    return [curve.get(min(step, last), math.nan) for step in steps]


def _legend(runs: Sequence[Run], style: Mapping[str, Style]) -> list[Line2D]:
    """One line for dense and for each adaptive setting, one for all of the grid."""
    kinds = {run.setting: run.kind for run in runs}
    names = {
        "the grid" if kind == "fixed" else setting: (setting, kind)
        for setting, kind in kinds.items()
    }
    return [
        Line2D(
            [],
            [],
            color=style[setting]["color"],
            linestyle=style[setting]["linestyle"],
            linewidth=0.8 if kind == "fixed" else 2,
            label=name,
        )
        for name, (setting, kind) in names.items()
    ]


# Pictures of accuracy against what it costs: activated parameters, and measured time.
#
# A picture without anything to show is None.

READING = (
    "Higher is {}, the standard error over repetitions as a bar; no setting beats those "
    "on the dashed line in both measures."
)


def draw_accuracy_by_parameters(runs: Sequence[Run]) -> Picture | None:
    """Accuracy of every setting against the parameters that a test token activates."""
    costs = model_costs(runs)
    known = [
        point._replace(x=costs[point.name].activated)
        for point in _points(runs)
        if not math.isnan(costs[point.name].activated)
    ]
    if not known:
        return None
    points = set_apart(known)
    figure, (axes,) = lay_out(1, width=7.6, height=4.6, beside=0)
    scatter(axes, points)
    token = runs[0].words.token
    axes.set(xlabel=f"parameters that a {token} activates, mean over runs", ylabel=_place(runs))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    name_points(axes, points)
    return Picture(
        "accuracy_by_parameters",
        figure,
        f"{capital(runs[0].words.noun)} of every setting against its activated parameters, with "
        "the Pareto front",
        f"{_reading(runs)} Better is up and left. Settings of almost as many parameters are set "
        "apart a little.",
    )


def draw_accuracy_by_time(runs: Sequence[Run], timings: Timings) -> Picture | None:
    """Accuracy of every measured setting against the time of training and of inference."""
    training = _timed(runs, timings, "train")
    inference = _timed(runs, timings, "inference")
    shown = [part for part in (training, inference) if part]
    if not shown:
        return None
    figure, panels = lay_out(len(shown), width=7.6, height=4, columns=1, beside=0)
    for points, axes in zip(shown, panels, strict=True):
        in_training = points is training
        scatter(axes, points, more_is_better=not in_training)
        measure = "training step, ms" if in_training else "inference, samples/s"
        axes.set(xlabel=measure, ylabel=_place(runs))
    for points, axes in zip(shown, panels, strict=True):
        name_points(axes, points)
    return Picture(
        "accuracy_by_time",
        figure,
        f"{capital(runs[0].words.noun)} of every setting against its measured time, with the "
        "Pareto front",
        f"{_reading(runs)} Better is up, and left for ms, right for samples/s. Horizontal bars "
        f"span the quartiles. Measured in turns: {timings.conditions}.",
    )


def _points(runs: Sequence[Run]) -> list[Point]:
    """Every setting's result times 100, on the repetitions it has; x is still to be filled."""
    cells, place = score_cells(runs), columns(runs)[-1]
    points = []
    for setting, style in styles(runs).items():
        found = [100 * score.accuracy for score in cells[setting, place].values()]
        if found:
            error = float(np.std(found)) / math.sqrt(len(found))
            points.append(Point(setting, math.nan, float(np.mean(found)), error, style))
    return points


def _timed(runs: Sequence[Run], timings: Timings, mode: Mode) -> list[Point]:
    points = []
    for point in _points(runs):
        timing = timings.by_setting.get((point.name, mode))
        if timing is not None and mode == "train":
            points.append(point._replace(x=timing.milliseconds, x_range=timing.quartiles))
        elif timing is not None:
            span = timing.samples_quartiles
            points.append(point._replace(x=timing.samples_per_second, x_range=span))
    return points


def _place(runs: Sequence[Run]) -> str:
    places, words = environments(runs), runs[0].words
    if len(places) > 1:
        return f"accuracy, mean of {len(places)} test environments, %"
    return f"{words.measure} on {words.place} {places[0]}, {words.scale}"


def _reading(runs: Sequence[Run]) -> str:
    return READING.format("more accurate" if runs[0].words.noun == "accuracy" else "better")
