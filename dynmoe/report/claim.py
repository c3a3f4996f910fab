"""The paper's claim in numbers: an adaptive setting against the grid of fixed ones, and dense.

DynMoE (arXiv 2405.14297) is to replace a search over (experts, top-k). So it is compared with the
mean of the grid, its best and its worst setting, and the one that a practitioner would take, the
best by validation accuracy. The best and the worst are chosen by the test accuracy itself, which
nobody can do without testing: this is optimistic for the best.

Two settings are compared on repetitions that both have. A repetition fixes weights, batches and
splits (seed, trial seed), so a paired difference is free of much of the chance in either number.
Verdicts follow from a paired t test, which knows how little a few repetitions say: of three, a
bootstrap interval is the range of the differences, and excludes 0 in 1 of 4 cases by chance.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import bootstrap, ttest_1samp

from dynmoe.report.run import Problem, Repetition, Run, environments, settings
from dynmoe.report.runs import Absent, Collection
from dynmoe.report.tables import format_points
from dynmoe.report.words import Words

Rival = Literal["mean", "best", "worst", "pick", "dense", "grid"]
Verdict = Literal["beats", "is not significantly different from", "is below", "unknown"]

MEAN = "mean of environments"
RESAMPLES = 9999
LEVEL = 0.05


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
class SettingComparison:
    """An adaptive setting and its rivals in one test environment, or in their mean."""

    environment: str
    """Its name, or `MEAN`."""
    left_out: tuple[str, ...]
    """Settings that lack repetitions, and why: `top-2 of 8 (2 of 3: seed 1 failed)`."""
    repetitions: tuple[Repetition, ...] = ()
    """Repetitions that all compared settings have."""
    accuracies: tuple[float, ...] = ()
    """The adaptive setting's, by repetition."""
    differences: tuple[Difference, ...] = ()
    means: Mapping[str, float] = field(default_factory=dict)
    """Mean accuracy of every compared setting, in order."""
    at_the_end: AtTheEnd | None = None
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
    comparisons: tuple[SettingComparison, ...]
    """One for each environment; with several, their mean comes last."""
    draws: Mapping[str, int]
    """Number of draws of hyper-parameters that the best of each setting was chosen from."""
    samples: tuple[int, ...]
    """Sizes of the test splits; empty where they were not recorded."""
    words: Words

    @property
    def overall(self) -> SettingComparison:
        return self.comparisons[-1]


