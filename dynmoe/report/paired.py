"""Paired differences between two settings: their t test, its correction, and when there is none.

A repetition fixes weights, batches and splits (seed, trial seed), so a paired difference is free of
much of the chance in either number. p and the 95 % interval are of one statistic, Student's t of
the mean difference, which knows how little a few repetitions say: the interval excludes 0 exactly
where p < 0.05. There is no test without a spread to judge by: of two repetitions, of equal
differences, of differences that one test sample explains.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from dynmoe.report.tables import SHARE, Scale, format_points

Verdict = Literal["beats", "is not significantly different from", "is below", "unknown"]
Key = TypeVar("Key", bound=Hashable)
Test = TypeVar("Test", bound="PairedTest")

LEVEL = 0.05
POWER = 0.8
FEWEST = 3
"""Repetitions of a test. Of two, t has one degree of freedom: p < 0.05 needs |t| > 12.7, which
nearly equal differences reach by chance."""


@dataclass(frozen=True)
class PairedTest:
    """Differences by repetition, and what they prove."""

    values: tuple[float, ...]
    resolution: float = 0.0
    """Difference that one test sample makes; 0 where their number was not recorded, and where it
    may be any."""
    scale: Scale = SHARE
    corrected: float | None = None
    """p by Holm's method; None before it is corrected, and without a test."""
    family: int = 1
    """Number of comparisons that it is corrected for."""

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean, by the t test and not corrected; None without a test."""
        if self._obstacle:
            return None
        half = float(stdtrit(len(self.values) - 1, 1 - LEVEL / 2)) * self._error
        return self.mean - half, self.mean + half

    @property
    def p(self) -> float | None:
        """Two-sided, of Student's t test that the mean is 0; None without a test."""
        if self._obstacle:
            return None
        return float(2 * stdtr(len(self.values) - 1, -abs(self.mean) / self._error))

    @property
    def why(self) -> str:
        """Reason that there is no verdict; empty if there is one."""
        if self._obstacle:
            return self._obstacle
        tiny = abs(self.mean) < self.resolution * (1 - 1e-9)
        return "the difference is less than one test sample" if tiny else ""

    @property
    def verdict(self) -> Verdict:
        """The verdict at 5 %, by the corrected p where there is one."""
        p = self.p if self.corrected is None else self.corrected
        if self.why or p is None:
            return "unknown"
        if p >= LEVEL:
            return "is not significantly different from"
        return "beats" if self.scale.better * self.mean > 0 else "is below"

    @property
    def said(self) -> str:
        """The verdict as a sentence says it: a worse loss is above."""
        worse = self.verdict == "is below" and self.scale.less_is_better
        return "is worse than" if worse else self.verdict

    @property
    def is_significant(self) -> bool:
        return self.verdict in ("beats", "is below")

    @property
    def points(self) -> str:
        """The mean in points with its interval: `+1.0 [−1.3, +3.1]`."""
        mean, *ends = (format_points(x, self.scale) for x in (self.mean, *(self.interval or ())))
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    @property
    def p_cells(self) -> tuple[str, str]:
        """p and p by Holm, for a table."""
        return _number(self.p), _number(self.corrected)

    @property
    def p_words(self) -> str:
        """`p = 0.007, by Holm 0.02`; p alone where it is the only comparison."""
        raw = _number(self.p)
        text = f"p {raw}" if raw.startswith("<") else f"p = {raw}"
        return f"{text}, by Holm {_number(self.corrected)}" if self.family > 1 else text

    @property
    def _error(self) -> float:
        """Standard error of the mean (ddof 1)."""
        return float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))

    @property
    def _obstacle(self) -> str:
        """Reason that there is no test; empty if there is one."""
        count = len(self.values)
        if not np.isfinite(self.values).all():
            return "results are missing"
        if count < FEWEST:
            some = "one repetition proves" if count == 1 else "two repetitions prove"
            return f"{some} nothing" if count else "no repetition has both results"
        spread = max(self.values) - min(self.values)
        if spread == 0:
            same = "the same difference in every repetition"
            return same if self.mean else "no difference in any repetition"
        if spread <= max(1e-9, self.resolution * (1 + 1e-9)):
            return "the differences vary by no more than one test sample"
        return ""


def paired(own: Sequence[float], others: Sequence[float]) -> tuple[float, ...]:
    """Return the differences, rounded: equal accuracies may differ by 1e-17 in their means."""
    return tuple(round(a - b, 12) for a, b in zip(own, others, strict=True))


def detectable(spread: float, count: int) -> float:
    """Return the mean difference that a two-sided paired t test at `LEVEL` of `count` repetitions
    finds with the probability `POWER`; `spread`: standard deviation of single differences."""
    critical = float(stdtrit(count - 1, 1 - LEVEL / 2))
    return float(nctdtrinc(count - 1, 1 - POWER, critical)) * spread / math.sqrt(count)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return p values corrected for their number by Holm's step-down method (Holm 1979, "A Simple
    Sequentially Rejective Multiple Test Procedure")."""
    corrected, largest = {}, 0.0
    for before, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - before) * p_values[key]))
        corrected[key] = largest
    return corrected


def corrected(tests: Mapping[Key, Test]) -> dict[Key, Test]:
    """Return the tests of one family with p values corrected for their number."""
    p_values = holm({key: test.p for key, test in tests.items() if test.p is not None})
    return {
        key: replace(test, corrected=p_values.get(key), family=len(p_values))
        for key, test in tests.items()
    }


def _number(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
