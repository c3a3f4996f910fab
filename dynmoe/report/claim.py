"""The paper's claim in numbers: an adaptive setting against the grid of fixed ones, and dense.

DynMoE (arXiv 2405.14297) is to replace a search over (experts, top-k). So it is compared with the
mean of the grid, its best and its worst setting, and the one that a practitioner would take, the
best by validation accuracy. The best and the worst are chosen by the test accuracy itself, which
nobody can do without testing: this is optimistic for the best.

Two settings are compared on repetitions that both have. Verdicts follow from paired t tests
(`dynmoe.report.paired`), corrected by Holm's method for the number of comparisons: those in the
mean of the environments, on which the claim rests, are one family, those in the single environments
another.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from dynmoe.report.paired import PairedTest, corrected, paired
from dynmoe.report.run import Problem, Repetition, Run, environments, settings
from dynmoe.report.runs import Absent, Collection
from dynmoe.report.tables import SHARE, Scale
from dynmoe.report.words import Words

Rival = Literal["mean", "best", "worst", "pick", "dense", "grid"]

MEAN = "mean of environments"


@dataclass(frozen=True, kw_only=True)
class Difference(PairedTest):
    """An adaptive setting minus a rival, in the reported measure, paired by repetition."""

    rival: Rival
    """mean, best, worst of the grid; pick: in each repetition its best by validation, if there is
    any; dense; grid: each of its settings"""
    setting: str
    """The rival's setting; empty for the mean of the grid; several for different picks."""
    accuracies: tuple[float, ...]
    """The rival's, by repetition."""


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
    scale: Scale = SHARE

    @property
    def rank(self) -> int | None:
        """Among `means`; 1 is best, equal settings share the better rank. None without results."""
        own = float(np.mean(self.accuracies)) if self.accuracies else math.nan
        return None if math.isnan(own) else _rank(own, self.means.values(), self.scale)

    def name(self, difference: Difference) -> str:
        """Name of its rival, the same for rivals that are the same setting: a test counts once."""
        only = self.against("grid")
        alone = only[0].setting if len(only) == 1 and difference.rival == "mean" else ""
        return difference.setting or alone or difference.rival

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
        finest, scale = resolution(runs, place), runs[0].scale
        return _compare(setting, place, done, kinds, left_out, problem.validates, finest, scale)

    return _corrected(
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
    )


def _corrected(claims: Iterable[Claim]) -> list[Claim]:
    """Correct the p values of a problem's claims for their number."""
    found = list(claims)
    families: dict[bool, dict[Tested, Difference]] = {True: {}, False: {}}  # overall, and others
    for claim in found:
        for comparison in claim.comparisons:
            for each in comparison.differences:
                families[comparison is claim.overall][_tested(claim, comparison, each)] = each
    tests = {key: test for family in families.values() for key, test in corrected(family).items()}

    def with_tests(claim: Claim, comparison: SettingComparison) -> SettingComparison:
        differences = []
        for each in comparison.differences:
            test = tests[_tested(claim, comparison, each)]  # of the same values, by another name
            differences.append(replace(each, corrected=test.corrected, family=test.family))
        return replace(comparison, differences=tuple(differences))

    return [
        replace(claim, comparisons=tuple(with_tests(claim, each) for each in claim.comparisons))
        for claim in found
    ]


Tested = tuple[str, str, str]
"""An adaptive setting, an environment, and the name of a rival."""


def _tested(claim: Claim, comparison: SettingComparison, difference: Difference) -> Tested:
    return claim.setting, comparison.environment, comparison.name(difference)


def resolution(runs: Sequence[Run], place: str) -> float:
    """Return the change of accuracy that one test sample makes in an environment, or in the mean
    of all; 0 if the number of samples was not recorded, and for a loss, which may change by any."""
    if runs[0].scale.less_is_better:
        return 0.0
    sizes: defaultdict[str, int] = defaultdict(int)
    for run in runs:
        counts = [run.facts["sizes"].get(name, 0) for name in run.facts["reported"]["sets"]]
        sizes[run.environment] = max([sizes[run.environment], *counts])
    found = list(sizes.values()) if place == MEAN else [sizes[place]]
    return 1 / (len(found) * max(found)) if all(found) else 0.0


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


def _rank(own: float, others: Iterable[float], scale: Scale) -> int:
    return 1 + sum(scale.better * (other - own) > 0 for other in others)


def _compare(
    setting: str,
    place: str,
    cells: Mapping[str, ScoreByRepetition],
    kinds: Mapping[str, str],
    left_out: tuple[str, ...],
    validates: bool,
    finest: float,
    scale: Scale,
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

        def good(name: str) -> float:
            return scale.better * means[name]

        best, worst = max(grid, key=good), min(grid, key=good)
        rivals = [
            ("mean", "", np.mean([accuracies[name] for name in grid], axis=0).tolist()),
            ("best", best, accuracies[best]),
            ("worst", worst, accuracies[worst]),
        ]
    if grid and validates:
        picks = [
            max(grid, key=lambda name: _known(scale.better * scores[name][index].validation))
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
            Difference(
                paired(own, others),
                finest,
                scale=scale,
                rival=rival,
                setting=name,
                accuracies=tuple(others),
            )
            for rival, name, others in rivals
        ),
        means,
        AtTheEnd(
            last[setting],
            float(np.mean([last[name] for name in grid])) if grid else math.nan,
            _rank(last[setting], last.values(), scale),
        ),
        scale,
    )


def _known(validation: float) -> float:
    """NaN is lowest."""
    return -math.inf if math.isnan(validation) else validation


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
