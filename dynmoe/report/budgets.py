"""Table and figure of ``dynmoe-eval mode=budget``: scores over mean experts per token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.drawing import COLOURS, lay_out
from dynmoe.report.evaluations import labels
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import measure_number, panels_of

OWN = "own"
"""The rule of a record of the run as it was trained."""
LABELS = {
    OWN: "as trained",
    "threshold": "threshold: one shift of all",
    "entropy": "entropy of weights",
    "ratio": "ratio to the largest weight",
    "quantile": "quantile of scores, by layer",
    "top_k": "top_k: the k best",
}
MARKS, OWN_MARKS = "os^Dv", "*PX"
OWN_STYLE: dict[str, Any] = {
    "color": "black",
    "markersize": 13,
    "linestyle": "none",
    "zorder": 5,
}


def subject_of(record: Record) -> list[Any]:
    """The entries by which a line is about the same as another, of the same weights: a cut that was
    found for a target is not one."""
    target_k = record["target_k"]
    return [record["rule"], target_k, record["cuts"] if target_k is None else None]


def budget_table(records: Sequence[Record], title: str) -> Table:
    """A row for each evaluation."""
    names = labels(records, lambda each: LABELS[OWN] if each["rule"] == OWN else each["rule"])
    rows = tuple(
        (
            name,
            "-" if each["target_k"] is None else f"{each['target_k']:g}",
            _cut(each),
            format_number(each["mean_k"], ".2f"),
            _span(each["layers"].values(), ".2f"),
            *(measure_number(key, value, 2) for key, value in _results(each).items()),
        )
        for name, each in zip(names, records, strict=True)
    )
    measures = (key.replace("_", " ") for key in _results(records[0]))
    columns = ("rule", "target", "cut", "mean k", "of layers", *measures)
    note = (
        "Mean k and cuts for a target are of the reported sets' inputs, found without their labels."
    )
    if records[0]["measure"] == "loss":  # of texts whose tokens are inputs and labels
        note = (
            "Mean k and cuts for a target are of the reported sets' own tokens: cuts are found on "
            "the texts that the loss is measured on, by mean k alone."
        )
    return Table(f"Budgets after training: {title}", columns, rows, note)


def _results(record: Record) -> dict[str, float]:
    """The reported measure, and the loss if that is another one."""
    return {record["measure"]: record["score"], "loss": record["loss"]}


def _cut(record: Record) -> str:
    if record["cuts"] is None:
        return "-"
    cuts = record["cuts"].values()
    return _span(map(abs, cuts) if record["rule"] == "top_k" else cuts, ".3g")


def _span(numbers: Iterable[float], form: str) -> str:
    values = list(numbers)
    ends = dict.fromkeys((f"{min(values):{form}}", f"{max(values):{form}}"))
    return " to ".join(ends)


def draw_budgets(records: Sequence[Record], title: str) -> Figure:
    """Score and loss over mean k: a line for each rule, the run's own point in black."""
    shown = panels_of(records[0]["measure"])
    figure, panels = lay_out(len(shown), width=3.8, height=3.2, beside=2.4)
    own: dict[str, list[Record]] = {}
    series: dict[str, list[Record]] = {}
    names = labels(records, lambda each: LABELS[each["rule"]])
    for name, each in zip(names, records, strict=True):
        (own if each["rule"] == OWN else series).setdefault(name, []).append(each)
    styles = [{**OWN_STYLE, "marker": mark} for _, mark in zip(own, itertools.cycle(OWN_MARKS))]
    for _, colour, mark in zip(series, itertools.cycle(COLOURS), itertools.cycle(MARKS)):
        styles.append({"color": colour, "marker": mark, "markersize": 5})
    for axes, (key, (text, factor)) in zip(panels, shown.items(), strict=True):
        axes.set_ylabel(text)
        for (name, found), style in zip((own | series).items(), styles, strict=True):
            x, y = zip(*sorted((each["mean_k"], factor * each[key]) for each in found), strict=True)
            axes.plot(x, y, label=name, **style)
        axes.set_xlabel("mean experts per token")
        axes.grid(alpha=0.25)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure
