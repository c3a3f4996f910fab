"""The claim in numbers worked out by hand, and in words that follow from them by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from sweeps import write_run, write_sweep

from dynmoe.report.claim import MEAN, Claim, SettingComparison, examine
from dynmoe.report.claim_figures import draw_claim
from dynmoe.report.claim_tables import (
    accuracy_table,
    claim_table,
    families,
    headline,
    lacking,
    sentences,
    statements,
)
from dynmoe.report.run import conditions
from dynmoe.report.runs import Collection, read_runs
from dynmoe.report.tables import Strong

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


def differences(comparison: SettingComparison) -> dict[str, tuple[str, list[float]]]:
    return {
        each.rival: (each.setting, [round(100 * value, 6) for value in each.values])
        for each in comparison.differences
        if each.rival != "grid"
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


def test_verdicts_follow_from_a_paired_t_test(tmp_path: Path) -> None:
    _, (claim,) = read(write_sweep(tmp_path, SWEEP))
    first, second, mean = claim.comparisons
    shown = [each for each in first.differences if each.rival != "grid"]
    # With 2 degrees of freedom the two-sided p is 1 - t / sqrt(t^2 + 2). Means 4, -6, 14, -6 with
    # standard error 2 / sqrt(3); dense: 14, with 11.136 / sqrt(3).
    ts = [4 / (2 / 3**0.5), 6 / (2 / 3**0.5), 14 / (2 / 3**0.5), 6 / (2 / 3**0.5)]
    ts.append(14 / (math.sqrt((10**2 + 2**2 + 12**2) / 2) / 3**0.5))
    assert [each.p for each in shown] == pytest.approx([1 - t / math.sqrt(t**2 + 2) for t in ts])
    # Holm: top-2 of 4 is best and pick, and counts once. Of 4 comparisons the least p, 0.0067,
    # counts 4 times, 0.027 < 0.05; the next, 0.035, 3 times; 0.074 twice; 0.16.
    raw = [each.p or 0 for each in shown]
    factors = (2, 3, 4, 3, 1)
    assert [each.corrected for each in shown] == pytest.approx(
        [factor * p for factor, p in zip(factors, raw, strict=True)]
    )
    assert {each.family for each in first.differences} == {4}
    undecided = "is not significantly different from"
    verdicts = [undecided, undecided, "beats", undecided, undecided]
    assert [each.verdict for each in shown] == verdicts
    # t of 2 degrees of freedom is 4.3027 at 97.5 %; the mean is t standard errors.
    assert [each.interval for each in shown] == [
        pytest.approx((each.mean - half, each.mean + half), rel=1e-4)
        for each, t in zip(shown, ts, strict=True)
        for half in [4.3027 * abs(each.mean) / t]
    ]
    (equal,) = second.against("mean")
    assert (equal.interval, equal.p, equal.verdict) == (None, None, "unknown")
    assert mean.against("dense")[0].verdict == "is not significantly different from"


def test_the_resolution_is_one_sample_of_the_test_set(tmp_path: Path) -> None:
    sizes = {"0/in": 200, "15/in": 100}
    _, (claim,) = read(write_sweep(tmp_path, SWEEP, facts={"sizes": sizes}))
    assert [each.differences[0].resolution for each in claim.comparisons] == [
        1 / 200,
        1 / 100,
        1 / 400,  # a sample of the larger set, in a mean of two
    ]


def test_claims_of_several_settings_are_corrected_together(tmp_path: Path) -> None:
    both = {"DynMoE-tutel": {"0": [0.5, 0.7, 0.6], "15": [0.5, 0.6, 0.4]}}
    _, claims = read(write_sweep(tmp_path, SWEEP | both))
    # In the mean each has mean, top-1, top-2 and dense; in 15 DynMoE has equal differences alone.
    assert [{each.family for each in claim.overall.differences} for claim in claims] == [{8}, {8}]
    assert {each.family for each in claims[0].comparisons[0].differences} == {4 + 4 + 4}


def test_the_pick_is_by_validation_and_the_best_by_test(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2", 0.6, validation=0.9)
    write_run(tmp_path, "top-1 of 4", 0.7, validation=0.8)
    write_run(tmp_path, "top-2 of 4", 0.5, validation=0.7)
    write_run(tmp_path, "DynMoE", 0.65, validation=0.1)
    _, (claim,) = read(tmp_path)
    assert {rival: setting for rival, (setting, _) in differences(claim.overall).items()} == {
        "mean": "",
        "best": "top-1 of 4",
        "worst": "top-2 of 4",
        "pick": "top-1 of 2",
    }


def test_a_validation_that_is_not_known_is_not_picked(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2", 0.6, validation=math.nan)
    write_run(tmp_path, "top-2 of 4", 0.5, validation=0.7)
    write_run(tmp_path, "DynMoE", 0.65)
    _, (claim,) = read(tmp_path)
    assert claim.overall.against("pick")[0].setting == "top-2 of 4"


def test_every_repetition_picks_anew(tmp_path: Path) -> None:
    for seed, validation in enumerate(([0.9, 0.8], [0.7, 0.8])):
        write_run(tmp_path, "top-1 of 2", 0.5, validation=validation[0], seed=seed)
        write_run(tmp_path, "top-2 of 4", 0.75, validation=validation[1], seed=seed)
        write_run(tmp_path, "DynMoE", 0.5, seed=seed)
    _, (claim,) = read(tmp_path)
    (pick,) = claim.overall.against("pick")
    assert (pick.setting, pick.accuracies) == ("top-1 of 2, top-2 of 4", (0.5, 0.75))


def test_a_setting_that_lacks_repetitions_is_left_out_and_named(tmp_path: Path) -> None:
    write_sweep(tmp_path, SWEEP | {"top-2 of 4": {"0": [0.6, 0.7], "15": [0.5] * 3}})
    write_run(tmp_path, "top-2 of 4", seed=2, state="failed")
    write_run(tmp_path, "top-1 of 8", seed=0, state="stopped")
    collection, (claim,) = read(tmp_path)
    first, second, mean = claim.comparisons
    gap, nothing = "top-2 of 4 (2 of 3: seed 2 failed)", "top-1 of 8 (0 of 3: seed 0 stopped, "
    for comparison in claim.comparisons:
        assert comparison.repetitions == ((0, 0), (1, 0), (2, 0))
    assert first.left_out[0] == gap and first.left_out[1].startswith(nothing)
    assert mean.left_out[0] == gap
    assert differences(first)["mean"] == ("", [14, 12, 16])  # of top-1 of 2 alone
    assert differences(second)["mean"] == ("", [0, 0, 0])
    assert sentences(claim)[-1].startswith(
        "The comparison is on the repetitions that most settings have (seeds 0, 1, 2), and of the "
        f"settings that have them all. Incomplete: {gap}"
    )
    rows = {row[0]: row for row in accuracy_table(collection, claim.problem).rows}
    assert rows["top-2 of 4"][1:3] == ("65.0 +/- 3.5 (2 of 3: seed 2 failed)", "50.0 +/- 0.0")
    assert rows["top-1 of 8"][1].startswith("X (0 of 3: seed 0 stopped, seed 1 missing")


def test_a_repetition_that_few_have_is_left_out(tmp_path: Path) -> None:
    write_sweep(tmp_path, {name: {"0": SWEEP[name]["0"][:2]} for name in ("dense", "top-1 of 2")})
    write_sweep(tmp_path, {name: {"0": SWEEP[name]["0"]} for name in ("DynMoE", "top-2 of 4")})
    _, (claim,) = read(tmp_path)
    assert claim.overall.repetitions == ((0, 0), (1, 0))
    assert differences(claim.overall)["mean"] == ("", [4, 2])


def test_seeds_without_a_common_one_are_not_compared(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2", seed=0)
    write_run(tmp_path, "DynMoE", seed=1)
    collection, (claim,) = read(tmp_path)
    assert claim.overall.rank is None
    assert "nothing can be compared" in headline(claim)
    assert claim_table(collection, claim).rows == (("DynMoE", "0", "X", "", "", "", "0"),)


@pytest.mark.parametrize(
    ("dynmoe", "best", "words"),
    [
        (
            [0.79, 0.8, 0.81],
            [0.7, 0.7, 0.7],
            "beats the mean of the grid (+25.0 points) and its best (+10.0 po",
        ),
        (
            [0.599, 0.6, 0.601],
            [0.7, 0.7, 0.7],
            "beats the mean of the grid (+5.0 points) but not its best (−10.0",
        ),
        (
            [0.3, 0.9, 0.6],
            [0.7, 0.7, 0.7],
            "is not significantly different from the mean of the grid (+5.0 points) nor from ",
        ),
        (
            [0.299, 0.3, 0.301],
            [0.7, 0.7, 0.7],
            "is below the mean of the grid (−25.0 points) and its best (−40.0",
        ),
        (
            [0.799, 0.8, 0.801],
            [0.699, 0.7, 0.701],
            "beats the mean of the grid (+25.0 points; n = 3); no verdict against its best (+10.0 "
            "points): the same difference in every repetition.",
        ),
        (
            [0.5, 0.6, 0.7],
            [0.6, 0.8, 1.0],
            "no verdict against its mean (0.0 points): no difference in any repetition.",
        ),
        ([0.6], [0.7], "no verdict: one repetition proves nothing."),
        ([0.8, 0.8], [0.7, 0.7], "no verdict: two repetitions prove nothing."),
        ([0.8] * 3, [0.7] * 3, "no verdict: the same difference in every repetition."),
    ],
)
def test_headline(
    tmp_path: Path, dynmoe: Sequence[float], best: Sequence[float], words: str
) -> None:
    write_sweep(
        tmp_path,
        {
            "top-1 of 2": {"0": [0.4] * len(best)},
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
        (["DynMoE"], ["no finished run with fixed experts", "no finished dense run"]),
        (["DynMoE", "dense"], ["no finished run with fixed experts"]),
        (["DynMoE", "top-1 of 2"], ["no finished dense run"]),
        (["top-1 of 2"], ["no finished run that adapts", "no finished dense run"]),
        (["dense"], ["no finished run that adapts", "no finished run with fixed experts"]),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_missing_runs_are_reported(
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
        assert claim_table(collection, claim).rows[0][0] == "DynMoE"
    assert len(accuracy_table(collection, collection.problems[0]).rows) == len(settings)


def test_words_of_each_rival(tmp_path: Path) -> None:
    write_sweep(tmp_path, {name: {"0": SWEEP[name]["0"]} for name in SWEEP})
    _, (claim,) = read(tmp_path)
    assert sentences(claim)[:7] == [
        "DynMoE on RotatedDigits, test environment 0, is not significantly different from the mean "
        "of the grid (+4.0 points) nor from its best (−6.0 points; n = 3).",
        "DynMoE reaches 64.0 +/- 5.2 %: rank 2 of 4 settings by mean accuracy.",
        "It is not significantly different from the mean of the grid (2 settings), 60.0 +/- 4.7 %: "
        "+4.0 [−1.0, +9.0] points, p = 0.074, by Holm 0.15.",
        "It is not significantly different from the best of the grid (top-2 of 4), 70.0 +/- 4.7 %: "
        "−6.0 [−11.0, −1.0] points, p = 0.035, by Holm 0.11.",
        "It beats the worst of the grid (top-1 of 2), 50.0 +/- 4.7 %: +14.0 [+9.0, +19.0] points, "
        "p = 0.0067, by Holm 0.027.",
        "It is not significantly different from the grid's best by validation (top-2 of 4), 70.0 "
        "+/- 4.7 %: −6.0 [−11.0, −1.0] points, p = 0.035, by Holm 0.11.",
        "It is not significantly different from dense, 50.0 +/- 0.0 %: +14.0 [−13.7, +41.7] "
        "points, p = 0.16, by Holm 0.16.",
    ]
    assert sentences(claim)[-1] == "3 repetitions can show large differences only."


def test_what_weakens_the_words(tmp_path: Path) -> None:
    sizes = {f"{name}/in": 240 for name in ("0", "15", "30")}
    for seed in (0, 1):
        write_run(tmp_path, "top-1 of 2", 0.5, seed=seed, facts={"sizes": sizes})
        write_run(tmp_path, "DynMoE", 0.6, seed=seed, facts={"sizes": sizes})
        write_run(tmp_path, "DynMoE", 0.6, seed=seed, hparams_seed=1, facts={"sizes": sizes})
    _, (claim,) = read(tmp_path)
    said = sentences(claim)
    # sqrt(0.6 x 0.4 / 240) = 3.16 %
    assert (
        "Tested on 240 samples: from that alone a run's accuracy has a standard error of 3.2 "
        "points." in said
    )
    assert (
        "The search was unequal; draws of hyper-parameters to choose from: top-1 of 2 1, DynMoE 2."
        in said
    )


def test_the_end_of_training_stands_beside_the_selected_step(tmp_path: Path) -> None:
    for name, selected, last in (("top-1 of 2", 0.7, 0.4), ("DynMoE", 0.5, 0.6)):
        for seed in (0, 1):
            run = write_run(tmp_path, name, selected, seed=seed)
            record = run.read("results")[-1]
            scores = {key: {"accuracy": 0.0} for key in record["scores"]}
            scores["0/in"] = {"accuracy": last}
            run.append("results", {**record, "scores": scores, "step": 999})
    _, (claim,) = read(tmp_path)
    assert claim.overall.rank == 2
    assert (
        "At the end of training instead of the selected steps: DynMoE 60.0 %, the mean of the grid "
        "40.0 %, rank 1." in sentences(claim)
    )


def test_tables(tmp_path: Path) -> None:
    collection, (claim,) = read(write_sweep(tmp_path, SWEEP))
    table = claim_table(collection, claim)
    assert table.columns[2:] == (
        *("accuracy, %", "DynMoE minus it, points"),
        *("p", "by Holm", "n"),
    )
    assert table.rows[:3] == (
        ("DynMoE", "0", "64.0 +/- 5.2", "", "", "", "3"),
        ("mean of the grid", "0", "60.0 +/- 4.7", "+4.0 [−1.0, +9.0]", "0.074", "0.15", "3"),
        (
            *("best of the grid (top-2 of 4)", "0", "70.0 +/- 4.7", "−6.0 [−11.0, −1.0]"),
            *("0.035", "0.11", "3"),
        ),
    )
    assert [isinstance(row[3], Strong) for row in table.rows[:4]] == [False, False, False, True]
    assert families(claim) in table.note
    assert "in 15: the same difference in every repetition" in table.note
    assert len(table.rows) == 3 * 6 and table.rows[12][1] == MEAN
    best = [row[2] for row in accuracy_table(collection, claim.problem).rows]
    assert [isinstance(cell, Strong) for cell in best] == [True, False, False, False]
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


def test_words_on_the_correction(tmp_path: Path) -> None:
    """They name the comparisons that were made, and none where there was no test."""
    _, (claim,) = read(write_sweep(tmp_path / "whole", SWEEP))
    assert families(claim) == (
        "4 comparisons in the mean of environments, 4 comparisons in the single environments"
    )
    short = {name: {"0": by["0"][:2]} for name, by in SWEEP.items()}
    collection, (claim,) = read(write_sweep(tmp_path / "short", short))
    note = claim_table(collection, claim).note
    assert families(claim) == "" and "No verdict against anything" in note
    drawn = draw_claim(claim)
    assert drawn is not None and "nothing could be tested" in drawn.caption
    assert not any("Holm" in text or "comparisons" in text for text in (note, drawn.caption))
    one = {name: {"0": [*SWEEP[name]["0"]]} for name in ("top-1 of 2", "DynMoE")}
    collection, (claim,) = read(write_sweep(tmp_path / "one", one))
    assert "p corrected for 1 comparison." in claim_table(collection, claim).note
