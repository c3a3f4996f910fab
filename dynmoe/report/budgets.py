"""Table and figure of ``dynmoe-eval mode=budget``: scores over mean experts per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.drawing import COLOURS, lay_out
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import is_points, measure_number

OWN = "own"
"""The rule of a record of the run as it was trained."""
LABELS = {
    OWN: "as trained",
    "threshold": "common shift of thresholds",
    "entropy": "entropy cut",
    "ratio": "ratio of weights",
    "quantile": "quantile of scores, by layer",
    "top_k": "the k best",
}
MARKS = "os^Dv"


def budget_table(records: Sequence[Record], title: str) -> Table:
    """A row for each evaluation."""
    rows = tuple(
        (
            LABELS[each["rule"]],
            "-" if each["target_k"] is None else f"{each['target_k']:g}",
            _cut(each),
            format_number(each["mean_k"], ".2f"),
            " ".join(format_number(k, ".2f") for k in each["layers"].values()),
            measure_number(each["measure"], each["score"], 2),
            measure_number("loss", each["loss"]),
        )
        for each in records
    )
    columns = ("rule", "target", "cut", "mean k", "by layer", records[0]["measure"], "loss")
    note = "Cuts were found on the inputs that are scored, without their labels."
    return Table(f"Budgets after training: {title}", columns, rows, note)


def _cut(record: Record) -> str:
    if record["cuts"] is None:
        return "-"
    values = list(record["cuts"].values())
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def draw_budgets(records: Sequence[Record], title: str) -> Figure:
    """Score and loss over mean k: a line for each rule, the run's own point in black."""
    figure, panels = lay_out(2, width=3.8, height=3.2, beside=2.4)
    measure = records[0]["measure"]
    factor = 1 if is_points(measure) else 100
    unit = "" if is_points(measure) else ", %"
    panels[0].set_ylabel(f"{measure.replace('_', ' ')}{unit}")
    panels[1].set_ylabel("mean negative log-likelihood")
    rules = list(dict.fromkeys(each["rule"] for each in records))
    for axes, key, times in zip(panels, ("score", "loss"), (factor, 1), strict=True):
        for number, rule in enumerate(rules):
            found = sorted(
                (each for each in records if each["rule"] == rule), key=lambda each: each["mean_k"]
            )
            style: dict[str, Any] = {
                "color": COLOURS[number - 1],
                "marker": MARKS[(number - 1) % len(MARKS)],
                "markersize": 5,
            }
            if rule == OWN:
                style = {"color": "black", "marker": "*", "markersize": 13, "linestyle": "none"}
                style["zorder"] = 5
            x, y = [each["mean_k"] for each in found], [times * each[key] for each in found]
            axes.plot(x, y, label=LABELS[rule], **style)
        axes.set_xlabel("mean experts per token")
        axes.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure
