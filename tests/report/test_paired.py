"""Paired tests: by hand, beside SciPy's, and without a verdict where nothing can be judged."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from dynmoe.report.paired import LEVEL, PairedTest, corrected, holm, paired

SPREAD = (0.04, 0.02, 0.06)


@pytest.mark.parametrize("count", range(3, 9))
def test_p_and_interval_are_scipys_and_agree(count: int) -> None:
    excluded = set()
    for values in np.random.default_rng(count).normal(0.02, 0.03, (50, count)):
        test, known = PairedTest(tuple(values.tolist())), ttest_1samp(values, 0)
        assert test.p == pytest.approx(known.pvalue)
        assert test.interval == pytest.approx(tuple(known.confidence_interval(1 - LEVEL)))
        low, high = test.interval or (0, 0)
        excludes_zero = low > 0 or high < 0
        assert excludes_zero == (known.pvalue < LEVEL)
        excluded.add(excludes_zero)
    assert excluded == {True, False}


def test_an_interval_by_hand() -> None:
    # t of 2 degrees of freedom is 4.3027 at 97.5 %; the standard error is 0.01 / sqrt(3).
    test = PairedTest((0.01, 0.02, 0.03))
    assert test.interval == pytest.approx((-0.00484, 0.04484), abs=1e-5)
    assert test.points == "+2.0 [−0.5, +4.5]"
    assert PairedTest((0.001, 0.1, 0.03)).interval == pytest.approx((-0.0828, 0.1701), abs=1e-4)


@pytest.mark.parametrize(
    ("values", "resolution", "why"),
    [
        ((), 0, "no repetition"),
        ((0.5,), 0, "one repetition"),
        ((0.071, 0.071), 0, "two repetitions"),
        ((0.05, 0.09), 0, "two repetitions"),
        ((0.071,) * 3, 0, "the same difference"),
        ((0.0,) * 5, 0, "no difference"),
        (paired([0.1 + 0.2, 0.4, 0.5], [0.2, 0.3, 0.4]), 0, "the same difference"),
        ((1 / 3, 1 / 3 + 1e-10, 1 / 3), 0, "vary by no more"),
        ((0.051, 0.052, 0.053), 1 / 300, "vary by no more than one test sample"),
        ((0.05, 0.05, 0.0525), 1 / 400, "vary by no more than one test sample"),
        ((-0.001, 0.002, 0.0041), 1 / 400, "the difference is less than one test sample"),
        ((0.1, math.nan, 0.2), 0, "missing"),
        ((0.1, math.inf, 0.2), 0, "missing"),
    ],
)
def test_there_is_no_verdict_without_a_spread_to_judge_by(
    values: tuple[float, ...], resolution: float, why: str
) -> None:
    test = PairedTest(values, resolution)
    assert (test.verdict, test.is_significant) == ("unknown", False)
    assert why in test.why
    if test.p is None:
        assert test.interval is None and "[" not in (test.points if values else "")
        assert test.p_cells == ("-", "-")


def test_a_verdict_is_by_the_corrected_p() -> None:
    test = PairedTest(SPREAD, resolution=0.01)
    assert (test.verdict, test.why) == ("is not significantly different from", "")  # p = 0.07
    clear = PairedTest((0.12, 0.14, 0.16))  # 0.007
    assert clear.verdict == "beats"
    found = corrected({**dict.fromkeys(range(8), test), "clear": clear, "none": PairedTest((1.0,))})
    assert clear.p is not None
    assert (found["clear"].corrected, found["clear"].family) == (pytest.approx(9 * clear.p), 9)
    assert found["clear"].verdict == "is not significantly different from"
    assert found["clear"].p_cells == ("0.0067", "0.061")
    assert found["clear"].p_words == "p = 0.0067, by Holm 0.061"
    assert (found["none"].corrected, found["none"].verdict) == (None, "unknown")
    assert LEVEL == 0.05


def test_holm_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 0.04 cannot be below the one before it.
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
