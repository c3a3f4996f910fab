"""Table cells are DomainBed's: mean and population standard error in per cent."""

from __future__ import annotations

import pytest

from dynmoe.report.tables import format_mean, format_points


@pytest.mark.parametrize(
    ("accuracies", "cell"),
    [
        ([0.1, 0.2, 0.3], "20.0 +/- 4.7"),
        ([0.5], "50.0 +/- 0.0"),
        ([], "X"),
        # 48.25 and 23.75: the order of DomainBed's operations decides the digit.
        ([0.405, 0.735, 0.3075], "48.3 +/- 10.6"),
        ([0.235, 0.24, 0.2375], "23.7 +/- 0.1"),
    ],
)
def test_format_mean(accuracies: list[float], cell: str) -> None:
    assert format_mean(accuracies) == cell


def test_format_points() -> None:
    cells = [format_points(difference) for difference in (0.0234, -0.0234, 0.0, -0.0001)]
    assert cells == ["+2.3", "−2.3", "0.0", "−0.01"]
