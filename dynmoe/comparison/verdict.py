"""The claim as tables and in plain words. The words follow from the intervals by rule alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from dynmoe.comparison.claim import (
    RESAMPLES,
    Claim,
    Comparison,
    Difference,
    Rival,
    Verdict,
    examine,
)
from dynmoe.comparison.conditions import conditions, counted, seeds
from dynmoe.comparison.matching import columns, expected, lacks, score_cells
from dynmoe.comparison.run import Problem
from dynmoe.comparison.runs import Collection
from dynmoe.report.tables import Strong, Table, format_mean, format_points

RIVALS: dict[Rival, str] = {
    "mean": "mean of the grid",
    "best": "best of the grid",
    "worst": "worst of the grid",
    "pick": "grid's best by validation",
    "dense": "dense",
}
ERROR = (
    "+/- is the standard error over repetitions (population form, ddof 0); the 0.0 of a single one "
    "says nothing."
)
GRID = (
    "The grid is all settings with fixed experts and k. Its best and worst are chosen by the test "
    "accuracy itself, which flatters the best; its best by validation is what one could have "
    "picked."
)


def headline(claim: Claim) -> str:
    """One sentence: what the intervals of the mean over environments allow to say."""
    whole = claim.overall
    where = f"{claim.setting} on {claim.problem.dataset}, {_place(claim, whole)}"
    if not whole.repetitions:
        return f"{where}: no repetition has a result of every setting, nothing can be compared."
    if not whole.against("mean"):
        return f"{where}: there is no grid of fixed settings to compare with."
    (mean,), (best,) = whole.against("mean"), whole.against("best")
    if len(whole.repetitions) == 1:
        return (
            f"{where}: {format_points(mean.mean)} points from the mean of the grid and "
            f"{format_points(best.mean)} from its best, in one repetition, which proves nothing."
        )
    if _grid_size(claim, whole) == 1:
        return f"{where}, {best.verdict} {best.setting}, the grid's only setting."
    return f"{where}, {_together(mean.verdict, best.verdict)}."


def sentences(claim: Claim) -> list[str]:
    """The headline, each difference, the rank, and what weakens them."""
    whole = claim.overall
    # In a grid of one setting all its rivals are the same.
    shown = get_args(Rival) if _grid_size(claim, whole) > 1 else ("best", "dense")
    found = [headline(claim)]
    found += [_sentence(claim, each) for each in whole.differences if each.rival in shown]
    if whole.rank is not None and len(whole.means) > 1:
        found.append(f"By mean accuracy it ranks {whole.rank} of {len(whole.means)} settings.")
    found += _caveats(whole)
    return found


def statements(collection: Collection) -> list[str]:
    """All there is to say of a collection's claims, and what is missing to say more."""
    found = []
    for problem in collection.problems:
        claims = examine(collection, problem)
        found += [sentence for claim in claims for sentence in sentences(claim)]
        found += lacking(collection, problem)
    return found


def lacking(collection: Collection, problem: Problem) -> list[str]:
    """Which side of the comparison has no finished run."""
    kinds = {run.kind for run in collection.of(problem)}
    missing = {
        "adaptive": "no run that adapts its experts, so there is no claim to check",
        "fixed": "no run with fixed experts, so there is no grid to compare with",
        "dense": "no dense run to compare with",
    }
    return [f"{problem.dataset}: {text}." for kind, text in missing.items() if kind not in kinds]


def claim_table(collection: Collection, claim: Claim) -> Table:
    """Accuracies of the adaptive setting and its rivals, by environment."""
    rivals = [rival for rival in get_args(Rival) if _names(claim, rival)]
    rows = []
    for comparison in claim.comparisons:
        cells = [format_mean(comparison.accuracies)]
        for rival in rivals:
            for name in _names(claim, rival):
                cells.append(_cell(_find(comparison, rival, name)))
        rank = "X" if comparison.rank is None else f"{comparison.rank} of {len(comparison.means)}"
        row = (comparison.environment, str(len(comparison.repetitions)), *cells, rank)
        rows.append(row)
    return Table(
        f"{claim.setting} against the grid on {claim.problem.dataset}: accuracy, %",
        ("environment", "repetitions", claim.setting, *_columns(claim, rivals), "rank"),
        tuple(rows),
        note=" ".join([ERROR, GRID, *_left_out(claim)]),
        conditions=conditions(collection.of(claim.problem)),
    )


def difference_table(collection: Collection, claim: Claim) -> Table:
    """Paired differences with their intervals, by environment."""
    rivals = [rival for rival in get_args(Rival) if _names(claim, rival)]
    rows = tuple(
        (
            comparison.environment,
            str(len(comparison.repetitions)),
            *(
                _interval(_find(comparison, rival, name))
                for rival in rivals
                for name in _names(claim, rival)
            ),
        )
        for comparison in claim.comparisons
    )
    note = (
        "Differences are paired: same environment, same repetition. In brackets their 95 % "
        f"bootstrap interval (percentile, {RESAMPLES} resamples of the repetitions); bold where "
        "it excludes 0."
    )
    return Table(
        f"{claim.setting} minus its rivals on {claim.problem.dataset}: percentage points",
        ("environment", "repetitions", *(f"− {name}" for name in _columns(claim, rivals))),
        rows,
        note=" ".join([note, GRID, *_left_out(claim)]),
        conditions=conditions(collection.of(claim.problem)),
    )


