"""Tables of scores on sets: settings by task as in GLUE's tables, by kind of question, beside
published results, and with the images of other questions; mean k by part of a conversation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dynmoe.records import Record
from dynmoe.report.claim import resolution
from dynmoe.report.cost_tables import taken
from dynmoe.report.paired import LEVEL, PairedTest, corrected, paired
from dynmoe.report.routing_figures import layers_of, of_layer, on_tests, training, with_parts
from dynmoe.report.run import (
    Problem,
    Repetition,
    Run,
    by_setting,
    conditions,
    order,
)
from dynmoe.report.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean, format_number
from dynmoe.report.words import (
    PARTS,
    SHUFFLED,
    capital,
    k_by_part,
    kind_name,
    kinds_of,
    layer_name,
    scale_of,
    set_notes,
    unit_of,
)
from dynmoe.selection import DOMAINBED

Cell = Mapping[Repetition, float]
"""Result of a setting on a task, by repetition."""


def task_tables(collection: Collection) -> dict[str, Table]:
    """A table, by its name, for each protocol whose tasks report a score."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in collection.problems:
        if _has_scores(collection.of(problem)):
            groups.setdefault((problem.protocol, problem.selection), []).append(problem)
    return {
        "_".join(["tasks", *key]) if len(groups) > 1 else "tasks": _table(collection, problems)
        for key, problems in groups.items()
    }


def sets_table(collection: Collection, problem: Problem) -> Table | None:
    """Every setting on every evaluation set of a task, at the same step; None with one set."""
    runs = collection.of(problem)
    names = _sets(runs)
    if not _has_scores(runs) or len(names) == 1:
        return None
    names += [SHUFFLED] if any(SHUFFLED in run.scores for run in runs) else []
    words, measure = runs[0].words, runs[0].facts["reported"]["measure"]
    step = "At the last step; no set had a part in it."
    if problem.validates:
        step = "At the step that selection chose; no set but the one that selects had a part in it."
    return Table(
        f"{capital(words.measure)} on every evaluation set of {problem.dataset}, "
        f"{words.scale.name}",
        ("setting", *names),
        tuple(
            (setting, *(format_mean(_values(own, name, measure), words.scale) for name in names))
            for setting, own in by_setting(runs).items()
        ),
        note=" ".join([step, *set_notes(names)]),
        conditions=conditions(runs),
    )


def _has_scores(runs: Sequence[Run]) -> bool:
    """Whether they report the score of a task on whole sets, not the accuracy on a split."""
    return runs[0].problem.selection not in DOMAINBED


def _table(collection: Collection, problems: Sequence[Problem]) -> Table:
    runs = [run for problem in problems for run in collection.of(problem)]
    tasks = [problem.dataset for problem in problems]
    columns = [*tasks, "mean of tasks"] if len(tasks) > 1 else tasks
    rows = _rows(runs, tasks)
    scale = runs[0].scale
    best = [
        max((scale.better * _mean(cell) for cell in cells if cell), default=-math.inf)
        for cells in zip(*rows.values(), strict=True)
    ]
    most = max(len(cell) for cells in rows.values() for cell in cells)
    theirs = list(_published(tasks, len(columns)))
    measures = {run.problem.dataset: run.words.measure for run in runs}
    step = "selected" if any(run.problem.validates for run in runs) else "last"
    notes = [
        f"{'; '.join(f'{task}: {measures[task]}' for task in tasks)}.",
        f"Mean over repetitions of the {step} step, +/- the standard error (ddof 0).",
    ]
    if any(taken(collection, problem) for problem in problems):
        keys = ", ".join(dict.fromkeys(key for run in runs for key in run.searched))
        notes.append(f"For each cell, the {keys} of the best mean validation is taken.")
    notes.append(f"Bold: the {runs[0].words.best} of our own in a column.")

    def text(cell: Cell, highest: float) -> str:
        few = f" (n = {len(cell)})" if 0 < len(cell) < most else ""
        shown = format_mean(list(cell.values()), scale) + few
        return Strong(shown) if cell and scale.better * _mean(cell) == highest else shown

    own = [(name, *map(text, cells, best)) for name, cells in rows.items()]
    return Table(
        f"Results of every setting on {', '.join(tasks)}, "
        + ("x 100" if scale.factor == 100 else scale.name),
        ("setting", *columns),
        (*own, *theirs),
        note=" ".join([*notes, NOTE] if theirs else notes),
        conditions=conditions(runs),
    )


