"""Accuracies by setting, environment and repetition, and which of them may be compared.

Two settings are compared on repetitions that both have. A repetition fixes weights, batches and
splits (seed, trial seed), so a paired difference is free of much of the chance in either number.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from dynmoe.comparison.run import Repetition, Run, environments, settings
from dynmoe.comparison.runs import Absent

MEAN = "mean of environments"


class Score(NamedTuple):
    accuracy: float
    validation: float
    last: float
    """Accuracy at the end of training."""


Cell = Mapping[Repetition, Score]


def score_cells(runs: Sequence[Run]) -> dict[tuple[str, str], Cell]:
    """The scores of one problem's runs, `[setting, environment][repetition]`.

    With several environments there is also their mean, of repetitions that have all of them.
    """
    cells: defaultdict[tuple[str, str], dict[Repetition, Score]] = defaultdict(dict)
    for run in runs:
        score = Score(run.outcome.accuracy, run.outcome.validation, run.outcome.last)
        cells[run.setting, run.environment][run.repetition] = score
    names = environments(runs)
    if len(names) > 1:
        for setting in settings(runs):
            parts = [cells[setting, name] for name in names]
            for repetition in sorted(set(parts[0]).intersection(*parts[1:])):
                scores = [part[repetition] for part in parts]
                means = (sum(values) / len(scores) for values in zip(*scores, strict=True))
                cells[setting, MEAN][repetition] = Score(*means)
    return defaultdict(dict, cells)


def matched(own: Cell, others: Iterable[Cell]) -> tuple[Repetition, ...]:
    """Repetitions to compare on: those of `own` that most of the others have.

    Not those that all have: one setting with a single run would take the rest from all the others.
    """
    pool = list(others)
    return tuple(
        repetition
        for repetition in sorted(own)
        if 2 * sum(repetition in cell for cell in pool) >= len(pool)
    )


def columns(runs: Sequence[Run]) -> list[str]:
    """The environments, and their mean if there are several."""
    names = environments(runs)
    return [*names, MEAN] if len(names) > 1 else names


def expected(runs: Iterable[Run], absent: Iterable[Absent]) -> list[Repetition]:
    """All repetitions that any setting has or was asked for."""
    asked = {entry.repetition for entry in absent if entry.repetition is not None}
    return sorted({run.repetition for run in runs} | asked)


def lacks(
    setting: str,
    environment: str,
    cell: Cell,
    repetitions: Sequence[Repetition],
    absent: Iterable[Absent],
) -> str:
    """What a cell lacks: `2 of 3: seed 1 failed`; empty if it has all repetitions."""
    gaps = [repetition for repetition in repetitions if repetition not in cell]
    if not gaps:
        return ""
    states = {
        entry.repetition: entry.state
        for entry in absent
        if entry.setting == setting and environment in (entry.environment, MEAN)
    }
    has_trials = len({trial for _, trial in repetitions}) > 1
    words = (
        f"seed {seed}{f' trial {trial}' if has_trials else ''} "
        f"{states.get((seed, trial), 'missing')}"
        for seed, trial in gaps
    )
    return f"{len(cell)} of {len(repetitions)}: {', '.join(words)}"
