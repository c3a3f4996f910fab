"""Measured times of settings: the `timing.json` files that `dynmoe-bench step --runs` writes.

Times of different machines, settings or workloads are refused, not compared.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynmoe.comparison.costs import different_facts
from dynmoe.comparison.run import Problem
from dynmoe.comparison.runs import Collection
from dynmoe.report.records import RecordError

Mode = Literal["train", "inference"]
Range = tuple[float, float]


@dataclass(frozen=True)
class Timing:
    """One setting in one mode. Of several measured runs: mean of medians, widest quartiles."""

    milliseconds: float
    """Of one training step, or one forward pass of a batch."""
    quartiles: Range
    samples_per_second: float
    samples_quartiles: Range
    peak_bytes: float | None
    contaminated: bool
    """Other processes were busy during more than half of the samples."""


@dataclass(frozen=True)
class Timings:
    by_setting: Mapping[tuple[str, Mode], Timing]
    conditions: str
    """Machine, settings and workload; empty without a measurement."""
    refused: str
    """Why the times are not compared; empty if they are."""


def read_timings(collection: Collection, problem: Problem) -> Timings:
    """The times of a problem's settings.

    Raises:
        RecordError: a damaged `timing.json`.
    """
    settings = {run.folder.path.resolve(): run.setting for run in collection.of(problem)}
    rows: defaultdict[tuple[str, Mode], list[Mapping[str, Any]]] = defaultdict(list)
    circumstances = []
    for file in dict.fromkeys(_files(collection)):
        content = _read(file)
        own = [
            (settings[path], row)
            for row in content["rows"]
            for folder in (file.parent, file.parent.parent)  # of a sweep, or of the run itself
            if (path := (folder / row["run"]).resolve()) in settings
        ]
        for setting, row in own:
            rows[setting, row["mode"]].append(row)
        if own:
            circumstances.append(
                {
                    f"{part}.{key}": value
                    for part in ("machine", "settings", "workload")
                    for key, value in content[part].items()
                }
            )
    keys = dict.fromkeys(key for facts in circumstances for key in facts)
    different = different_facts(circumstances, keys)
    if different:
        return Timings({}, "", f"measured under different conditions: {', '.join(different)}")
    conditions = ", ".join(
        f"{key.split('.', 1)[1]} {value}"
        for facts in circumstances[:1]
        for key, value in facts.items()
    )
    return Timings({key: _timing(found) for key, found in rows.items()}, conditions, "")


def _files(collection: Collection) -> Iterable[Path]:
    """Beside the sweeps' run folders, in the order the folders were given."""
    for folder in collection.folders:
        for place in (folder, folder.parent):
            if (place / "timing.json").exists():
                yield (place / "timing.json").resolve()
                break


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    parts = {"machine", "settings", "workload", "rows"}
    if isinstance(content, dict) and parts <= content.keys():
        return content
    raise RecordError(
        f"{file}: expected what `dynmoe-bench step --runs {file.parent}` writes, found something "
        "else; measure again, or delete the file"
    )


def _timing(rows: list[Mapping[str, Any]]) -> Timing:
    peaks = [row["peak_bytes"] for row in rows if row["peak_bytes"] is not None]
    return Timing(
        float(np.mean([row["median_ms"] for row in rows])),
        _widest(row["quartiles_ms"] for row in rows),
        float(np.mean([row["samples_per_s"] for row in rows])),
        _widest(row["samples_per_s_quartiles"] for row in rows),
        float(max(peaks)) if peaks else None,
        any(2 * row["contaminated"] > row["rounds"] for row in rows),
    )


def _widest(ranges: Iterable[Range]) -> Range:
    low, high = zip(*ranges, strict=True)
    return min(low), max(high)
