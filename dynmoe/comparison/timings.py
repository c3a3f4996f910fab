"""Measured times of settings: the `timing.json` files that `dynmoe-bench step --runs` writes.

Times of different machines, settings or workloads are refused, not compared.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dynmoe.comparison.costs import different_facts
from dynmoe.comparison.run import Problem, Run
from dynmoe.comparison.runs import Collection
from dynmoe.records import RecordError

Mode = Literal["train", "inference"]
Range = tuple[float, float]

# What a file of `dynmoe-bench` holds, and each row of `timing.json`.
PARTS = {"command": str, "machine": dict, "settings": dict, "workload": dict, "rows": list}
ROW = {
    *("run", "mode", "median_ms", "quartiles_ms", "samples_per_s", "samples_per_s_quartiles"),
    *("peak_bytes", "contaminated", "rounds"),
}


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
    commands: tuple[str, ...] = ()
    """Those that measured."""

    @property
    def step_ms(self) -> dict[str, float]:
        """Milliseconds of a training step, by setting."""
        return {
            setting: timing.milliseconds
            for (setting, mode), timing in self.by_setting.items()
            if mode == "train"
        }


def read_timings(collection: Collection) -> dict[Problem, Timings]:
    """The times of every problem's settings.

    Raises:
        RecordError: a damaged `timing.json`.
    """
    files = dict.fromkeys(_files(collection))
    contents = {file: read_measured(file, ROW, "step") for file in files}
    return {problem: _timings(collection.of(problem), contents) for problem in collection.problems}


def _timings(runs: Iterable[Run], contents: Mapping[Path, dict[str, Any]]) -> Timings:
    settings = {run.folder.path.resolve(): run.setting for run in runs}
    rows: defaultdict[tuple[str, Mode], list[Mapping[str, Any]]] = defaultdict(list)
    circumstances, commands = [], []
    for file, content in contents.items():
        own = [
            (settings[path], row)
            for row in content["rows"]
            for folder in (file.parent, file.parent.parent)  # of a sweep, or of the run itself
            if (path := (folder / row["run"]).resolve()) in settings
        ]
        for setting, row in own:
            rows[setting, row["mode"]].append(row)
        if own:
            commands.append(content["command"])
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
        refused = f"measured under different conditions: {', '.join(different)}"
        return Timings({}, "", refused, tuple(commands))
    conditions = ", ".join(
        f"{key.split('.', 1)[1]} {value}"
        for facts in circumstances[:1]
        for key, value in facts.items()
    )
    by_setting = {key: _timing(found) for key, found in rows.items()}
    return Timings(by_setting, conditions, "", tuple(commands))


def _files(collection: Collection) -> Iterable[Path]:
    """Beside the sweeps' run folders, in the order the folders were given."""
    for folder in collection.folders:
        for place in (folder, folder.parent):
            if (place / "timing.json").exists():
                yield (place / "timing.json").resolve()
                break


def read_measured(file: Path, row: Set[str], command: str) -> dict[str, Any]:
    """A file that `dynmoe-bench <command> --runs` wrote; each of its rows has the keys `row`.

    Raises:
        RecordError: it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if _is_whole(content, row):
        return content
    raise RecordError(
        f"{file}: expected what `dynmoe-bench {command} --runs {file.parent}` writes, found "
        "something else; measure again, or delete the file"
    )


def _is_whole(content: Any, row: Set[str]) -> bool:
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(part), kind) for part, kind in PARTS.items())
        and all(isinstance(each, dict) and each.keys() >= row for each in content["rows"])
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
