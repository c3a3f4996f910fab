"""Cells of result tables, by DomainBed's rules (domainbed/scripts/collect_results.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def format_mean(accuracies: Sequence[float]) -> str:
    """Mean and standard error over trials, in per cent: `20.0 +/- 4.7`; `X` without any.

    The standard error is the population standard deviation (ddof 0) over the root of the number
    of trials. DomainBed's published tables use it, so ours compare.
    """
    if len(accuracies) == 0:
        return "X"
    percent = 100 * np.asarray(accuracies, dtype=float)
    return f"{percent.mean():.1f} +/- {percent.std() / np.sqrt(len(percent)):.1f}"
