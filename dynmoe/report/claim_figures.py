"""Figures that compare the settings of one problem: the claim, curves, accuracy against cost.

Dense is black, adaptive settings are coloured, the grid of fixed mixtures is grey; markers and
dashes say the same in black and white. A figure without anything to show is None.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, PercentFormatter

from dynmoe.report.claim import Claim, Rival, columns, score_cells
from dynmoe.report.claim_tables import headline
from dynmoe.report.costs import Mode, Timings, model_costs
from dynmoe.report.document import Picture
from dynmoe.report.drawing import (
    BLUE,
    COLOURS,
    DASHES,
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
from dynmoe.report.paired import LEVEL, Verdict
from dynmoe.report.run import Kind, Run, by_setting, counted, environments
from dynmoe.report.tables import SHARE
from dynmoe.report.words import Words, capital
from dynmoe.selection import judged

Style = Mapping[str, Any]
"""For `Axes.plot`."""

LOOKS: dict[Verdict, Style] = {
    "beats": {"color": BLUE, "marker": "^", "linestyle": "none"},
    "is not significantly different from": {
        **{"color": GREY, "marker": "o", "linestyle": "none", "markerfacecolor": "white"},
    },
    "is below": {"color": RED, "marker": "v", "linestyle": "none"},
    "unknown": {"color": "black", "marker": "x", "linestyle": "none"},
}
LABELS: dict[Verdict, str] = {
    "beats": "better",
    "is not significantly different from": "not significantly different",
    "is below": "worse",
    "unknown": "no verdict",
}
MOST_DOTS = 10
"""Repetitions up to which each is drawn by itself."""

THIN: tuple[Kind, ...] = ("fixed", "varying")
"""Settings of which there are too many for thick lines and bands."""

MARKS: dict[Rival, str] = {"best": ", best", "worst": ", worst"}

DENSE: Style = {"color": "black", "marker": "s", "linestyle": "--"}
FIXED: Style = {"color": GREY, "marker": "o", "linestyle": "-"}
# No mark stands for two families, on grey paper either: shapes that look alike (8 and o, H and h)
# are left out, and a shape comes again with another filling.
FILLINGS: tuple[Style, ...] = (
    {},
    {"markerfacecolor": "white"},
    {"fillstyle": "left", "markerfacecoloralt": "white"},
)
ADAPTIVE: tuple[Style, ...] = tuple(
    {
        **{"color": (BLUE, RED, COLOURS[2])[index % 3], "marker": "DPX"[index % 3]},
        **{"linestyle": ("-", "-.", ":")[(index + index // 3) % 3], **FILLINGS[index // 3]},
    }
    for index in range(9)
)
VARYING: tuple[Style, ...] = tuple(
    {
        **{"color": COLOURS[index % 6], "marker": "<>v^*hdp"[index % 8]},
        **{"linestyle": DASHES[index // 6], **FILLINGS[index // 8]},
    }
    for index in range(24)
)
GRID: tuple[Style, ...] = (
    *({**FIXED, **filling} for filling in FILLINGS),
    *({**FIXED, "marker": "s", **filling} for filling in FILLINGS[1:]),
    *({**FIXED, "marker": mark} for mark in "+x1234"),
)
"""Families of the grid, where each has a mark."""

# How many experts a token activates, in the name of a setting.
K = re.compile(r"\btop-\d+|, moe\.(?:router\.)?(?:target|top)_k=(?:\[[^]]*\]|[^,]*)")


def family(setting: str) -> str:
    """`ReMoE` of `ReMoE, moe.router.target_k=2`, `top-k of 8` of `top-2 of 8`: the name that
    settings share which differ in nothing else."""
    return K.sub(lambda found: "" if found[0].startswith(",") else "top-k", setting)


def styles(runs: Sequence[Run]) -> dict[str, Style]:
    """Colour, marker and dash of each setting; those of one family share them."""
    unused = {"varying": itertools.cycle(VARYING), "adaptive": itertools.cycle(ADAPTIVE)}
    found = {"dense": DENSE, "fixed": FIXED}

    def style(run: Run) -> Style:
        name = run.kind if run.kind in found else family(run.setting)
        if name not in found:
            found[name] = next(unused[run.kind])
        return found[name]

    return {run.setting: style(run) for run in {run.setting: run for run in runs}.values()}


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
    title, scale = textwrap.fill(headline(claim), 88), claim.words.scale
    factor = scale.factor
    height = 1 + 0.28 * len(shown) + 0.2 * title.count("\n")
    figure, (axes,) = lay_out(1, width=7, height=height, beside=0)
    axes.axvline(0, color="black", linewidth=0.8, zorder=1)
    for row, each in enumerate(shown):
        look = LOOKS[each.verdict]
        if len(each.values) <= MOST_DOTS:
            dots = [factor * value for value in each.values]
            axes.plot(dots, [row] * len(dots), ".", color=look["color"], markersize=4, alpha=0.5)
        if each.interval is not None:
            low, high = each.interval
            axes.plot([factor * low, factor * high], [row, row], color=look["color"], linewidth=1.4)
        axes.plot(factor * each.mean, row, markersize=7, **look)
    names = [each.setting + marks[each.setting] or "mean of the grid" for each in shown]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    count = len(whole.repetitions)
    points = "percentage points" if scale == SHARE else scale.steps
    axes.set_xlabel(f"{claim.setting} minus it: {claim.words.noun}, {points} (n = {count})")
    figure.suptitle(title, fontsize="medium")
    axes.grid(axis="x", alpha=0.25)
    found = {each.verdict for each in shown}
    handles = [
        Line2D([], [], **LOOKS[each], label=label)
        for each, label in LABELS.items()
        if each in found
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    tested = "; nothing could be tested"
    if family := shown[0].family:
        tested = (
            ", lines 95 % intervals of a paired t test, not corrected; where there is no test there"
            f" is no line. The mark is by the test's p (< {LEVEL}), corrected by Holm's method for "
            f"{counted(family, 'comparison')}"
        )
    return Picture(
        "claim",
        figure,
        f"Paired differences in {claim.words.noun}: {claim.setting} minus the mean of the grid, "
        "dense, and every setting of the grid",
        f"{'Left' if scale.less_is_better else 'Right'} of 0 {claim.setting} is better. Dots are "
        f"matched repetitions{tested}.",
    )


def draw_curves(runs: Sequence[Run]) -> Picture | None:
    """Results of every setting on each test environment over training."""
    places = environments(runs)
    if not places or all(len(run.results) == 1 for run in runs):  # of one step there is no curve
        return None
    style, words = styles(runs), runs[0].words
    wide = len(places) == 1
    figure, panels = lay_out(
        len(places), 6 if wide else 2.9, 3.6 if wide else 2.3, beside=0, share=True
    )
    for place, axes in zip(places, panels, strict=True):
        for setting, members in by_setting(
            [run for run in runs if run.environment == place]
        ).items():
            _draw_curve(axes, members, style[setting])
        axes.set_title(f"{words.place} {place}")
        if words.scale.factor == 100:
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=words.scale.unit.strip()))
        over_steps(axes)
    at_ticks = words.scale == SHARE
    unit = "" if at_ticks else f", {words.scale.name}"
    name_axes(figure, STEP, f"{words.measure} on the {words.place}{unit}")
    # One line for all of the grid, and one for each other family.
    kinds = {run.setting: run.kind for run in runs}
    lines = {
        "the grid" if kind == "fixed" else family(name): _line(style[name], kind in THIN)
        for name, kind in kinds.items()
    }
    handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
    # About 12 letters to an inch, and 6 of space for a line.
    letters = 12 * figure.get_figwidth()
    ncols = min(4, max(1, int(letters / (6 + max(map(len, lines))))))
    figure.set_figheight(figure.get_figheight() + 0.22 * ((len(lines) - 1) // ncols))
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, frameon=False)
    chosen = "mean of the steps that selection chose" if runs[0].problem.validates else "last step"
    caption = (
        "Mean over seeds; bands span the lowest to the highest seed. Each grey line is one "
        f"setting of the grid. A marker is at the {chosen}, whose {words.nouns} are reported."
    )
    if "varying" in kinds.values():
        caption += " Thin coloured lines: routers that decide how many experts, without bands."
    if any(run.facts.get("patience") is not None for run in runs):
        caption += (
            " It is on the mean curve; each run is reported at its own step. Where patience ended "
            "a run before others, its last value is kept."
        )
    return Picture(
        "curves",
        figure,
        f"{capital(words.measure)} on each {words.place} over training",
        caption,
    )


def _draw_curve(axes: Axes, runs: Sequence[Run], look: Style) -> None:
    """Draw the mean over the runs of a setting; of thick lines also their range and selection."""
    curves = [{r["step"]: judged(r, run.facts).test for r in run.results} for run in runs]
    steps = np.array(sorted(set().union(*curves)))
    # NOTE: after its end a curve keeps its last value, else the mean would be of other runs.
    values = np.array(
        [[curve.get(min(step, max(curve)), math.nan) for step in steps] for curve in curves]
    )
    known = np.isfinite(values).any(axis=0)
    steps, values = steps[known], values[:, known]
    if not known.any():
        return
    mean = np.nanmean(values, axis=0)
    thin = runs[0].kind in THIN
    axes.plot(*(steps, mean), **_line(look, thin), alpha=0.6 if thin else 1, zorder=3 - thin)
    if not thin:
        band = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(steps, *band, color=look["color"], alpha=0.15, linewidth=0)
        selected = float(np.mean([run.outcome.step for run in runs]))
        height = np.interp(selected, steps, mean)
        axes.plot(selected, height, **{**look, "linestyle": "none", "zorder": 4})


def _line(look: Style, thin: bool) -> dict[str, Any]:
    width = 0.8 if thin else 2
    return {"color": look["color"], "linestyle": look["linestyle"], "linewidth": width}


# Accuracy against activated parameters and experts, and against measured time.
MODES: dict[Mode, str] = {"train": "training step, ms", "inference": "inference, samples/s"}


def draw_accuracy_by_parameters(runs: Sequence[Run]) -> Picture | None:
    """Accuracy of every setting against the parameters that a test token activates."""
    costs = model_costs(runs)
    points = [point._replace(x=costs[point.name].activated) for point in _points(runs)]
    known = [point for point in points if not math.isnan(point.x)]
    label = f"parameters that a {runs[0].words.token} activates, mean over runs"
    return _draw_against(
        "accuracy_by_parameters",
        runs,
        {label: set_apart(known, runs[0].scale.less_is_better) if known else []},
        "its activated parameters",
        "{up} and left. Settings of almost as many parameters are shifted a little.",
    )


def draw_accuracy_by_experts(runs: Sequence[Run], timings: Timings) -> Picture | None:
    """Accuracy of every setting against mean k, FLOPs and time; None where no router decides k."""
    if not _is_zoo(runs):
        return None
    costs, members, points = model_costs(runs), by_setting(runs), _points(runs)
    largest = max(map(_expert_size, runs)) or 1.0

    def k_of(point: Point) -> Point:
        each = [
            model_costs([run])[point.name].mean_k * _expert_size(run) / largest
            for run in members[point.name]
        ]
        return point._replace(x=float(np.mean(each)), x_range=(min(each), max(each)))

    by_k = [point for point in map(k_of, points) if not math.isnan(point.x)]
    by_flops = [point._replace(x=costs[point.name].flops) for point in points]
    picture = _draw_against(
        "accuracy_by_experts",
        runs,
        {
            f"experts that a {runs[0].words.token} activates": by_k,
            f"FLOPs of a {runs[0].words.sample}": [p for p in by_flops if not math.isnan(p.x)],
            MODES["train"]: _timed(points, timings, "train"),
        },
        "the experts that a token activates, and their cost",
        "{up} and left. Experts: mean over MoE layers and runs, parts of an FFN by their size. "
        "Horizontal bars span the lowest to the highest run, those of times the quartiles. Dotted "
        "lines: settings without a number of experts.",
    )
    if picture is not None and by_k:
        axes, placed = picture.figure.axes[0], {point.name for point in by_k}
        for point in points:
            if point.name not in placed:
                axes.axhline(point.y, color=point.style["color"], linestyle=":", zorder=1)
                edge: dict[str, Any] = {"clip_on": False, "transform": axes.get_yaxis_transform()}
                axes.plot(1, point.y, **{**point.style, "linestyle": "none"}, **edge)
    return picture


def _is_zoo(runs: Sequence[Run]) -> bool:
    """Whether routers decide how many experts a token activates: many settings at one cost."""
    return any(run.kind == "varying" for run in runs)


def _expert_size(run: Run) -> float:
    """Return the mean parameters of an expert; 0 without experts."""
    layers = run.facts["costs"]["parameters"]["layers"].values()
    return float(np.mean([layer["expert"] for layer in layers])) if layers else 0.0


def draw_accuracy_by_time(runs: Sequence[Run], timings: Timings) -> Picture | None:
    """Accuracy of every measured setting against the time of training and of inference."""
    points = _points(runs)
    return _draw_against(
        "accuracy_by_time",
        runs,
        {label: _timed(points, timings, mode) for mode, label in MODES.items()},
        "its measured time",
        "{up}, and left for ms, right for samples/s. Horizontal bars span the quartiles. "
        f"Measurements are interleaved: {timings.conditions}.",
    )


def _draw_against(
    name: str, runs: Sequence[Run], costs: Mapping[str, Sequence[Point]], what: str, better: str
) -> Picture | None:
    """Draw a panel for each cost, by its label, that has points.

    Names stand at the points. Where many routers share one cost, families are joined by lines and
    named beside the panels, from the best down. `better` says where that is, with `{up}` in the
    place of up.
    """
    shown: Mapping[str, Sequence[Point]] = {
        each: points for each, points in costs.items() if points
    }
    if not shown:
        return None
    words, places, by_family = runs[0].words, environments(runs), _is_zoo(runs)
    result = f"accuracy, mean of {len(places)} test environments, %"
    if len(places) == 1:
        result = f"{words.measure} on {words.place} {places[0]}, {words.scale.name}"
    if by_family:
        shown = _told_apart(shown)
    width, beside = (5.4, 2.2) if by_family else (7.6, 0)
    figure, panels = lay_out(len(shown), width=width, height=4.3, columns=1, beside=beside)
    for (label, points), axes in zip(shown.items(), panels, strict=True):
        scatter(axes, points, label == MODES["inference"], words.scale.less_is_better)
        axes.set(xlabel=label, ylabel=result)
        if label not in MODES.values():
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        if by_family:
            _join(axes, points)
    if by_family:
        once = {point.name: point for points in shown.values() for point in points}
        names = _names(once.values(), words.scale.better)
        for each in names:  # keys with values would leave no room for the panels
            each.set_label(textwrap.fill(str(each.get_label()), 30, break_long_words=False))
        figure.legend(handles=names, loc="outside right center", frameon=False)
    else:
        for points, axes in zip(shown.values(), panels, strict=True):
            name_points(axes, points)
    joined = " Solid lines join settings that differ in k alone." if by_family else ""
    return Picture(
        name,
        figure,
        f"{capital(words.noun)} of every setting against {what}, with the Pareto front",
        f"{_better(words)}, the standard "
        "error over repetitions as a bar; no setting beats those on the dashed line in both "
        f"measures.{joined} Better is "
        + better.format(up="down" if words.scale.less_is_better else "up"),
    )


def _better(words: Words) -> str:
    if words.scale.less_is_better:
        return "Lower is better"
    return f"Higher is {'more accurate' if words.noun == 'accuracy' else 'better'}"


def _told_apart(panels: Mapping[str, Sequence[Point]]) -> dict[str, list[Point]]:
    """Give each family of the grid, all grey, a marker of its own."""
    unused = itertools.cycle(GRID)
    own: defaultdict[str, Style] = defaultdict(lambda: next(unused))
    return {
        label: [
            point._replace(style=own[family(point.name)]) if point.style is FIXED else point
            for point in points
        ]
        for label, points in panels.items()
    }


def _join(axes: Axes, points: Iterable[Point]) -> None:
    """Draw a line through the points of each family, by rising x."""
    found: defaultdict[str, list[Point]] = defaultdict(list)
    for point in sorted(points, key=lambda point: point.x):
        found[family(point.name)].append(point)
    for members in (each for each in found.values() if len(each) > 1):
        places = [point.x for point in members], [point.y for point in members]
        axes.plot(*places, color=members[0].style["color"], linewidth=1, alpha=0.6)


def _names(points: Iterable[Point], better: int) -> list[Line2D]:
    """Return a legend's entry for each family, or for its only setting, the best one first;
    ``better``: the sign of an improvement."""
    best = sorted(points, key=lambda point: -better * point.y)
    sizes = Counter(family(point.name) for point in best)
    looks: dict[str, Style] = {}
    for point in best:
        label = family(point.name)
        looks.setdefault(label if sizes[label] > 1 else point.name, point.style)
    return [
        Line2D([], [], **{**look, "linestyle": "none"}, label=label)
        for label, look in looks.items()
    ]


def _points(runs: Sequence[Run]) -> list[Point]:
    """Return every setting's result as it is written, on the repetitions it has; x is NaN."""
    cells, place = score_cells(runs), columns(runs)[-1]
    factor = runs[0].scale.factor
    points = []
    for setting, style in styles(runs).items():
        found = [factor * score.accuracy for score in cells[setting, place].values()]
        if found:
            error = float(np.std(found)) / math.sqrt(len(found))
            points.append(Point(setting, math.nan, float(np.mean(found)), error, style))
    return points


def _timed(points: Iterable[Point], timings: Timings, mode: Mode) -> list[Point]:
    found = []
    for point in points:
        timing = timings.by_setting.get((point.name, mode))
        if timing is not None and mode == "train":
            found.append(point._replace(x=timing.milliseconds, x_range=timing.quartiles))
        elif timing is not None:
            span = timing.samples_quartiles
            found.append(point._replace(x=timing.samples_per_second, x_range=span))
    return found
