"""Tables of scores on sets: settings by task as in GLUE's tables, by kind of question, beside
published results, and with the images of other questions; mean k by part of a conversation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dynmoe.report.claim import LEVEL, p_text, p_words, points_text, verdict
from dynmoe.report.cost_tables import taken
from dynmoe.report.routing_figures import layers_of, of_layer, on_tests, training, with_parts
from dynmoe.report.run import (
    Problem,
    Repetition,
    Run,
    by_setting,
    conditions,
    order,
    settings,
)
from dynmoe.report.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean, format_number
from dynmoe.report.words import (
    PARTS,
    SHUFFLED,
    capital,
    is_points,
    k_by_part,
    kind_name,
    kinds_of,
    layer_name,
    measure_number,
    set_notes,
    unit_of,
)

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
    words = runs[0].words
    rows = []
    for setting in settings(runs):
        found = [run.scores for run in runs if run.setting == setting]
        cells = [[each[name]["score"] for each in found if name in each] for name in names]
        rows.append((setting, *map(format_mean, cells)))
    return Table(
        f"{capital(words.measure)} on every evaluation set of {problem.dataset}, {words.scale}",
        ("setting", *names),
        tuple(rows),
        note=" ".join([*_sets_notes(problem), *set_notes(names)]),
        conditions=conditions(runs),
    )


def _has_scores(runs: Sequence[Run]) -> bool:
    """Whether they report the score of a task on whole sets, not the accuracy on a split."""
    return not runs[0].words.split


def _sets_notes(problem: Problem) -> Iterator[str]:
    if problem.validates:
        yield "At the step that selection chose; no set but the one that selects had a part in it."
    else:
        yield "At the last step; no set had a part in it."


def _table(collection: Collection, problems: Sequence[Problem]) -> Table:
    runs = [run for problem in problems for run in collection.of(problem)]
    tasks = [problem.dataset for problem in problems]
    columns = [*tasks, "mean of tasks"] if len(tasks) > 1 else tasks
    rows = _rows(runs, tasks)
    best = [max(map(_mean, cells)) for cells in zip(*rows.values(), strict=True)]
    most = max(len(cell) for cells in rows.values() for cell in cells)
    published_rows = list(_published(tasks, len(columns)))
    searched = any(taken(collection, problem) for problem in problems)
    notes = _notes(runs, tasks, searched, NOTE if published_rows else "")
    return Table(
        f"Results of every setting on {', '.join(tasks)}, x 100",
        ("setting", *columns),
        (
            *(
                (name, *(_text(*each, most) for each in zip(cells, best, strict=True)))
                for name, cells in rows.items()
            ),
            *published_rows,
        ),
        note=" ".join(notes),
        conditions=conditions(runs),
    )


def _rows(runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, list[Cell]]:
    """Rows by setting, dense first: a cell for every task, and their mean if there are several.

    The mean is of the repetitions that all tasks have.
    """
    ordered = sorted(runs, key=lambda run: order(run)[len(Problem._fields) :])
    rows: dict[str, list[Cell]] = {}
    for setting in dict.fromkeys(run.setting for run in ordered):
        own = [run for run in ordered if run.setting == setting]
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
    return float(np.mean(list(cell.values()))) if cell else -math.inf


def _text(cell: Cell, best: float, most: int) -> str:
    """With the number of repetitions where others have more."""
    few = f" (n = {len(cell)})" if 0 < len(cell) < most else ""
    text = format_mean(list(cell.values())) + few
    return Strong(text) if cell and _mean(cell) == best else text


def _published(tasks: Sequence[str], columns: int) -> Iterator[tuple[str, ...]]:
    """Rows for the tasks at hand; the mean only where all of them are there."""
    for method in ROWS:
        values = [published(method, task) for task in tasks]
        known = [value for value in values if value is not None]
        if not known:
            continue
        cells = ["X" if value is None else f"{value:.1f}" for value in values]
        if columns > len(tasks):
            cells.append(f"{np.mean(known):.1f}" if len(known) == len(tasks) else "X")
        yield f"{method} ({MARK})", *cells


def _notes(
    runs: Sequence[Run], tasks: Sequence[str], searched: bool, published_note: str
) -> Iterator[str]:
    measures = {run.problem.dataset: run.words.measure for run in runs}
    yield f"{'; '.join(f'{task}: {measures[task]}' for task in tasks)}."
    step = "selected" if any(run.problem.validates for run in runs) else "last"
    yield f"Mean over repetitions of the {step} step, +/- the standard error (ddof 0)."
    if searched:
        keys = dict.fromkeys(key for run in runs for key in run.searched)
        yield f"For each cell, the {', '.join(keys)} of the best mean validation is taken."
    yield "Bold: the highest of our own in a column."
    if published_note:
        yield published_note


def kind_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """Scores of every setting by kind of question, a table for each set that has kinds."""
    tables = {}
    for name in _sets(runs):
        members = [run for run in runs if name in run.scores]
        kinds = list(dict.fromkeys(kind for run in members for kind in kinds_of(run.scores[name])))
        if kinds:
            tables[name] = _kind_table(name, kinds, members)
    return tables


def _kind_table(name: str, kinds: Sequence[str], runs: Sequence[Run]) -> Table:
    values = {
        setting: [
            [run.scores[name][kind] for run in own if kind in run.scores[name]] for kind in kinds
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
                        run.scores[name][QUESTIONS[name]]
                        for run in members
                        if QUESTIONS[name] in run.scores.get(name, {})
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
    """Mean k of image, prompt and answer tokens in every layer of every setting where k varies;
    None where parts were not recorded."""
    adaptive = with_parts(runs)
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


def _k_of(run: Run, layer: str) -> list[float]:
    """Living experts, then k of each part on what is reported and in training."""
    tested, trained = (of_layer(lines, layer) for lines in (on_tests(run), training(run)))
    found = [k_by_part(lines) for lines in (tested, trained)]
    return [len(tested[0]["slots"]), *(k.get(part, np.nan) for k in found for part in PARTS)]


def _sets(runs: Sequence[Run]) -> list[str]:
    """All that were scored but that of exchanged images."""
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return [name for name in names if name != SHUFFLED]


def _cell(kind: str, values: Sequence[float], best: float | None = None) -> str:
    """In per cent or points, with the standard error of several repetitions."""
    if len(values) == 1:
        return measure_number(kind, values[0])
    shown = [value / 100 for value in values] if is_points(kind) else list(values)
    text = format_mean(shown)
    return Strong(text) if values and best == float(np.mean(values)) else text


def image_use_table(runs: Sequence[Run]) -> Table | None:
    """Every setting with the right images and with those of other questions, and baselines without
    images: do models answer from the images? None without a set of exchanged images."""
    if not _has_exchanged(runs):
        return None
    name, words = runs[0].environment, runs[0].words
    rows: list[tuple[str, ...]] = []
    for setting, members in by_setting(runs).items():
        own, exchanged = (_scores(members, each) for each in (name, SHUFFLED))
        lost = _differences(own, exchanged)
        cells = (points_text(lost), p_text(lost))
        if verdict(lost) in ("beats", "is below"):
            cells = (Strong(cells[0]), Strong(cells[1]))
        rows.append((setting, format_mean(own), format_mean(exchanged), *cells, str(len(members))))
    baseline = runs[0].facts["baseline"] or {}
    own_scores = baseline.get("scores", {})
    answers = {
        "most frequent answer to the same question": own_scores.get(name, {}).get("score"),
        "most frequent answer of all": baseline.get("majority"),
    }
    rows += [
        (f"no image: {what}", format_number(100 * share, ".1f"), "", "", "", "")
        for what, share in answers.items()
        if share is not None
    ]
    return Table(
        f"{capital(words.measure)} with the right images and with others, {words.scale}",
        ("setting", name, SHUFFLED, f"{name} minus {SHUFFLED}, points", "p", "n"),
        tuple(rows),
        note=f"{SHUFFLED}: the questions and right answers of {name}, each about the image of "
        "another question; what a model loses there, it owes to the images. Differences are "
        f"paired by repetition; p is of a t test, two-sided; bold: p < {LEVEL}.",
        conditions=conditions(runs),
    )


def image_use_sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence on each setting, derived from the numbers of the table by rule."""
    if not _has_exchanged(runs):
        return []
    found = []
    for setting, members in by_setting(runs).items():
        lost = _differences(_scores(members, runs[0].environment), _scores(members, SHUFFLED))
        points = f"{points_text(lost)} points, {p_words(lost)}, n = {len(lost)}"
        said = {
            "beats": "is better with the right images than with others: it uses them",
            "is below": "is worse with the right images than with others",
            "unknown": "was tried once, which proves nothing about its use of images",
        }.get(verdict(lost), "is not significantly better with the right images")
        if verdict(lost) == "unknown":
            points = f"{points_text(lost)} points"
        found.append(f"{setting} {said} ({points}).")
    return found


def _has_exchanged(runs: Sequence[Run]) -> bool:
    return all(SHUFFLED in run.scores for run in runs)


def _scores(runs: Sequence[Run], name: str) -> list[float]:
    return [run.scores[name]["score"] for run in runs]


def _differences(own: Sequence[float], others: Sequence[float]) -> list[float]:
    # Rounded: equal scores may differ by 1e-17 in their means, and that is no finding.
    return [round(a - b, 12) for a, b in zip(own, others, strict=True)]


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


def published(method: str, dataset: str) -> float | None:
    """Times 100, in the task's own measure; None for a data set that the table lacks."""
    return dict(zip(TASKS, ROWS[method], strict=True)).get(dataset.lower())


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


def published_answers(model: str) -> dict[str, float]:
    """Scores by set; in per cent, on MME in points."""
    return dict(zip(QUESTIONS, QUESTION_ROWS[model], strict=True))
