"""What paired differences allow to say, and how they are written.

Words follow from a paired t test, which knows how little a few repetitions say: of three, a
bootstrap interval is the range of the differences, and excludes 0 in 1 of 4 cases by chance alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.stats import bootstrap, t

from dynmoe.report.tables import format_points

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
