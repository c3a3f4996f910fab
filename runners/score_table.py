"""Scores of a run, measured again, beside those that its records have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dynmoe.records import RunFolder
from dynmoe.report.question_sets import is_points


def print_scores(
    folder: RunFolder,
    checkpoint: Path,
    step: int,
    scores: Mapping[str, float],
    places: Mapping[str, str],
) -> None:
    """`scores` have their names in ``results.jsonl``; `places` are what these begin with, and in
    words."""
    from rich.console import Console
    from rich.table import Table

    recorded = {r["step"]: r for r in folder.read("results")}.get(step, {})
    console, table = Console(), Table()
    for column in ("evaluated on", "measure", "now", "recorded"):
        table.add_column(column, justify="right" if column in ("now", "recorded") else "left")
    for key, score in scores.items():
        place = max((place for place in places if key.startswith(f"{place}_")), key=len)
        what = key.removeprefix(f"{place}_")
        before = _shown(what, recorded[key]) if key in recorded else "-"
        table.add_row(places[place], what.replace("_", " "), _shown(what, score), before)
    points = ", points as they are" if any(map(is_points, scores)) else ""
    console.print(f"{folder.path.name}, {checkpoint.name}, step {step}; in %{points}")
    console.print(table)


def _shown(measure: str, score: float) -> str:
    return f"{score if is_points(measure) else 100 * score:.2f}"