def examine(collection: Collection, problem: Problem) -> list[Claim]:
    """Return the claim of every adaptive setting; none without one."""
    runs = collection.of(problem)
    absent = [entry for entry in collection.absent if entry.problem == problem]
    cells, repetitions = score_cells(runs), expected(runs, absent)
    kinds = {run.setting: run.kind for run in runs}
    rivals = [name for kind in ("fixed", "dense") for name in kinds if kinds[name] == kind]
    rivals += dict.fromkeys(e.setting for e in absent if e.setting not in ("", *kinds))

    def compared(setting: str, place: str) -> SettingComparison:
        pool = {name: cells[name, place] for name in (setting, *rivals)}
        gaps = {n: lacks(n, place, cell, repetitions, absent) for n, cell in pool.items()}
        left_out = tuple(f"{name} ({gap})" for name, gap in gaps.items() if gap)
        done = {name: cell for name, cell in pool.items() if cell}
        return _compare(setting, place, done, kinds, left_out, problem.validates)

    return [
        Claim(
            problem,
            setting,
            tuple(compared(setting, place) for place in columns(runs)),
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
        for name in run.facts["reported"]["sets"]
        if name in run.facts["sizes"]
    }
    return tuple(size for _, size in sorted(found))


def _rank(own: float, others: Iterable[float]) -> int:
    return 1 + sum(other > own for other in others)


def _compare(
    setting: str,
    place: str,
    cells: Mapping[str, ScoreByRepetition],
    kinds: Mapping[str, str],
    left_out: tuple[str, ...],
    validates: bool,
) -> SettingComparison:
    """Compare on the repetitions that most settings have, with the settings that have them all."""
    repetitions = matched(cells.get(setting, {}), [c for n, c in cells.items() if n != setting])
    if not repetitions:
        return SettingComparison(place, left_out)
    scores = {
        name: [cell[each] for each in repetitions]
        for name, cell in cells.items()
        if set(repetitions) <= cell.keys()
    }
    accuracies = {name: tuple(each.accuracy for each in found) for name, found in scores.items()}
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    last = {name: float(np.mean([each.last for each in found])) for name, found in scores.items()}
    grid, dense = ([n for n in scores if kinds[n] == kind] for kind in ("fixed", "dense"))
    rivals: list[tuple[Rival, str, Sequence[float]]] = []
    if grid:
        best, worst = max(grid, key=means.__getitem__), min(grid, key=means.__getitem__)
        rivals = [
            ("mean", "", np.mean([accuracies[name] for name in grid], axis=0).tolist()),
            ("best", best, accuracies[best]),
            ("worst", worst, accuracies[worst]),
        ]
    if grid and validates:
        picks = [
            max(grid, key=lambda name: scores[name][index].validation)
            for index in range(len(repetitions))
        ]
        picked = [accuracies[name][index] for index, name in enumerate(picks)]
        rivals.append(("pick", ", ".join(dict.fromkeys(picks)), picked))
    rivals += [("dense", name, accuracies[name]) for name in dense]
    rivals += [("grid", name, accuracies[name]) for name in grid]
    own = accuracies[setting]
    return SettingComparison(
        place,
        left_out,
        repetitions,
        own,
        tuple(
            Difference(rival, name, tuple(others), paired(own, others))
            for rival, name, others in rivals
        ),
        means,
        AtTheEnd(
            last[setting],
            float(np.mean([last[name] for name in grid])) if grid else math.nan,
            _rank(last[setting], last.values()),
        ),
    )


# Accuracies by setting, environment and repetition, and which of them may be compared.


class Score(NamedTuple):
    accuracy: float
    validation: float
    last: float
    """Accuracy at the end of training."""


ScoreByRepetition = Mapping[Repetition, Score]


def score_cells(runs: Sequence[Run]) -> dict[tuple[str, str], ScoreByRepetition]:
    """Return the scores of one problem's runs, `[setting, environment][repetition]`.

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


def matched(own: ScoreByRepetition, others: Iterable[ScoreByRepetition]) -> tuple[Repetition, ...]:
    """Return the repetitions to compare on: those of `own` that most of the others have.

    Not all of them: one setting with a single run would take the rest from all the others.
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
    cell: ScoreByRepetition,
    repetitions: Sequence[Repetition],
    absent: Iterable[Absent],
) -> str:
    """Return the repetitions that a cell lacks: `2 of 3: seed 1 failed`; empty if it has all."""
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


# Statistics of paired differences, and their text.


def paired(own: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    """Return the differences, rounded: equal accuracies may differ by 1e-17 in their means."""
    return tuple(round(a - b, 12) for a, b in zip(own, others, strict=True))


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None for fewer than two values."""
    if p_value(values) is None:
        return None
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def p_value(values: Sequence[float]) -> float | None:
    """Two-sided, of Student's t test that the mean is 0; None for fewer than two values."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    if len(set(values)) == 1:  # NOTE: without spread t is 0 / 0 or infinite
        return float(values[0] == 0)
    return float(ttest_1samp(values, 0).pvalue)


def verdict(values: Sequence[float]) -> Verdict:
    p = p_value(values)
    if p is None:
        return "unknown"
    if p >= LEVEL:
        return "is not significantly different from"
    return "beats" if np.mean(values) > 0 else "is below"


def is_significant(values: Sequence[float]) -> bool:
    return verdict(values) in ("beats", "is below")


def points_text(values: Sequence[float]) -> str:
    """The mean in points with its interval: `+1.0 [−1.3, +3.1]`."""
    found = interval(values)
    ends = f" [{', '.join(map(format_points, found))}]" if found else ""
    return format_points(float(np.mean(values))) + ends


def p_text(values: Sequence[float]) -> str:
    p = p_value(values)
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_words(values: Sequence[float]) -> str:
    p = p_text(values)
    return f"p {p}" if p.startswith("<") else f"p = {p}"
