"""Tools of all figures: colours, panels, heat maps, scatter plots with names, and saving.

Only `Figure` objects are used, so drawing leaves no global state in matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

# Okabe & Ito 2008, "Color Universal Design". Black is kept for what a figure compares with; grey
# takes the place of the yellow, which is too pale on paper.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
BLUE, RED, GREY = "#0072B2", "#D55E00", "#666666"
STEP = "optimizer step"

# Above this many columns the numbers in a heat map's cells would run into one another.
MOST_NUMBERS = 20


class PlainFigure(Figure):
    """A figure whose text is no mathematics: the name of a folder may hold dollar signs."""

    def draw(self, renderer: RendererBase) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        with rc_context({"text.parse_math": False}):  # for ticks that are made while drawing
            super().draw(renderer)


def lay_out(
    count: int,
    width: float = 3.4,
    height: float = 2.2,
    share: bool = False,
    columns: int = 3,
    beside: float = 1.4,
) -> tuple[Figure, list[Axes]]:
    """Return panels of `width` x `height` inches, `columns` in a row, and `beside` for a legend."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = (columns * width + beside, rows * height + 0.6)
    figure = PlainFigure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat
    for axes in grid[count:]:
        axes.remove()
    panels = list(grid[:count])
    for axes in panels[-columns:]:  # also above a panel that was removed
        axes.tick_params(labelbottom=True)
    return figure, panels


def name_axes(figure: Figure, across: str, up: str = "") -> None:
    """Write the labels that all panels share once per figure."""
    figure.supxlabel(across, fontsize="medium")
    figure.supylabel(up, fontsize="medium")


def legend_below(
    figure: Figure, panels: Sequence[Axes], handles: Sequence[Artist], across: str, columns: int
) -> None:
    """Put a legend below the panels, which makes the figure higher by its rows.

    The label that panels share is at the lowest of each column: at the figure's edge it would be in
    the legend.
    """
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(handles) / columns))
    place = panels[0].get_subplotspec()
    assert place is not None
    for axes in panels[-place.get_gridspec().ncols :]:
        axes.set_xlabel(across)
    names: dict[str, Any] = {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles=handles, frameon=False, columnspacing=1.2, **names)


def over_steps(axes: Axes) -> None:
    """A grid, and whole steps on the horizontal axis."""
    axes.xaxis.set_major_locator(whole_numbers())
    axes.grid(alpha=0.25)


def whole_numbers() -> MaxNLocator:
    # With two ticks as the fewest, an axis around one number would be divided into fractions.
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def percent_of_rows(counts: Sequence[Sequence[float]], columns: int) -> np.ndarray:
    """Each row's counts as shares of the row, in per cent; NaN where a row is too short."""
    shares = np.full((len(counts), columns), math.nan)
    for row, values in enumerate(counts):
        shares[row, : len(values)] = 100 * np.asarray(values) / max(1, sum(values))
    return shares


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[Any],
    form: str = ".0f",
    lightest: float = 0,
    darkest: float | None = None,
) -> None:
    """Numbers as shades, with the numbers in the cells if they fit; NaN is grey.

    The palest shade is `lightest`, the darkest one `darkest`, by default the largest number.
    """
    top = float(np.nanmax(values)) if darkest is None else darkest
    image = axes.imshow(values, cmap="Blues", vmin=lightest, vmax=top, aspect="auto")
    axes.set_facecolor("0.85")
    axes.set_yticks(range(len(rows)), rows)
    if len(columns) > MOST_NUMBERS:
        axes.xaxis.set_major_locator(whole_numbers())
        axes.figure.colorbar(image, ax=axes, pad=0.01)
        return
    axes.set_xticks(range(len(columns)), [str(column) for column in columns])
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if value - lightest > 0.6 * (top - lightest) else "black"
            place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{value:{form}}", color=colour, **place)


