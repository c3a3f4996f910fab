"""Settings by task, as in the tables of GLUE: what each reaches on every task, and their mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from dynmoe.comparison.conditions import conditions, every, seeds
from dynmoe.comparison.published import MARK, NOTE, ROWS, published
from dynmoe.comparison.run import Problem, Repetition, Run, order, settings
from dynmoe.comparison.runs import Collection
from dynmoe.comparison.values import taken
from dynmoe.report.question_sets import SHUFFLED, set_notes
from dynmoe.report.tables import Strong, Table, format_mean
from dynmoe.report.words import capital
from dynmoe.selection import RULES

Cell = Mapping[Repetition, float]
"""What a setting reaches on a task, by repetition."""


def task_tables(collection: Collection) -> dict[str, Table]:
    """By name, a table for each protocol whose tasks are scored on whole sets."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in collection.problems:
        if problem.on_sets:
            groups.setdefault((problem.protocol, problem.selection), []).append(problem)
    return {
        "_".join(["tasks", *key]) if len(groups) > 1 else "tasks": _table(collection, problems)
        for key, problems in groups.items()
    }


def sets_table(collection: Collection, problem: Problem) -> Table | None:
    """Every setting on every evaluation set of a task, at the same step; None with one set."""
    runs = collection.of(problem)
    names = list(dict.fromkeys(name for run in runs for name in run.facts["env_names"]))
    if not problem.on_sets or len(set(names) - {SHUFFLED}) == 1:  # it has a table of its own
        return None
    words = runs[0].words
    rows = []
    for setting in settings(runs):
        records = [run.reported for run in runs if run.setting == setting]
        keys = [f"{name}_score" for name in names]
        cells = [[record[key] for record in records if key in record] for key in keys]
        rows.append((setting, *map(format_mean, cells)))
    return Table(
        f"{capital(words.measure)} on every evaluation set of {problem.dataset}, {words.scale}",
        ("setting", *names),
        tuple(rows),
        note=" ".join([*_sets_notes(problem), *set_notes(names)]),
        conditions=conditions(runs),
    )


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
        f"What every setting reaches on {', '.join(tasks)}, x 100",
        ("setting", *columns),
        (
            *(
                (name, *(_text(*each, most) for each in zip(cells, best, strict=True)))
                for name, cells in rows.items()
            ),
            *published_rows,
        ),
        note=" ".join(notes),
        conditions=_conditions(runs),
    )


def _rows(runs: Sequence[Run], tasks: Sequence[str]) -> dict[str, list[Cell]]:
    """By setting, dense first: a cell for every task, and one for their mean if there are several.

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


def _conditions(runs: Sequence[Run]) -> str:
    facts = [run.facts for run in runs]
    return (
        f"Protocol {every(fact['protocol'] for fact in facts)}; "
        f"selection by {every(RULES[fact['selection']] for fact in facts)}; "
        f"{seeds({run.repetition for run in runs})}; "
        f"backbone {every(fact['backbone'] for fact in facts)}; "
        f"weights {every(fact['weights'] for fact in facts)}."
    )
