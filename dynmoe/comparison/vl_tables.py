"""Tables of runs about images: by kind of question, beside published results, k by part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynmoe.comparison.conditions import conditions
from dynmoe.comparison.published import (
    MARK,
    QUESTION_NOTE,
    QUESTION_ROWS,
    QUESTIONS,
    published_answers,
)
from dynmoe.comparison.routing import layers_of, of_layer, on_tests, training
from dynmoe.comparison.run import Run, by_setting
from dynmoe.report.parts import PARTS, k_by_part
from dynmoe.report.question_sets import SHUFFLED, is_points, kind_name, kinds_of, unit_of
from dynmoe.report.tables import Strong, Table, format_mean, format_number
from dynmoe.report.words import layer_name


def kind_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """By set, every setting's scores by kind of question; none of sets without kinds."""
    tables = {}
    for name in _sets(runs):
        members = [run for run in runs if name in run.facts["env_names"]]
        kinds = list(dict.fromkeys(kind for run in members for kind in _kinds(run, name)))
        if kinds:
            tables[name] = _kind_table(name, kinds, members)
    return tables


def _kind_table(name: str, kinds: Sequence[str], runs: Sequence[Run]) -> Table:
    values = {
        setting: [
            [found[kind] for run in own if kind in (found := _kinds(run, name))] for kind in kinds
        ]
        for setting, own in by_setting(runs).items()
    }
    return Table(
        f"By kind of question on {name}, {unit_of(kinds)}",
        ("setting", *map(kind_name, kinds)),
        tuple(
            (setting, *(_cell(*each) for each in zip(kinds, row, _highest(values), strict=True)))
            for setting, row in values.items()
        ),
        note="Mean over repetitions, +/- the standard error (ddof 0). Bold: the highest of a "
        "column.",
        conditions=conditions(runs),
    )


def _highest(values: Mapping[str, Sequence[Sequence[float]]]) -> list[float | None]:
    """The highest mean of each column; None where all are equal."""
    columns = zip(*values.values(), strict=True)
    means = [{float(np.mean(cell)) for cell in column if cell} for column in columns]
    return [max(found) if len(found) > 1 else None for found in means]


def published_table(runs: Sequence[Run]) -> Table | None:
    """Published sets in the measures of published tables, theirs below ours; None without any."""
    sets = [name for name in QUESTIONS if name in _sets(runs)]
    if not sets:
        return None
    rows = [
        (
            setting,
            *(
                _cell(
                    QUESTIONS[name],
                    [
                        run.reported[key]
                        for run in members
                        if (key := f"{name}_{QUESTIONS[name]}") in run.reported
                    ],
                )
                for name in sets
            ),
        )
        for setting, members in by_setting(runs).items()
    ]
    theirs = [
        (f"{model} ({MARK})", *(f"{published_answers(model)[name]:.1f}" for name in sets))
        for model in QUESTION_ROWS
    ]
    names = {"scienceqa": "scienceqa, with images", "mme": "mme, points of perception"}
    return Table(
        "Published sets of questions",
        ("setting", *(names.get(name, f"{name}, %") for name in sets)),
        (*rows, *theirs),
        note=f"+/- is the standard error over repetitions (ddof 0). {QUESTION_NOTE}",
        conditions=conditions(runs),
    )


def parts_table(runs: Sequence[Run]) -> Table | None:
    """Mean k of image, prompt and answer tokens in every layer of every adaptive setting; None
    where they are not told apart."""
    adaptive = [run for run in runs if run.kind == "adaptive" and has_parts(run)]
    if not adaptive:
        return None
    tested = adaptive[0].environment
    rows: list[tuple[str, ...]] = []
    for setting, members in by_setting(adaptive).items():
        layers = layers_of(members[0])
        k = np.array([[_k_of(run, layer) for layer in layers] for run in members]).mean(axis=0)
        names = list(map(layer_name, layers))
        if len(layers) > 1:
            k, names = np.vstack([k, k.mean(axis=0)]), [*names, "mean of layers"]
        rows += [
            (setting, name, *(format_number(each, ".2f") for each in row))
            for name, row in zip(names, k, strict=True)
        ]
    return Table(
        "Experts that a token activates, by what it is",
        (
            "setting",
            "MoE layer",
            "living experts",
            *(f"{part}, {where}" for where in (tested, "training") for part in PARTS),
        ),
        tuple(rows),
        note=f"Mean over repetitions of mean k, at the reported step: on {tested}, and in training "
        "since the evaluation before. Image: patches; prompt: other tokens before the answer; "
        f"answer: on {tested} what the model said, in training what is right.",
        conditions=conditions(adaptive),
    )


def has_parts(run: Run) -> bool:
    return any("parts" in line for line in on_tests(run))


def _k_of(run: Run, layer: str) -> list[float]:
    """Living experts, then k of each part on what is reported and in training."""
    tested, trained = (of_layer(lines, layer) for lines in (on_tests(run), training(run)))
    found = [k_by_part(lines) for lines in (tested, trained)]
    return [len(tested[0]["slots"]), *(k.get(part, np.nan) for k in found for part in PARTS)]


def _sets(runs: Sequence[Run]) -> list[str]:
    """All but that of exchanged images."""
    names = dict.fromkeys(name for run in runs for name in run.facts["env_names"])
    return [name for name in names if name != SHUFFLED]


def _kinds(run: Run, name: str) -> dict[str, float]:
    return kinds_of(run.reported, name, run.facts["env_names"])


def _cell(kind: str, values: Sequence[float], best: float | None = None) -> str:
    """In per cent or points."""
    shown = [value / 100 for value in values] if is_points(kind) else list(values)
    text = format_mean(shown)
    return Strong(text) if values and best == float(np.mean(values)) else text