def _rows(runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, list[Cell]]:
    """Rows by setting, dense first: a cell for every task, and their mean if there are several.

    The mean is of the repetitions that all tasks have.
    """
    ordered = sorted(runs, key=lambda run: order(run)[len(Problem._fields) :])
    rows: dict[str, list[Cell]] = {}
    for setting, own in by_setting(ordered).items():
        cells: list[Cell] = [
            {run.repetition: run.outcome.accuracy for run in own if run.problem.dataset == task}
            for task in tasks
        ]
        if len(tasks) > 1:
            shared = set(cells[0]).intersection(*cells[1:])
            cells.append({each: float(np.mean([cell[each] for cell in cells])) for each in shared})
        rows[setting] = cells
    return rows


def _mean(cell: Cell) -> float:
    return float(np.mean(list(cell.values())))


def _published(tasks: Sequence[str], columns: int) -> Iterator[tuple[str, ...]]:
    """Rows for the tasks at hand; the mean only where all of them are there."""
    for method, row in ROWS.items():
        scores = dict(zip(TASKS, row, strict=True))
        known = [scores[task.lower()] for task in tasks if task.lower() in scores]
        if not known:
            continue
        cells = [f"{scores[task.lower()]:.1f}" if task.lower() in scores else "X" for task in tasks]
        if columns > len(tasks):
            cells.append(f"{np.mean(known):.1f}" if len(known) == len(tasks) else "X")
        yield f"{method} ({MARK})", *cells


def kind_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """Scores of every setting by kind of question, a table for each set that has kinds."""
    tables = {}
    for name in _sets(runs):
        members = [run for run in runs if name in run.scores]
        kinds = list(dict.fromkeys(kind for run in members for kind in kinds_of(run.scores[name])))
        if not kinds:
            continue
        values = {
            setting: [_values(own, name, kind) for kind in kinds]
            for setting, own in by_setting(members).items()
        }
        best = [_highest(column) for column in zip(*values.values(), strict=True)]
        tables[name] = Table(
            f"Scores by kind of question on {name}, {unit_of(kinds)}",
            ("setting", *map(kind_name, kinds)),
            tuple((setting, *map(_cell, kinds, row, best)) for setting, row in values.items()),
            note="Mean over repetitions, +/- the standard error (ddof 0). Bold: the highest of a "
            "column.",
            conditions=conditions(members),
        )
    return tables


def _highest(column: Sequence[Sequence[float]]) -> float | None:
    """The highest mean of a column; None where all are equal."""
    means = {float(np.mean(cell)) for cell in column if cell}
    return max(means) if len(means) > 1 else None