def save(figure: Figure, path: Path) -> Path:
    """Save as PNG or SVG, by the suffix; the same figure gives the same bytes.

    Letters in an SVG are outlines, since a reader's machine may lack the font.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_dpi(150)
    # NOTE: savefig would draw twice, for the layout alone at first, in almost twice the time.
    with rc_context({"svg.hashsalt": "dynmoe", "svg.fonttype": "path"}):
        if path.suffix == ".svg":
            FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
        else:
            FigureCanvasAgg(figure).print_png(path)
    figure.set_layout_engine("none")  # where everything is now, it is in the next file too
    return path


# Points of two measures with error bars, their Pareto front, and a name beside every point.

# The least distance of two error bars, as a share of the span of all points.
CLEARANCE = 0.012


class Point(NamedTuple):
    name: str
    x: float
    y: float
    y_error: float
    style: Mapping[str, Any]
    """For `Axes.plot`."""
    x_range: tuple[float, float] | None = None


def scatter(
    axes: Axes,
    points: Sequence[Point],
    more_is_better: bool = False,
    less_y_is_better: bool = False,
) -> None:
    """Draw the points and, dashed, the Pareto front: x is better low, or high if more is better; y
    high, or low."""
    for point in points:
        low, high = point.x_range or (point.x, point.x)
        bars: dict[str, Any] = {"color": point.style["color"], "linewidth": 0.8, "alpha": 0.6}
        axes.plot([point.x] * 2, [point.y - point.y_error, point.y + point.y_error], **bars)
        axes.plot([low, high], [point.y] * 2, **bars)
        axes.plot(point.x, point.y, **{**point.style, "linestyle": "none"})
    best = front(points, more_is_better, less_y_is_better)
    # Stairs: at a given x the best y is that of the last point that costs no more, or of the next
    # one that is as fast.
    # They reach as far as there are points.
    x, y = (np.repeat([getattr(point, axis) for point in best], 2) for axis in "xy")
    ends = [point.x for point in points]
    if more_is_better:
        corners = np.append(min(ends), x[:-1]), np.append(y[0], y[1:])
    else:
        corners = np.append(x[1:], max(ends)), np.append(y[:-1], y[-1])
    axes.plot(*corners, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.margins(0.12)
    axes.grid(alpha=0.25)


def set_apart(points: Sequence[Point], less_y_is_better: bool = False) -> list[Point]:
    """Move points of almost the same x a little sideways, so that no error bar hides another.

    They keep their order, the better one of equal x first, so the front stays as it is.
    """
    sign = -1 if less_y_is_better else 1
    ordered = sorted(points, key=lambda point: (point.x, -sign * point.y))
    least = CLEARANCE * (ordered[-1].x - ordered[0].x)
    groups = [ordered[:1]]
    for before, point in itertools.pairwise(ordered):
        if point.x - before.x >= least:
            groups.append([])
        groups[-1].append(point)
    moved = []
    for group in groups:
        first = (group[0].x + group[-1].x - least * (len(group) - 1)) / 2
        moved += [point._replace(x=first + least * i) for i, point in enumerate(group)]
    return moved


def front(
    points: Sequence[Point], more_is_better: bool = False, less_y_is_better: bool = False
) -> list[Point]:
    """Return the points that no other one beats in both measures, by rising x."""
    sign, up = -1 if more_is_better else 1, -1 if less_y_is_better else 1
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (sign * point.x, -up * point.y)):
        if not best or up * point.y > up * best[-1].y:
            best.append(point)
    return best[::sign]


# Places of a name about its point, the nearest first; distances in points of 1/72 inch.
DISTANCES = (4, 8, 14, 24, 36, 50)
AROUND = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DIRECTIONS = np.array(AROUND * len(DISTANCES))
OFFSETS = DIRECTIONS * np.repeat(DISTANCES, len(AROUND))[:, None]
ACROSS = {-1: "right", 0: "center", 1: "left"}
UP = {-1: "top", 0: "center", 1: "bottom"}


def name_points(axes: Axes, points: Sequence[Point], font: float = 8) -> None:
    """Write every name where it hides least: no point, no other name, nothing beyond the panel.

    Call it when the figure is otherwise complete: names do not move what is drawn. adjustText
    would do this too, but it imports pyplot.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    unit = figure.dpi / 72
    places = axes.transData.transform([(point.x, point.y) for point in points])
    taken = [np.array([place - 4 * unit, place + 4 * unit]) for place in places]
    for line in axes.lines:
        for ends in itertools.pairwise(line.get_transform().transform(line.get_xydata())):
            taken.append(np.array([np.minimum(*ends) - unit, np.maximum(*ends) + unit]))
    panel = axes.bbox.get_points()
    box = {"boxstyle": "square,pad=0.05", "facecolor": "white", "alpha": 0.7, "linewidth": 0}
    arrow = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkB": 3}
    # Names of the outermost points come first: they have the least room.
    for index in np.argsort(-abs(places[:, 0] - panel[:, 0].mean()), kind="stable"):
        point = points[index]
        name = axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=font,
            parse_math=False,
            color=point.style["color"],
            arrowprops=arrow,
            bbox=box,
        )
        name.set_in_layout(False)
        # NOTE: the annotation's own extent would hold its line too.
        size = np.array(Text.get_window_extent(name, renderer).size)
        corners = places[index] + unit * OFFSETS + size * (DIRECTIONS - 1) / 2
        boxes = np.stack([corners, corners + size], axis=1)
        beyond = size.prod() - _common_area(boxes, [panel])
        # A long way is worth it to keep clear of a name, not of the end of a thin line.
        best = int(np.argmin(beyond + _common_area(boxes, taken) + abs(OFFSETS).max(axis=1)))
        right, up = DIRECTIONS[best]
        name.set(position=OFFSETS[best], ha=ACROSS[right], va=UP[up])
        taken.append(boxes[best])
        if name.arrow_patch is not None:  # a line to the point, unless they are neighbours
            name.arrow_patch.set_visible(bool(abs(OFFSETS[best]).max() > DISTANCES[1]))


def _common_area(boxes: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """The area that each box, ((left, bottom), (right, top)), shares with the others, summed."""
    low, high = np.stack(others, axis=1)
    sides = np.minimum(boxes[:, None, 1], high) - np.maximum(boxes[:, None, 0], low)
    return sides.clip(0).prod(axis=-1).sum(axis=1)
