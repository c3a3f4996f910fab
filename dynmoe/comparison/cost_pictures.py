"""Pictures of accuracy against what it costs: activated parameters, and measured time.

A picture without anything to show is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import EngFormatter

from dynmoe.comparison.costs import model_costs
from dynmoe.comparison.matching import columns, score_cells
from dynmoe.comparison.pictures import styles
from dynmoe.comparison.run import Run, environments
from dynmoe.comparison.scatter import Point, name_points, scatter, set_apart
from dynmoe.comparison.timings import Mode, Timings
from dynmoe.report.document import Picture
from dynmoe.report.drawing import lay_out
from dynmoe.report.words import capital

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
