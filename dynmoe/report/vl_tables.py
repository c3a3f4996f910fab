"""Tables of a run about images: scores by kind of question, and k by what a token is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dynmoe.report.parts import PARTS
from dynmoe.report.question_sets import kind_name, kind_number, set_notes, unit_of
from dynmoe.report.summary import Scores, Summary
from dynmoe.report.tables import Table, format_number
from dynmoe.report.words import has_fixed_k, is_vision_language, layer_name
from dynmoe.selection import judging_set


def kind_tables(summary: Summary) -> Iterator[Table]:
    """A row for each kind of question; sets of the same kinds share a table."""
    groups: dict[tuple[str, ...], list[Scores]] = {}
    for each in summary.scores:
        if each.kinds:
            groups.setdefault(tuple(each.kinds), []).append(each)
    for kinds, sets in groups.items():
        names = [each.name for each in sets]
        yield Table(
            f"By kind of question, in {unit_of(kinds)}",
            ("kind", *names),
            tuple(
                (kind_name(kind), *(kind_number(kind, each.kinds[kind]) for each in sets))
                for kind in kinds
            ),
        )


def parts_table(summary: Summary, tested: str) -> Table | None:
    """Mean k of every MoE layer for image, prompt and answer tokens; None if they are not told
    apart, or all have the same k."""
    layers = [layer for layer in summary.layers if layer.k_test_by_part]
    if not layers or has_fixed_k(summary.run):
        return None
    k = {
        layer_name(layer.name): [
            each.get(part, np.nan)
            for each in (layer.k_test_by_part, layer.k_train_by_part)
            for part in PARTS
        ]
        for layer in layers
    }
    if len(layers) > 1:
        k["mean"] = np.mean(list(k.values()), axis=0).tolist()
    return Table(
        "Mean k by part of the conversation",
        ("MoE layer", *(f"{part}, {where}" for where in (tested, "train") for part in PARTS)),
        tuple((name, *(format_number(each, ".2f") for each in row)) for name, row in k.items()),
        note=f"image: patches; prompt: other tokens before the answer; answer: what was said, in "
        f"training what is right, on {tested} what the model said.",
    )


def score_notes(summary: Summary) -> list[str]:
    """How to read the scores of sets of questions; empty for other runs."""
    run = summary.run
    if not is_vision_language(run):
        return []
    notes = set_notes([each.name for each in summary.scores])
    if run["baseline"]:
        reported = judging_set(run)
        same, majority = (100 * run["baseline"][key] for key in (f"{reported}_score", "majority"))
        notes.append(
            f"Without images {reported} gives {same:.1f} % by the most frequent answer to the same "
            f"question, {majority:.1f} % by the most frequent answer of all."
        )
    if run["stage"] == "align":
        notes.append("This stage trains on captions alone; answers come with the next one.")
    return notes


def stage_of(summary: Summary) -> str:
    """`Stage moe, started from vl_instruct/... . `; empty for runs without stages."""
    run = summary.run
    if not is_vision_language(run):
        return ""
    start = run["config"].get("stage.start")
    return f"Stage {run['stage']}{f', started from {start}' if start else ''}. "
