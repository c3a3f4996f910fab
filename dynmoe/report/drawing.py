"""What all figures share: colours, panels, heat maps, axes of whole numbers, and saving.

Only `Figure` objects are used, so drawing leaves no global state in matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

# Okabe & Ito 2008, "Color Universal Design". Black is kept for what a figure compares with; grey
# stands in for the yellow, which is too pale on paper.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F")
DASHES = ("-", "--", ":", "-.")
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
    """Panels of `width` x `height` inches, `columns` in a row, and room `beside` for a legend."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    size = (columns * width + beside, rows * height + 0.6)
    figure = PlainFigure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat
    for axes in grid[count:]:
        axes.remove()
    return figure, list(grid[:count])


def name_axes(figure: Figure, across: str, up: str = "") -> None:
    """What all panels have on their axes, once."""
    figure.supxlabel(across, fontsize="medium")
    figure.supylabel(up, fontsize="medium")


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
    """As PNG or SVG, by the suffix; the same figure gives the same bytes.

    Letters in an SVG are outlines, since a reader's machine may lack the font.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "dynmoe", "svg.fonttype": "path"}):
        figure.savefig(path, dpi=150, metadata=metadata)
    figure.set_layout_engine("none")  # where everything is now, it is in the next file too
    return path
