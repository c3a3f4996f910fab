"""The values that a protocol searches over, as GLUE's learning rates: what each of them gave.

`read_runs` takes one value for all repetitions of a setting, by mean validation.
"""

from __future__ import annotations

from collections import defaultdict

from dynmoe.comparison.conditions import conditions
from dynmoe.comparison.run import Problem, Run
from dynmoe.comparison.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean


def taken(collection: Collection, problem: Problem) -> dict[str, str]:
    """By setting, `3e-05 (of 3)`: the value that its runs have, of how many that were tried.

    Empty where nothing was searched.
    """
    return {
        setting: f"{_value(chosen[0])} (of {len(by_value)})"
        for setting, by_value in _tried(collection, problem).items()
        if (chosen := [run for run in collection.of(problem) if run.setting == setting])
    }


def values_table(collection: Collection, problem: Problem) -> Table | None:
    """Every value of every setting with its mean validation and result; None without a search."""
    tried = _tried(collection, problem)
    if not tried:
        return None
    standing = {run.folder.path: run for run in collection.of(problem)}
    first = next(iter(standing.values()))
    rows: list[tuple[str, ...]] = []
    for setting, by_value in tried.items():
        for value, runs in by_value.items():
            outcomes = [run.outcome for run in runs]
            validation = format_mean([outcome.validation for outcome in outcomes])
            result = format_mean([outcome.accuracy for outcome in outcomes])
            if runs[0].folder.path in standing:
                validation = Strong(validation)
            rows.append((setting, value, validation, result, str(len(runs))))
    return Table(
        f"The search on {problem.dataset}",
        (
            "setting",
            ", ".join(first.searched),
            f"validation, {first.words.scale}",
            first.words.column,
            "n",
        ),
        tuple(rows),
        note="Bold: the value of the best mean validation, among those with the most repetitions; "
        "its runs are all that is reported above.",
        conditions=conditions(collection.of(problem)),
    )


def _tried(collection: Collection, problem: Problem) -> dict[str, dict[str, list[Run]]]:
    """Runs by setting and value, in order; none if no setting has several values."""
    found: defaultdict[str, dict[str, list[Run]]] = defaultdict(dict)
    runs = [run for run in (*collection.runs, *collection.others) if run.problem == problem]
    for run in sorted(runs, key=lambda run: str(run.searched)):
        if run.searched:
            found[run.setting].setdefault(_value(run), []).append(run)
    if all(len(by_value) == 1 for by_value in found.values()):
        return {}
    order = dict.fromkeys(run.setting for run in runs)
    return {setting: found[setting] for setting in order if setting in found}


def _value(run: Run) -> str:
    return ", ".join(map(str, run.searched.values()))
