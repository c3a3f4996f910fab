"""Table cells are DomainBed's: mean and population standard error in per cent."""

from __future__ import annotations

import pytest

from dynmoe.report.tables import format_mean


@pytest.mark.parametrize(
    ("accuracies", "cell"),
    [([0.1, 0.2, 0.3], "20.0 +/- 4.7"), ([0.5], "50.0 +/- 0.0"), ([], "X")],
)
def test_format_mean(accuracies: list[float], cell: str) -> None:
    assert format_mean(accuracies) == cell
