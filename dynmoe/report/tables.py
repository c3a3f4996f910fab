"""A table, its cells, and its forms: console, Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

# Signs that LaTeX reads as commands, or that its fonts lack.
LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
}


class Scale(NamedTuple):
    """How the numbers of a measure are written and compared."""

    name: str = "%"
    """Their unit in the head of a column."""
    unit: str = " %"
    """Text that follows a number within a sentence."""
    steps: str = "points"
    """The unit of differences."""
    factor: float = 100
    digits: int = 1
    less_is_better: bool = False

    @property
    def better(self) -> int:
        """The sign of a difference that is an improvement."""
        return -1 if self.less_is_better else 1


SHARE = Scale()


class Strong(str):
    """A cell that stands out: the number a protocol reports, the best of a column."""


@dataclass(frozen=True)
class Table:
    """Cells are text as people read it. The first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """Explanation of the numbers."""
    conditions: str = ""
    """Conditions of its numbers: protocol, selection rule, seeds, weights, data, versions."""
    in_words: bool = False
    """Whether its cells are words, which are aligned left."""

    @property
    def foot(self) -> str:
        """Text below the rows."""
        return " ".join(text for text in (self.note, self.conditions) if text)


def format_mean(results: Sequence[float], scale: Scale = SHARE) -> str:
    """Mean and standard error over repetitions: `20.0 +/- 4.7`; `20.0` of a single one, which has
    no error; `X` without any, or where one is not a number."""
    values = list(results)
    if not values or not np.isfinite(values).all():
        return "X"
    if len(values) == 1:
        return f"{scale.factor * values[0]:.{scale.digits}f}"
    return format_trials(values, scale)


def format_result(result: float, scale: Scale = SHARE) -> str:
    """A number with its unit, for a sentence; a dash for NaN."""
    return format_number(scale.factor * result, f".{scale.digits}f", scale.unit)


def format_trials(results: Sequence[float], scale: Scale = SHARE) -> str:
    """Mean and standard error over trials as DomainBed prints them: `20.0 +/- 0.0` of one trial.

    The standard error is the population standard deviation (ddof 0) over the root of the number
    of trials, as in domainbed/scripts/collect_results.py. DomainBed's published tables use it, so
    ours compare. Per cent come last, as there: of 40.5, 73.5 and 30.75 % the mean prints as 48.3,
    and as 48.2 where per cent come first.
    """
    if len(results) == 0:
        return "X"
    values = np.asarray(results, dtype=float)
    error = (values / np.sqrt(len(values))).std()
    mean, error = (f"{scale.factor * x:.{scale.digits}f}" for x in (values.mean(), error))
    return f"{mean} +/- {error}"


def format_points(difference: float, scale: Scale = SHARE) -> str:
    """A difference with its sign, of accuracies in percentage points: `−2.3`; `0.0` has none.

    A difference that would round to 0 without being 0 has one decimal more; below that it is 0.
    """
    points = round(scale.factor * difference, scale.digits + 1)
    digits = scale.digits + bool(points and not round(points, scale.digits))
    return f"{points:+.{digits}f}".replace("-", "−") if points else f"{0:.{scale.digits}f}"


def format_number(value: float, form: str, unit: str = "") -> str:
    """Format a number as `str.format` does, with its unit; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:{form}}{unit}"


def to_rich(table: Table) -> RichTable:
    """Return the table for the console."""
    rich_table = RichTable(
        title=table.title,
        caption=Text(table.foot) if table.foot else None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for index, column in enumerate(table.columns):
        side: Literal["left", "right"] = "right" if index and not table.in_words else "left"
        whole = index < 2 and not table.in_words  # words may fold, a column must not vanish
        rich_table.add_column(Text(column), justify=side, no_wrap=whole, overflow="fold")
    for row in table.rows:
        cells = (Text(cell, "bold green" if isinstance(cell, Strong) else "") for cell in row)
        rich_table.add_row(*cells)
    return rich_table


def to_markdown(table: Table) -> str:
    """Return header and rows, without title and note."""
    rows = [
        table.columns,
        ("---", *("---" if table.in_words else "---:" for _ in table.columns[1:])),
        *(
            tuple(f"**{cell}**" if isinstance(cell, Strong) else cell for cell in row)
            for row in table.rows
        ),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def to_csv(table: Table) -> str:
    """Return header and rows, for a spreadsheet."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    return text.getvalue()


def to_latex(table: Table) -> str:
    """Return a booktabs table; the title is its caption, the note is below the rows."""
    lines = [" & ".join(map(latex, row)) + r" \\" for row in (table.columns, *table.rows)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{latex(table.title)}}}",
            rf"\begin{{tabular}}{{l{('l' if table.in_words else 'r') * (len(table.columns) - 1)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            *([rf"\par\footnotesize {latex(table.foot)}"] if table.foot else []),
            r"\end{table}",
            "",
        ]
    )


def latex(cell: str) -> str:
    """Escape a cell; a `Strong` one is bold."""
    text = "".join(LATEX.get(sign, sign) for sign in cell)
    return rf"\textbf{{{text}}}" if isinstance(cell, Strong) else text
