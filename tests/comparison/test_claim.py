"""The claim in numbers worked out by hand, and in words that follow from intervals by rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from sweeps import write_run, write_sweep

from dynmoe.comparison.claim import Claim, Comparison, examine, interval
from dynmoe.comparison.conditions import conditions
from dynmoe.comparison.matching import MEAN
from dynmoe.comparison.runs import Collection, read_runs
from dynmoe.comparison.verdict import (
    accuracy_table,
    claim_table,
    difference_table,
    headline,
    lacking,
    sentences,
    statements,
)

# Accuracies by seed. Mean of the grid: 0.5, 0.6, 0.7 on environment 0.
SWEEP = {
    "dense": {"0": [0.5, 0.5, 0.5], "15": [0.75, 0.75, 0.75]},
    "top-1 of 2": {"0": [0.4, 0.5, 0.6], "15": [0.5, 0.5, 0.5]},
    "top-2 of 4": {"0": [0.6, 0.7, 0.8], "15": [0.5, 0.5, 0.5]},
    "DynMoE": {"0": [0.54, 0.62, 0.76], "15": [0.5, 0.5, 0.5]},
}


def read(folder: Path) -> tuple[Collection, list[Claim]]:
    collection = read_runs([folder])
    return collection, [
        claim for problem in collection.problems for claim in examine(collection, problem)
    ]


def differences(comparison: Comparison) -> dict[str, tuple[str, list[float]]]:
    return {
        each.rival: (each.setting, [round(100 * value, 6) for value in each.values])
        for each in comparison.differences
    }


def test_differences_are_paired_by_environment_and_seed(tmp_path: Path) -> None:
    _, (claim,) = read(write_sweep(tmp_path, SWEEP))
    first, second, mean = claim.comparisons
    assert (first.environment, second.environment, mean.environment) == ("0", "15", MEAN)
    assert first.repetitions == ((0, 0), (1, 0), (2, 0))
    assert differences(first) == {
        "mean": ("", [4, 2, 6]),
        "best": ("top-2 of 4", [-6, -8, -4]),
        "worst": ("top-1 of 2", [14, 12, 16]),
        "pick": ("top-2 of 4", [-6, -8, -4]),
        "dense": ("dense", [4, 12, 26]),
    }
    assert differences(second)["dense"] == ("dense", [-25, -25, -25])
    # Means of both environments: 52, 56, 63 against the grid's 50, 55, 60 and dense's 62.5.
    assert differences(mean)["mean"] == ("", [2, 1, 3])
    assert differences(mean)["dense"] == ("dense", [-10.5, -6.5, 0.5])
    assert [comparison.rank for comparison in claim.comparisons] == [2, 2, 3]
    assert claim.overall is mean


def test_verdicts_follow_from_the_intervals(tmp_path: Path) -> None:
    _, (claim,) = read(write_sweep(tmp_path, SWEEP))
    first, second, mean = claim.comparisons
    # Of three values the 2.5 % and 97.5 % quantiles of resampled means are the outermost values:
    # each has the chance 1/27 = 3.7 %.
    assert [each.interval for each in first.differences] == [
        pytest.approx(span)
        for span in ((0.02, 0.06), (-0.08, -0.04), (0.12, 0.16), (-0.08, -0.04), (0.04, 0.26))
    ]
    assert [each.verdict for each in first.differences] == [
        "beats",
        "is below",
        "beats",
        "is below",
        "beats",
    ]
    (equal,) = second.against("mean")
    assert (equal.interval, equal.verdict) == ((0, 0), "cannot be told from")
    assert mean.against("dense")[0].verdict == "cannot be told from"


def test_the_pick_is_by_validation_and_the_best_by_test(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2", 0.6, validation=0.9)
    write_run(tmp_path, "top-1 of 4", 0.7, validation=0.8)
    write_run(tmp_path, "top-2 of 4", 0.5, validation=0.7)
    write_run(tmp_path, "DynMoE", 0.65, validation=0.1)
    _, (claim,) = read(tmp_path)
    named = {each.rival: each.setting for each in claim.overall.differences}
    assert named == {
        "mean": "",
        "best": "top-1 of 4",
        "worst": "top-2 of 4",
        "pick": "top-1 of 2",
    }


def test_only_repetitions_that_all_have_are_compared_and_gaps_are_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, SWEEP | {"top-2 of 4": {"0": [0.6, 0.7], "15": [0.5] * 3}})
    write_run(tmp_path, "top-2 of 4", seed=2, state="failed")
    write_run(tmp_path, "top-1 of 8", seed=0, state="stopped")
    collection, (claim,) = read(tmp_path)
    first, second, mean = claim.comparisons
    gap, nothing = "top-2 of 4 (2 of 3: seed 2 failed)", "top-1 of 8 (0 of 3: seed 0 stopped, "
    assert first.repetitions == mean.repetitions == ((0, 0), (1, 0))
    assert second.repetitions == ((0, 0), (1, 0), (2, 0))
    assert first.left_out[0] == gap and first.left_out[1].startswith(nothing)
    assert mean.left_out[0] == gap
    assert differences(first)["mean"] == ("", [4, 2])
    assert sentences(claim)[-1].startswith(
        f"Compared are the repetitions that all settings have (seeds 0, 1). Incomplete: {gap}"
    )
    rows = {row[0]: row for row in accuracy_table(collection, claim.problem).rows}
    assert rows["top-2 of 4"][1:3] == ("65.0 +/- 3.5 (2 of 3: seed 2 failed)", "50.0 +/- 0.0")
    assert rows["top-1 of 8"][1].startswith("X (0 of 3: seed 0 stopped, seed 1 missing")


def test_seeds_without_a_common_one_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2", seed=0)
    write_run(tmp_path, "DynMoE", seed=1)
    collection, (claim,) = read(tmp_path)
    assert claim.overall.rank is None
    assert "nothing can be compared" in headline(claim)
    assert claim_table(collection, claim).rows == (("0", "0", "X", "X", "X", "X", "X", "X"),)


@pytest.mark.parametrize(
    ("dynmoe", "best", "words"),
    [
        ([0.8, 0.8], [0.7, 0.7], "beats the mean of the grid and its best."),
        ([0.6, 0.6], [0.7, 0.7], "beats the mean of the grid, not its best."),
        ([0.6, 0.75], [0.7, 0.7], "beats the mean of the grid and cannot be told from its best."),
        (
            [0.5, 0.6],
            [0.7, 0.65],
            "cannot be told from the mean of the grid and is below its best.",
        ),
        ([0.3, 0.9], [0.7, 0.7], "cannot be told from the mean of the grid, nor from its best."),
        ([0.3, 0.3], [0.7, 0.7], "is below the mean of the grid and its best."),
        ([0.6], [0.7], "+5.0 points from the mean of the grid and −10.0 from its best, in one "),
    ],
)
def test_headline(
    tmp_path: Path, dynmoe: Sequence[float], best: Sequence[float], words: str
) -> None:
    write_sweep(
        tmp_path,
        {
            "top-1 of 2": {"0": [0.4, 0.4][: len(best)]},
            "top-2 of 4": {"0": best},
            "DynMoE": {"0": dynmoe},
        },
    )
    _, (claim,) = read(tmp_path)
    assert words in headline(claim)
    assert headline(claim).startswith("DynMoE on RotatedDigits, test environment 0")


def test_every_setting_that_adapts_has_its_own_claim(tmp_path: Path) -> None:
    write_sweep(tmp_path, SWEEP | {"DynMoE-tutel": {"0": [0.5], "15": [0.5]}})
    _, claims = read(tmp_path)
    assert [claim.setting for claim in claims] == ["DynMoE", "DynMoE-tutel"]
    assert [len(claim.overall.repetitions) for claim in claims] == [3, 1]


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        (["DynMoE"], ["no run with fixed experts", "no dense run"]),
        (["DynMoE", "dense"], ["no run with fixed experts"]),
        (["DynMoE", "top-1 of 2"], ["no dense run"]),
        (["top-1 of 2"], ["no run that adapts", "no dense run"]),
        (["dense"], ["no run that adapts", "no run with fixed experts"]),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_what_is_missing_is_said(
    tmp_path: Path, settings: list[str], missing: list[str], seeds: int
) -> None:
    write_sweep(tmp_path, {name: {"0": [0.5] * seeds} for name in settings})
    collection, claims = read(tmp_path)
    said = lacking(collection, collection.problems[0])
    assert len(said) == len(missing)
    assert all(text in sentence for text, sentence in zip(missing, said, strict=True))
    assert statements(collection)[-len(said) :] == said
    assert len(claims) == ("DynMoE" in settings)
    for claim in claims:
        assert len(claim_table(collection, claim).rows) == 1
        assert len(difference_table(collection, claim).rows) == 1
    assert len(accuracy_table(collection, collection.problems[0]).rows) == len(settings)


def test_words_of_each_rival(tmp_path: Path) -> None:
    _, (claim,) = read(write_sweep(tmp_path, {name: {"0": SWEEP[name]["0"]} for name in SWEEP}))
    assert sentences(claim) == [
        "DynMoE on RotatedDigits, test environment 0, beats the mean of the grid, not its best.",
        "It beats the mean of the grid (2 settings), 60.0 +/- 4.7 %: +4.0 [+2.0, +6.0] points, "
        "n = 3.",
        "It is below the best of the grid (top-2 of 4), 70.0 +/- 4.7 %: −6.0 [−8.0, −4.0] points, "
        "n = 3.",
        "It beats the worst of the grid (top-1 of 2), 50.0 +/- 4.7 %: +14.0 [+12.0, +16.0] points, "
        "n = 3.",
        "It is below the grid's best by validation (top-2 of 4), 70.0 +/- 4.7 %: −6.0 [−8.0, −4.0] "
        "points, n = 3.",
        "It beats dense, 50.0 +/- 0.0 %: +14.0 [+4.0, +26.0] points, n = 3.",
        "By mean accuracy it ranks 2 of 4 settings.",
        "With 3 repetitions an interval is no more than the range of the differences: without any "
        "true difference it excludes 0 in 1 of 4 comparisons.",
    ]


def test_tables(tmp_path: Path) -> None:
    collection, (claim,) = read(write_sweep(tmp_path, SWEEP))
    table = claim_table(collection, claim)
    assert table.columns[2:] == (
        "DynMoE",
        "mean of the grid",
        "best of the grid",
        "worst of the grid",
        "grid's best by validation",
        "dense",
        "rank",
    )
    assert table.rows[0] == (
        "0",
        "3",
        "64.0 +/- 5.2",
        "60.0 +/- 4.7",
        "70.0 +/- 4.7 (top-2 of 4)",
        "50.0 +/- 4.7 (top-1 of 2)",
        "70.0 +/- 4.7 (top-2 of 4)",
        "50.0 +/- 0.0",
        "2 of 4",
    )
    assert difference_table(collection, claim).rows[2] == (
        MEAN,
        "3",
        "+2.0 [+1.0, +3.0]",
        "−3.0 [−4.0, −2.0]",
        "+7.0 [+6.0, +8.0]",
        "−3.0 [−4.0, −2.0]",
        "−5.5 [−10.5, +0.5]",
    )
    assert accuracy_table(collection, claim.problem).rows[-1] == (
        "DynMoE",
        "64.0 +/- 5.2",
        "50.0 +/- 0.0",
        "57.0 +/- 2.6",
    )


def test_the_note_names_the_conditions(tmp_path: Path) -> None:
    collection, _ = read(write_sweep(tmp_path, SWEEP))
    assert conditions(collection.runs) == (
        "Protocol domainbed; selection by training-domain validation; 3 repetitions (seeds 0, 1, "
        "2); 151 steps; backbone vit_digits; weights from scratch; data abc0 / abc1 / abc2; "
        "versions dynmoe 0.1.0, torch 2.11.0."
    )
    for seed in range(3, 5):
        write_run(tmp_path, seed=seed, facts={"weights": "pretrained: timm", "trial_seed": 1})
    note = conditions(read(tmp_path)[0].runs)
    assert "(seed/trial seed 0/0, 1/0, 2/0, 3/1, 4/1)" in note
    assert "weights from scratch / pretrained: timm" in note
    assert "data abc0 / abc1 / abc2 and 2 more;" in note


def test_interval_needs_two_repetitions_and_is_the_same_again() -> None:
    assert interval([0.5]) is None
    values = [0.01, -0.02, 0.03, 0.04, 0.005]
    assert interval(values) == interval(values)