def published_table(runs: Sequence[Run]) -> Table | None:
    """Published sets in the measures of published tables, theirs below ours; None without any."""
    sets = {name: measure for name, measure in QUESTIONS.items() if name in _sets(runs)}
    if not sets:
        return None
    rows = [
        (setting, *(_cell(each, _values(members, name, each)) for name, each in sets.items()))
        for setting, members in by_setting(runs).items()
    ]
    theirs = [
        (
            f"{model} ({MARK})",
            *(f"{x:.1f}" for name, x in zip(QUESTIONS, row, strict=True) if name in sets),
        )
        for model, row in QUESTION_ROWS.items()
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
    """Mean k of image, prompt and answer tokens in every layer of every setting where k varies;
    None where parts were not recorded."""
    adaptive = with_parts(runs)
    if not adaptive:
        return None
    tested = adaptive[0].environment
    rows: list[tuple[str, ...]] = []
    for setting, members in by_setting(adaptive).items():
        for place, lines_of in ((tested, on_tests), ("training", training)):
            k = np.mean([_k_by_layer(run, lines_of(run)) for run in members], axis=0)
            names = list(map(layer_name, layers_of(members[0])))
            if len(names) > 1:
                k, names = np.vstack([k, k.mean(axis=0)]), [*names, "mean of layers"]
            rows += [
                (setting, name, place, *(format_number(each, ".2f") for each in row))
                for name, row in zip(names, k, strict=True)
            ]
    return Table(
        "Experts that a token activates, by what it is",
        ("setting", "MoE layer", "on", "experts", *PARTS),
        tuple(rows),
        note=f"Mean over repetitions of mean k, at the reported step: on {tested}, and in training "
        "since the evaluation before; experts: those living. Image: patches; prompt: other tokens "
        f"before the answer; answer: on {tested} what the model said, in training what is right.",
        conditions=conditions(adaptive),
    )


def _k_by_layer(run: Run, lines: Sequence[Record]) -> list[list[float]]:
    """Living experts of each layer, then k of each part."""
    found = [(layer.experts, k_by_part(of_layer(lines, layer.name))) for layer in run.layers]
    return [[experts, *(k.get(part, np.nan) for part in PARTS)] for experts, k in found]


def _sets(runs: Sequence[Run]) -> list[str]:
    """All that were scored but that of exchanged images."""
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return [name for name in names if name != SHUFFLED]


def _cell(kind: str, values: Sequence[float], best: float | None = None) -> str:
    """In per cent or points, with the standard error of several repetitions."""
    text = format_mean(values, scale_of(kind))
    return Strong(text) if values and best == float(np.mean(values)) else text


def image_use_table(runs: Sequence[Run]) -> Table | None:
    """Every setting with the right images and with those of other questions, and baselines without
    images: do models answer from the images? None without a set of exchanged images."""
    if not _has_exchanged(runs):
        return None
    name, words = runs[0].environment, runs[0].words
    rows: list[tuple[str, ...]] = []
    for setting, lost in _lost(runs).items():
        members = by_setting(runs)[setting]
        means = (format_mean(_values(members, each)) for each in (name, SHUFFLED))
        style = Strong if lost.is_significant else str
        cells = map(style, (lost.points, *lost.p_cells))
        rows.append((setting, *means, *cells, str(len(members))))
    baseline = runs[0].facts["baseline"] or {"scores": {}}
    answers = {
        "most frequent answer to the same question": baseline["scores"].get(name, {}).get("score"),
        "most frequent answer of all": baseline.get("majority"),
    }
    rows += [
        (f"no image: {what}", format_number(100 * share, ".1f"), *[""] * 5)
        for what, share in answers.items()
        if share is not None
    ]
    return Table(
        f"{capital(words.measure)} with the right images and with others, {words.scale.name}",
        ("setting", name, SHUFFLED, f"{name} minus {SHUFFLED}, points", "p", "by Holm", "n"),
        tuple(rows),
        note=f"{SHUFFLED}: the questions and right answers of {name}, each about the image of "
        "another question; what a model loses there, it owes to the images. Differences are "
        "paired by repetition; their 95 % interval and p are of a t test, two-sided; by "
        f"Holm: p corrected for the number of settings; bold: by Holm < {LEVEL}.",
        conditions=conditions(runs),
    )


def image_use_sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence on each setting, derived from the numbers of the table by rule."""
    if not _has_exchanged(runs):
        return []
    found = []
    for setting, lost in _lost(runs).items():
        if lost.why:
            found.append(
                f"{setting}: {lost.points} points with the right images, which is no verdict on "
                f"its use of them: {lost.why}."
            )
            continue
        said = {
            "beats": "is better with the right images than with others: it uses them",
            "is below": "is worse with the right images than with others",
        }.get(lost.verdict, "is not significantly better with the right images")
        numbers = f"{lost.points} points, {lost.p_words}, n = {len(lost.values)}"
        found.append(f"{setting} {said} ({numbers}).")
    return found


def _has_exchanged(runs: Sequence[Run]) -> bool:
    return all("score" in run.scores.get(SHUFFLED, {}) for run in runs)


def _lost(runs: Sequence[Run]) -> dict[str, PairedTest]:
    """The score with the right images minus that with others, by repetition of each setting."""
    place = runs[0].environment
    finest = resolution(runs, place)
    tests = {
        setting: PairedTest(paired(_values(own, place), _values(own, SHUFFLED)), finest)
        for setting, own in by_setting(runs).items()
    }
    return corrected(tests)


def _values(runs: Sequence[Run], name: str, measure: str = "score") -> list[float]:
    """A measure of a set, of each run that has it."""
    return [run.scores[name][measure] for run in runs if measure in run.scores.get(name, {})]


# Published results on GLUE's dev sets and on sets of questions, shown below our own.
#
# Source for GLUE: the table of the UniF-MoE paper (arXiv 2608.10392), for BERT-large (cased)
# fine-tuned in full with one MoE layer, also for the other methods, whose papers were not read.
# For the questions: MoE-LLaVA (arXiv 2401.15947), images of 336 pixels.

MARK = "published"
NOTE = (
    f"Rows marked {MARK}: BERT-large, fine-tuned in full, as the paper of UniF-MoE (arXiv "
    "2608.10392) gives them for all of these methods, the epoch and the learning rate chosen by "
    "the dev score itself; second-hand, and no yardstick for another backbone."
)

TASKS = ("cola", "mrpc", "qnli", "mnli", "rte")
ROWS = {
    "dense": (64.03, 89.36, 92.46, 86.61, 74.37),
    "top-1 of 16": (63.63, 89.81, 92.39, 86.63, 74.01),
    "top-2 of 16": (64.71, 90.18, 92.53, 86.73, 72.32),
    "top-4 of 16": (64.12, 89.74, 92.65, 86.59, 75.33),
    "top-8 of 16": (64.37, 90.35, 92.49, 86.51, 73.53),
    "mean of 8 fixed settings": (64.30, 89.94, 92.49, 86.61, 74.07),
    "DynMoE": (65.17, 90.64, 92.59, 86.37, 73.41),
    "MASS": (65.62, 90.58, 92.62, 86.74, 75.33),
    "UniF-MoE": (66.83, 91.57, 93.10, 86.84, 75.47),
}


# Sets of questions whose published scores can be computed from files, and the measure of ours that
# is the same: on ScienceQA the questions with images, on MME the points of perception.
QUESTIONS = {
    "gqa": "score",
    "scienceqa": "img",
    "textvqa": "score",
    "pope": "score",
    "mme": "perception_points",
}
QUESTION_ROWS = {
    "LLaVA-1.5 7B, dense": (62.0, 66.8, 58.2, 85.9, 1510.7),
    "LLaVA-1.5 13B, dense": (63.3, 71.6, 61.3, 85.9, 1531.3),
    "MoE-LLaVA StableLM-1.6B, top-2 of 4": (60.3, 62.6, 50.1, 85.7, 1318.2),
    "MoE-LLaVA Qwen-1.8B, top-2 of 4": (61.5, 63.1, 48.0, 87.0, 1291.6),
    "MoE-LLaVA Phi-2-2.7B, top-2 of 4": (61.4, 68.5, 51.4, 86.3, 1423.0),
}
QUESTION_NOTE = (
    f"Rows marked {MARK}: as the paper of MoE-LLaVA (arXiv 2401.15947) gives them, images of 336 "
    "pixels, LLaVA's data; no yardstick for other backbones or data."
)
