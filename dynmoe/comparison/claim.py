"""The paper's claim in numbers: an adaptive setting against the grid of fixed ones, and dense.

DynMoE (arXiv 2405.14297) is to replace a search over (experts, top-k). So it is held against the
mean of the grid, its best and its worst setting, and the one that a practitioner would take, the
best by validation accuracy. The best and the worst are chosen by the test accuracy itself, which
nobody can do without testing: it flatters the best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import bootstrap

from dynmoe.comparison.matching import Cell, columns, expected, lacks, score_cells
from dynmoe.comparison.run import Problem, Repetition
from dynmoe.comparison.runs import Collection

Rival = Literal["mean", "best", "worst", "pick", "dense"]
Verdict = Literal["beats", "cannot be told from", "is below", "unknown"]

RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """An adaptive setting minus a rival, in accuracy, paired by repetition."""

    rival: Rival
    """mean, best, worst of the grid; pick: its best by validation; dense"""
    setting: str
    """The rival's setting; empty for the mean of the grid."""
    accuracies: tuple[float, ...]
    """The rival's, by repetition."""
    values: tuple[float, ...]
    """The differences, by repetition."""
    interval: tuple[float, float] | None
    """95 %; None for a single repetition."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def verdict(self) -> Verdict:
        """By the interval: does it lie above 0, hold it, or lie below?"""
        if self.interval is None:
            return "unknown"
        low, high = self.interval
        return "beats" if low > 0 else "is below" if high < 0 else "cannot be told from"


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
    """What is not compared, and why: `top-2 of 8 (2 of 3: seed 1 failed)`."""

    @property
    def rank(self) -> int | None:
        """Among `means`; 1 is best, equal settings share the better rank. None without results."""
        if not self.accuracies:
            return None
        own = float(np.mean(self.accuracies))
        return 1 + sum(mean > own for mean in self.means.values())

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
        )

    return [
        Claim(
            problem,
            setting,
            grid,
            dense,
            tuple(compared(setting, environment) for environment in columns(runs)),
        )
        for setting, kind in kinds.items()
        if kind == "adaptive"
    ]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _compare(
    setting: str,
    environment: str,
    cells: Mapping[str, Cell],
    kinds: Mapping[str, str],
    left_out: tuple[str, ...],
) -> Comparison:
    """On the repetitions of all cells; a setting without any result does not stop the others."""
    if setting not in cells:
        return Comparison(environment, (), (), (), {}, left_out)
    matched = tuple(sorted(set(cells[setting]).intersection(*cells.values())))
    if not matched:
        return Comparison(environment, (), (), (), {}, left_out)
    accuracies = {
        name: tuple(cell[repetition].accuracy for repetition in matched)
        for name, cell in cells.items()
    }
    own = accuracies[setting]
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}

    def difference(rival: Rival, name: str, others: Sequence[float]) -> Difference:
        # Rounded: equal accuracies differ by 1e-17 in their means, and that is no finding.
        values = tuple(round(a - b, 12) for a, b in zip(own, others, strict=True))
        return Difference(rival, name, tuple(others), values, interval(values))

    differences = []
    grid = [name for name in cells if kinds[name] == "fixed"]
    if grid:
        by_repetition = np.mean([accuracies[name] for name in grid], axis=0).tolist()
        validation = {
            name: np.mean([cells[name][repetition].validation for repetition in matched])
            for name in grid
        }
        named: dict[Rival, str] = {
            "best": max(grid, key=lambda name: means[name]),
            "worst": min(grid, key=lambda name: means[name]),
            "pick": max(grid, key=lambda name: validation[name]),
        }
        differences.append(difference("mean", "", by_repetition))
        differences += [difference(rival, name, accuracies[name]) for rival, name in named.items()]
    dense = [name for name in cells if kinds[name] == "dense"]
    differences += [difference("dense", name, accuracies[name]) for name in dense]
    return Comparison(environment, matched, own, tuple(differences), means, left_out)
