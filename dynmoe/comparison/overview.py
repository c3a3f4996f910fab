"""What stands above the sections of a report: its title, its extent, the claims on all data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynmoe.comparison.claim import Claim
from dynmoe.comparison.conditions import counted
from dynmoe.comparison.run import Problem, environments, settings
from dynmoe.comparison.runs import Collection
from dynmoe.report.tables import Table, format_mean


def title_of(collection: Collection) -> str:
    adaptive = dict.fromkeys(run.setting for run in collection.runs if run.kind == "adaptive")
    datasets = ", ".join(dict.fromkeys(problem.dataset for problem in collection.problems))
    if adaptive and any(run.kind == "fixed" for run in collection.runs):
        return f"{', '.join(adaptive)} against fixed experts and k: {datasets}"
    return f"{', '.join(settings(collection.runs))}: {datasets}"


def extent(collection: Collection) -> str:
    """What the report is about, in numbers."""
    found = []
    for problem in collection.problems:
        runs = collection.of(problem)
        repetitions = {run.repetition for run in runs}
        found.append(
            f"{counted(len(runs), 'run')} on {problem.dataset}: "
            f"{counted(len(settings(runs)), 'setting')}, "
            f"{counted(len(environments(runs)), runs[0].words.place)}, "
            f"{counted(len(repetitions), 'repetition')}"
        )
    absent = f" {counted(len(collection.absent), 'run')} without a result." * bool(
        collection.absent
    )
    return f"{'; '.join(found)}.{absent}"


def overview_table(claims: Mapping[Problem, Sequence[Claim]]) -> Table:
    """One row for each adaptive setting on each problem."""
    rows = []
    for problem, found in claims.items():
        for claim in found:
            whole = claim.overall
            rivals = [whole.against(rival) for rival in ("mean", "best")]
            accuracies = [
                whole.accuracies,
                *(each[0].accuracies if each else () for each in rivals),
            ]
            verdicts = [each[0].verdict if each else "unknown" for each in rivals]
            cells = map(format_mean, accuracies)
            rows.append((problem.dataset, claim.setting, *cells, *verdicts))
    columns = ("accuracy, %", "mean of the grid, %", "best of the grid, %")
    if any(claim.words.noun == "score" for found in claims.values() for claim in found):
        columns = ("score, x 100", "mean of the grid", "best of the grid")
    return Table(
        "The claim on every data set",
        ("data set", "setting", *columns, "against the mean", "against the best"),
        tuple(rows),
        note="Protocol, selection rule, seeds, weights, data and versions stand below the tables "
        "of each data set.",
    )
