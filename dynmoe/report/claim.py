"""The paper's claim in numbers: an adaptive setting against the grid of fixed ones, and dense.

DynMoE (arXiv 2405.14297) is to replace a search over (experts, top-k). So it is held against the
mean of the grid, its best and its worst setting, and the one that a practitioner would take, the
best by validation accuracy. The best and the worst are chosen by the test accuracy itself, which
nobody can do without testing: it flatters the best. Words follow from paired tests (`paired`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import bootstrap, t

from dynmoe.report.run import Problem, Repetition, Run, environments, settings
from dynmoe.report.runs import Absent, Collection
from dynmoe.report.tables import format_points
from dynmoe.report.words import Words

Rival = Literal["mean", "best", "worst", "pick", "dense", "grid"]


@dataclass(frozen=True)
class Difference:
    """An adaptive setting minus a rival, in accuracy, paired by repetition."""

    rival: Rival
    """mean, best, worst of the grid; pick: in each repetition its best by validation, if there is
    any; dense; grid: each of its settings"""
    setting: str
    """The rival's setting; empty for the mean of the grid; several for different picks."""
    accuracies: tuple[float, ...]
    """The rival's, by repetition."""
    values: tuple[float, ...]
    """The differences, by repetition."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        return interval(self.values)

    @property
    def p(self) -> float | None:
        return p_value(self.values)

    @property
    def verdict(self) -> Verdict:
        return verdict(self.values)


class AtTheEnd(NamedTuple):
    """The same models at the end of training instead of at the selected step, accuracies."""

    own: float
    grid: float
    """Mean of the grid; NaN without one."""
    rank: int


@dataclass(frozen=True)
class Comparison:
    """An adaptive setting and its rivals in one test environment, or in their mean."""

    environment: str
    """Its name, or `matching.MEAN`."""
    repetitions: tuple[Repetition, ...]
    """Those that all compared settings have."""
    accuracies: tuple[float, ...]
    """The adaptive setting's, by repetition."""
    differences: tuple[Difference, ...]
    means: Mapping[str, float]
    """Mean accuracy of every compared setting, in order."""
    left_out: tuple[str, ...]
    """What lacks repetitions, and why: `top-2 of 8 (2 of 3: seed 1 failed)`."""
    at_the_end: AtTheEnd | None
    """None without results."""

    @property
    def rank(self) -> int | None:
        """Among `means`; 1 is best, equal settings share the better rank. None without results."""
        own = float(np.mean(self.accuracies)) if self.accuracies else math.nan
        return None if math.isnan(own) else _rank(own, self.means.values())

    def against(self, rival: Rival) -> list[Difference]:
        """Empty where there is no such rival; several only where dense has several settings."""
        return [difference for difference in self.differences if difference.rival == rival]


@dataclass(frozen=True)
class Claim:
    """One adaptive setting of one problem."""

    problem: Problem
    setting: str
    grid: tuple[str, ...]
    dense: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    """By environment; with several, their mean comes last."""
    draws: Mapping[str, int]
    """Of each setting, how many draws of hyper-parameters its best was chosen from."""
    samples: tuple[int, ...]
    """Sizes of the test splits; empty where they were not recorded."""
    words: Words

    @property
    def overall(self) -> Comparison:
        return self.comparisons[-1]


def examine(collection: Collection, problem: Problem) -> list[Claim]:
    """The claim of every adaptive setting; none without one."""
    runs = collection.of(problem)
    absent = [entry for entry in collection.absent if entry.problem == problem]
    cells = score_cells(runs)
    kinds = {run.setting: run.kind for run in runs}
    without_result = dict.fromkeys(e.setting for e in absent if e.setting not in ("", *kinds))
    grid = tuple(name for name, kind in kinds.items() if kind == "fixed")
    dense = tuple(name for name, kind in kinds.items() if kind == "dense")
    repetitions = expected(runs, absent)

    def compared(setting: str, environment: str) -> Comparison:
        pool = {
            name: cells[name, environment] for name in (setting, *grid, *dense, *without_result)
        }
        lacking = {
            name: lacks(name, environment, cell, repetitions, absent) for name, cell in pool.items()
        }
        return _compare(
            setting,
            environment,
            {name: cell for name, cell in pool.items() if cell},
            kinds,
            tuple(f"{name} ({what})" for name, what in lacking.items() if what),
            problem.validates,
        )

    return [
        Claim(
            problem,
            setting,
            grid,
            dense,
            tuple(compared(setting, environment) for environment in columns(runs)),
            _draws(collection, problem),
            _samples(runs),
            runs[0].words,
        )
        for setting, kind in kinds.items()
        if kind == "adaptive"
    ]


