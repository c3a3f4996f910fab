"""Table and figure of ``dynmoe-eval mode=quantize``: scores over average bits of a weight."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dynmoe.records import Record
from dynmoe.report.drawing import COLOURS, DASHES, lay_out
from dynmoe.report.evaluations import labels
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import measure_number, panels_of

FP32 = "fp32"
"""The method of the record of the run as it was trained."""
MARKS = "os^Dv<>p"


def subject_of(record: Record) -> list[Any]:
    """The entries by which a line is about the same as another, of the same weights."""
    return [record["method"], record.get("options")]


def quantize_table(records: Sequence[Record], title: str) -> Table:
    """A row for each evaluation."""
    first = records[0]
    measure = first["measure"].replace("_", " ")
    known = ("weights", "bits", "with grids", "mean k", measure, "loss")
    columns = (*known, "error (RTN)", "MB", "samples/s")
    varied = varied_options(records)
    names = labels(records, lambda each: label(each, varied))
    rows = [
        (
            name,
            _number(each.get("average_bits"), ".2f"),
            _number(each.get("average_bits_with_grids"), ".2f"),
            format_number(each["mean_k"], ".2f") if each["layers"] else "-",
            measure_number(each["measure"], each["score"], 2),
            measure_number("loss", each["loss"]),
            _errors(each),
            _megabytes(each, records),
            _speed(each, records),
        )
        for name, each in zip(names, records, strict=True)
    ]
    # Not columns in which nothing stands, nor the loss again where it is the measure.
    shown = [
        i
        for i in range(len(columns))
        if columns[i] not in columns[:i] and (i == 0 or any(row[i] != "-" for row in rows))
    ]
    note = (
        "Bits: mean over the weights of linear layers in blocks; with grids: and their scales and "
        "zeros. Error: squared error of a layer's outputs on calibration data over their sum of "
        "squares, mean over layers; in brackets that of rounding to nearest."
    )
    return Table(
        f"Quantised weights: {title}",
        tuple(columns[i] for i in shown),
        tuple(tuple(row[i] for i in shown) for row in rows),
        note,
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format_number(value, form)


def _errors(record: Record) -> str:
    error, rtn_error = record.get("output_error"), record.get("rtn_output_error")
    return "-" if error is None else f"{error:.2g} ({rtn_error:.2g})"


def _megabytes(record: Record, records: Sequence[Record]) -> str:
    size = record.get("bytes")
    if record["method"] == FP32:
        size = next((each["fp32_bytes"] for each in records if "bytes" in each), None)
    return "-" if size is None else f"{size / 1e6:.1f}"


def _speed(record: Record, records: Sequence[Record]) -> str:
    speed = record.get("samples_per_s")
    if record["method"] == FP32:
        speed = next((each["fp32_samples_per_s"] for each in records if "bytes" in each), None)
    return "-" if speed is None else f"{speed:.1f}"


def varied_options(records: Sequence[Record]) -> list[str]:
    """Return the options that differ among the quantisations, the bits of most weights last."""
    options = [each["options"] for each in records if "options" in each]
    keys = {key: None for each in options for key in each if key != "method"}
    found = [key for key in keys if len({str(each.get(key)) for each in options}) > 1]
    return sorted(found, key=lambda key: key == "bits.default")


def label(record: Record, varied: Sequence[str]) -> str:
    """The words for a record's weights: method, and the options ``varied`` that are set."""
    options: Mapping[str, Any] = record.get("options", {})
    words = [
        f"{key.removeprefix('bits.')} {_word(options[key])}"
        for key in varied
        if key in options and options[key] is not None
    ]
    return " ".join([record["method"], *words])


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def draw_quantisations(records: Sequence[Record], title: str) -> Figure:
    """Score and loss over average bits: a line for each policy over ``bits.default``, the run's own
    weights a broken one. Exports, whose bits are torchao's, are not drawn."""
    shown = panels_of(records[0]["measure"])
    figure, panels = lay_out(len(shown), width=3.8, height=3.2, beside=2.9)
    varied = [key for key in varied_options(records) if key != "bits.default"]
    own: dict[str, Record] = {}
    series: dict[str, list[Record]] = {}
    names = labels(records, lambda each: label(each, varied))
    for name, each in zip(names, records, strict=True):
        if each["method"] == FP32:
            own[name] = each
        elif "average_bits" in each:
            series.setdefault(name, []).append(each)
    for axes, (key, (text, factor)) in zip(panels, shown.items(), strict=True):
        axes.set_ylabel(text)
        for (name, each), dashes in zip(own.items(), itertools.cycle(DASHES[1:])):
            style: dict[str, Any] = {"color": "black", "linestyle": dashes, "linewidth": 1}
            axes.axhline(factor * each[key], label=name, **style)
        for number, (name, found) in enumerate(series.items()):
            xy = sorted((each["average_bits"], factor * each[key]) for each in found)
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
            x, y = zip(*xy, strict=True)
            axes.plot(x, y, label=name, color=colour, marker=mark, markersize=5)
        axes.set_xlabel("average bits of a weight")
        axes.grid(alpha=0.25)
    legend = panels[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside right center", frameon=False)
    figure.suptitle(title, fontsize="medium")
    return figure