def accuracy_table(collection: Collection, problem: Problem) -> Table:
    """Every setting in every environment, on all repetitions it has."""
    runs = collection.of(problem)
    absent = [entry for entry in collection.absent if entry.problem == problem]
    cells, places = score_cells(runs), columns(runs)
    repetitions = expected(runs, absent)
    names = dict.fromkeys([run.setting for run in runs])
    names |= dict.fromkeys(entry.setting for entry in absent if entry.setting)
    best = {
        place: max(
            (name for name in names if cells[name, place]),
            key=lambda name: (
                sum(s.accuracy for s in cells[name, place].values()) / len(cells[name, place])
            ),
            default="",
        )
        for place in places
    }

    def cell(name: str, place: str) -> str:
        found = cells[name, place]
        text = format_mean([found[repetition].accuracy for repetition in sorted(found)])
        gaps = lacks(name, place, found, repetitions, absent)
        text = f"{text} ({gaps})" if gaps else text
        return Strong(text) if name == best[place] else text

    return Table(
        f"Accuracy of every setting on {problem.dataset}, %",
        ("setting", *places),
        tuple((name, *(cell(name, place) for place in places)) for name in names),
        note=f"{ERROR} Bold: the highest of a column.",
        conditions=conditions(runs),
    )


def _together(mean: Verdict, best: Verdict) -> str:
    if mean == best == "cannot be told from":
        return "cannot be told from the mean of the grid, nor from its best"
    if mean == best:
        return f"{mean} the mean of the grid and its best"
    if (mean, best) == ("beats", "is below"):
        return "beats the mean of the grid, not its best"
    return f"{mean} the mean of the grid and {best} its best"


def _sentence(claim: Claim, difference: Difference) -> str:
    rival = RIVALS[difference.rival]
    if difference.rival == "mean":
        rival = f"the {rival} ({counted(_grid_size(claim, claim.overall), 'setting')})"
    elif difference.setting != rival:
        rival = f"the {rival} ({difference.setting})"
    accuracy = f"{format_mean(difference.accuracies)} %"
    points = f"{_interval(difference)} points"
    repetitions = f"n = {len(difference.values)}"
    if difference.verdict == "unknown":
        return f"Against {rival}, {accuracy}: {points}, without interval, {repetitions}."
    return f"It {difference.verdict} {rival}, {accuracy}: {points}, {repetitions}."


def _caveats(comparison: Comparison) -> Iterator[str]:
    count = len(comparison.repetitions)
    if 2 <= count <= 3:
        yield (
            f"With {count} repetitions an interval is no more than the range of the differences: "
            f"without any true difference it excludes 0 in 1 of {2 ** (count - 1)} comparisons."
        )
    elif 4 <= count < 10:
        yield f"With {count} repetitions the intervals are coarse, and too narrow for 95 %."
    if comparison.left_out:
        held = seeds(comparison.repetitions) if count else "none"
        yield (
            f"Compared are the repetitions that all settings have ({held}). Incomplete: "
            f"{', '.join(comparison.left_out)}."
        )


def _left_out(claim: Claim) -> Iterator[str]:
    for comparison in claim.comparisons:
        if comparison.left_out:
            yield f"Incomplete in {comparison.environment}: {', '.join(comparison.left_out)}."


def _place(claim: Claim, comparison: Comparison) -> str:
    environments = len(claim.comparisons) - 1
    if environments:
        return f"mean of {environments} test environments"
    return f"test environment {comparison.environment}"


def _grid_size(claim: Claim, comparison: Comparison) -> int:
    return sum(name in comparison.means for name in claim.grid)


def _names(claim: Claim, rival: Rival) -> Sequence[str]:
    """The settings that get a column: every dense one, and one of each other rival."""
    if rival == "dense":
        return claim.dense
    return [""] if claim.grid else []


def _columns(claim: Claim, rivals: Sequence[Rival]) -> list[str]:
    return [name or RIVALS[rival] for rival in rivals for name in _names(claim, rival)]


def _find(comparison: Comparison, rival: Rival, name: str) -> Difference | None:
    found = (entry for entry in comparison.against(rival) if name in ("", entry.setting))
    return next(found, None)


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return "X"
    named = difference.setting if difference.rival in ("best", "worst", "pick") else ""
    mean = format_mean(difference.accuracies)
    return f"{mean} ({named})" if named else mean


def _interval(difference: Difference | None) -> str:
    if difference is None:
        return "X"
    text = format_points(difference.mean)
    if difference.interval is not None:
        low, high = difference.interval
        text = f"{text} [{format_points(low)}, {format_points(high)}]"
    return Strong(text) if difference.verdict in ("beats", "is below") else text