def _draws(collection: Collection, problem: Problem) -> dict[str, int]:
    counts = Counter(
        (run.setting, run.environment, run.repetition)
        for run in (*collection.of(problem), *collection.others)
        if run.problem == problem and len(run.facts["test_envs"]) == 1
    )
    draws: dict[str, int] = {}
    for (setting, *_), count in counts.items():
        draws[setting] = max(count, draws.get(setting, 0))
    return draws


def _samples(runs: Sequence[Run]) -> tuple[int, ...]:
    found = {
        (name, int(run.facts["sizes"][name]))
        for run in runs
        if "sizes" in run.facts
        for name in run.facts["reported"]["sets"]
    }
    return tuple(size for _, size in sorted(found))


def _rank(own: float, others: Iterable[float]) -> int:
    return 1 + sum(other > own for other in others)


def _compare(
    setting: str,
    environment: str,
    cells: Mapping[str, Cell],
    kinds: Mapping[str, str],
    left_out: tuple[str, ...],
    validates: bool,
) -> Comparison:
    """On the repetitions that most settings have, with the settings that have all of them."""
    others = [cell for name, cell in cells.items() if name != setting]
    repetitions = matched(cells.get(setting, {}), others)
    cells = {name: cell for name, cell in cells.items() if set(repetitions) <= cell.keys()}
    if not repetitions:
        return Comparison(environment, (), (), (), {}, left_out, None)
    scores = {name: [cell[each] for each in repetitions] for name, cell in cells.items()}
    accuracies = {name: tuple(score.accuracy for score in found) for name, found in scores.items()}
    own = accuracies[setting]
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}

    def difference(rival: Rival, name: str, others: Sequence[float]) -> Difference:
        # Rounded: equal accuracies differ by 1e-17 in their means, and that is no finding.
        values = tuple(round(a - b, 12) for a, b in zip(own, others, strict=True))
        return Difference(rival, name, tuple(others), values)

    differences = []
    grid = [name for name in cells if kinds[name] == "fixed"]
    if grid:
        by_repetition = np.mean([accuracies[name] for name in grid], axis=0).tolist()
        best, worst = (choose(grid, key=lambda name: means[name]) for choose in (max, min))
        differences = [
            difference("mean", "", by_repetition),
            difference("best", best, accuracies[best]),
            difference("worst", worst, accuracies[worst]),
        ]
        if validates:
            picks = [
                max(grid, key=lambda name: scores[name][index].validation)
                for index in range(len(repetitions))
            ]
            picked = [accuracies[name][index] for index, name in enumerate(picks)]
            differences.append(difference("pick", ", ".join(dict.fromkeys(picks)), picked))
    dense = [name for name in cells if kinds[name] == "dense"]
    differences += [difference("dense", name, accuracies[name]) for name in dense]
    differences += [difference("grid", name, accuracies[name]) for name in grid]
    last = {name: float(np.mean([each.last for each in found])) for name, found in scores.items()}
    at_the_end = AtTheEnd(
        last[setting],
        float(np.mean([last[name] for name in grid])) if grid else math.nan,
        _rank(last[setting], last.values()),
    )
    return Comparison(
        environment, repetitions, own, tuple(differences), means, left_out, at_the_end
    )


# Accuracies by setting, environment and repetition, and which of them may be compared.
#
# Two settings are compared on repetitions that both have. A repetition fixes weights, batches and
# splits (seed, trial seed), so a paired difference is free of much of the chance in either number.

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


# What paired differences allow to say, and how they are written.
#
# Words follow from a paired t test, which knows how little a few repetitions say: of three, a
# bootstrap interval is the range of the differences, and excludes 0 in 1 of 4 cases by chance.

Verdict = Literal["beats", "cannot be told from", "is below", "unknown"]

RESAMPLES = 9999
LEVEL = 0.05


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None for fewer than two values."""
    if not _can_be_tested(values):
        return None
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided, of Student's t test that the mean is 0; None for fewer than two values."""
    if not _can_be_tested(values):
        return None
    mean, error = np.mean(values), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return 0.0 if mean else 1.0
    return float(2 * t.sf(abs(mean) / error, df=len(values) - 1))


def verdict(values: Sequence[float]) -> Verdict:
    p = p_value(values)
    if p is None:
        return "unknown"
    if p >= LEVEL:
        return "cannot be told from"
    return "beats" if np.mean(values) > 0 else "is below"


def points_text(values: Sequence[float]) -> str:
    """The mean in points with its interval: `+1.0 [−1.3, +3.1]`."""
    found = interval(values)
    ends = f" [{', '.join(map(format_points, found))}]" if found else ""
    return format_points(float(np.mean(values))) + ends


def p_text(values: Sequence[float]) -> str:
    p = p_value(values)
    if p is None:
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_words(values: Sequence[float]) -> str:
    p = p_text(values)
    return f"p {p}" if p.startswith("<") else f"p = {p}"


def _can_be_tested(values: Sequence[float]) -> bool:
    return len(values) > 1 and bool(np.isfinite(values).all())
