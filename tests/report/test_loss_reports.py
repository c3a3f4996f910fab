"""Reports of a measure of which less is better: the loss of language models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from lm_runs import GAP, write_lm_run
from sweeps import STEPS, write_run

from dynmoe.records import Kind, Record, RecordError, RunFolder
from dynmoe.report import page
from dynmoe.report.claim import Claim, examine
from dynmoe.report.claim_figures import draw_accuracy_by_parameters, draw_claim, draw_curves
from dynmoe.report.claim_tables import accuracy_table, claim_table, headline, sentences
from dynmoe.report.cost_tables import values_table
from dynmoe.report.costs import model_costs
from dynmoe.report.drawing import Point, front, set_apart
from dynmoe.report.figures import draw_loss, draw_scores
from dynmoe.report.run import read_run
from dynmoe.report.runs import Collection, different_tokens, read_runs
from dynmoe.report.set_tables import sets_table, task_tables
from dynmoe.report.summary import compare, to_markdown
from dynmoe.report.tables import Strong, Table, format_mean, format_points, format_result
from dynmoe.report.words import measure_number, scale_of

LOSS = scale_of("loss")

# Best validation loss of each setting; seeds differ by a little noise.
BEST = {"dense": 2.5, "top-1 of 2": 2.6, "top-2 of 4": 2.4, "DynMoE": 2.3}
NOISE = (0.0, 0.011, 0.005, 0.013)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four settings, four seeds; the last evaluation is a worse one."""
    folder = tmp_path_factory.mktemp("sweep")
    for place, (setting, best) in enumerate(BEST.items()):
        for seed, noise in enumerate(NOISE):
            found = best + noise * (1 + place / 4)
            write_lm_run(folder, setting, (found + 0.5, found, found + 0.2), seed)
    return folder


@pytest.fixture(scope="module")
def collection(sweep: Path) -> Collection:
    found = read_runs([sweep])
    assert not found.warnings
    return found


@pytest.fixture(scope="module")
def claim(collection: Collection) -> Claim:
    (found,) = examine(collection, collection.problems[0])
    return found


def strong(table: Table) -> set[str]:
    return {row[0] for row in table.rows if any(isinstance(cell, Strong) for cell in row)}


def test_scales() -> None:
    assert format_mean([2.5, 2.7], LOSS) == "2.6000 +/- 0.0707"
    assert format_mean([2.5], LOSS) == "2.5000" and format_mean([0.5]) == "50.0"
    assert format_points(-0.0123, LOSS) == "−0.0123" and format_points(0, LOSS) == "0.0000"
    assert format_points(0.00004, LOSS) == "+0.00004"
    assert format_result(2.5, LOSS) == "2.5000 nats per token"
    assert measure_number("bits_per_byte", 1.5) == "1.5000"
    assert measure_number("perplexity", 12.346) == "12.35"
    assert measure_number("accuracy", 0.5, 2) == "50.00"
    assert [scale_of(key).less_is_better for key in ("perplexity", "score")] == [True, False]


def test_the_step_of_the_least_validation_loss_is_reported(sweep: Path) -> None:
    run = read_run(read_runs([sweep]).runs[0].folder)
    assert run.outcome.step == STEPS[1]
    assert run.outcome.accuracy == pytest.approx(run.outcome.validation + GAP)
    assert run.outcome.last > run.outcome.accuracy


def test_other_tokens_are_warned_of(tmp_path: Path) -> None:
    vocabularies = [("dense", "a1", 300), ("top-1 of 2", "b2", 600), ("DynMoE", "a1", 300)]
    first, second, third = (
        read_run(
            write_lm_run(tmp_path, setting, facts={"tokenizer": tokenizer, "vocabulary": size})
        )
        for setting, tokenizer, size in vocabularies
    )
    (warning,) = read_runs([tmp_path]).warnings
    assert "tokenizer (a1; b2), vocabulary (300; 600)" in warning
    assert "bits per byte compare" in warning
    (beside,) = compare(first, second).warnings
    assert "bits per byte compare" in beside and not compare(first, third).warnings


def test_learnt_vocabularies_of_other_trials_are_expected() -> None:
    facts = [
        {"tokenizer": name, "trial_seed": trial, "config": {"data.length": length}}
        for name, trial, length in (("a1", 0, 128), ("b2", 1, 128), ("b2", 1, 256))
    ]
    assert different_tokens(facts[:2]) == []
    (warning,) = different_tokens(facts)
    assert "data.length (128; 256)" in warning


def test_less_is_better_in_the_claim(claim: Claim) -> None:
    whole = claim.overall
    assert whole.rank == 1
    (best,), (worst,), (pick,) = (whole.against(each) for each in ("best", "worst", "pick"))  # type: ignore[arg-type]
    assert (best.setting, worst.setting, pick.setting) == ("top-2 of 4", "top-1 of 2", "top-2 of 4")
    assert best.mean < 0 and best.verdict == "beats"
    text = headline(claim)
    assert "beats the mean of the grid (−0.19" in text and "nats" in text and "points" not in text


def test_a_higher_loss_is_said_to_be_worse(tmp_path: Path) -> None:
    for seed, noise in enumerate(NOISE):
        write_lm_run(tmp_path, "DynMoE", (3.0, 2.9 + 2 * noise), seed)
        write_lm_run(tmp_path, "top-1 of 2", (3.0, 2.5 + noise), seed)
    found = read_runs([tmp_path])
    (claim,) = examine(found, found.problems[0])
    assert claim.overall.rank == 2
    assert "is worse than top-1 of 2" in headline(claim)
    assert any("is worse than" in text for text in sentences(claim)[1:])


def test_the_lowest_number_is_bold(collection: Collection, claim: Claim) -> None:
    (problem,) = collection.problems
    settings = accuracy_table(collection, problem)
    assert strong(settings) == {"DynMoE"} and "Bold: the lowest" in settings.note
    (tasks,) = task_tables(collection).values()
    assert strong(tasks) == {"DynMoE"} and "nats per token" in tasks.title
    sets = sets_table(collection, problem)
    assert sets is not None and sets.columns == ("setting", "validation", "test")
    assert float(sets.rows[0][1].split()[0]) + GAP == pytest.approx(
        float(sets.rows[0][2].split()[0]), abs=2e-4
    )
    columns = claim_table(collection, claim).columns
    assert columns[2:4] == ("loss, nats per token", "DynMoE minus it, nats")


def test_the_searched_value_of_the_least_validation_loss_stands(tmp_path: Path) -> None:
    for lr, best in ((1e-3, 2.5), (3e-3, 2.4), (1e-2, 2.9)):
        for setting in ("dense", "DynMoE"):
            write_lm_run(tmp_path, setting, (3.0, best), lr=lr)
    found = read_runs([tmp_path])
    assert {run.config["task.optimizer.lr"] for run in found.runs} == {3e-3}
    table = values_table(found, found.problems[0])
    assert table is not None
    assert [row[1] for row in table.rows if isinstance(row[2], Strong)] == ["0.003"] * 2


def test_figures(collection: Collection, claim: Claim) -> None:
    drawn = draw_claim(claim)
    assert drawn is not None and drawn.caption.startswith("Left of 0 DynMoE is better")
    xs = [x for line in drawn.figure.axes[0].lines for x in line.get_xdata()]
    assert min(xs) == pytest.approx(-0.3, abs=0.05)  # nats, not hundredths of them
    curves = draw_curves(collection.runs)
    assert curves is not None and curves.figure.axes[0].get_ylim()[1] < 4
    costs = draw_accuracy_by_parameters(collection.runs)
    assert costs is not None and "Lower is better" in costs.caption
    assert "Better is down and left" in costs.caption
    axes = draw_scores(collection.runs[0]).axes[0]
    assert axes.get_ylabel() == "loss, nats per token" and axes.get_ylim()[1] < 4
    assert draw_loss(collection.runs[0]) is not None


def test_the_front_of_costs_against_a_loss() -> None:
    style = {"color": "black", "marker": "o"}
    points = [
        Point(name, x, y, 0.0, style)
        for name, x, y in (("a", 1, 3.0), ("b", 2, 2.0), ("c", 3, 2.5), ("d", 4, 1.0), ("e", 4, 2))
    ]
    assert [each.name for each in front(points, less_y_is_better=True)] == ["a", "b", "d"]
    assert [each.name for each in set_apart(points, less_y_is_better=True)] == list("abcde")


def test_one_run_and_two(collection: Collection) -> None:
    dense, dynmoe = (
        next(run for run in collection.runs if run.setting == name) for name in ("dense", "DynMoE")
    )
    text = to_markdown(dynmoe)
    assert (
        "| evaluation set | loss, nats per token | accuracy | bits per byte | perplexity |" in text
    )
    assert "| test (reported) | **2.4000** | 25.0 |" in text
    found = compare(dense, dynmoe)
    assert any("0.2000 nats below A: 2.4000 nats per token" in text for text in found.sentences)
    scores = next(table for table in found.tables if table.title.startswith("Scores"))
    assert scores.columns[-1] == "B − A" and "times 100" not in scores.title
    rows = {row[:2]: row[2:] for row in scores.rows}
    assert rows["test", "loss, nats per token"] == ("2.6000", "2.4000", "−0.2000")
    assert rows["test", "accuracy, %"] == ("25.0", "25.0", "0.0")
    assert {"bits per byte", "perplexity"} <= {measure for _, measure in rows}


def kept(folder: RunFolder, kind: Kind, keep: Callable[[Record], object]) -> None:
    folder.replace(kind, *filter(keep, folder.read(kind)))


def test_routing_that_was_not_recorded_at_the_reported_step_is_said(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_lm_run(tmp_path, seed=seed)
        kept(folder, "routing", lambda line: line["source"] == "train" or line["step"] != STEPS[1])
    write_lm_run(tmp_path, "dense")
    found = read_runs([tmp_path])
    (warning,) = found.warnings
    assert warning.startswith("2 runs with no k and no costs") and "step 50" in warning
    assert "task.routing_every=1" in warning
    assert math.isnan(model_costs(found.runs)["DynMoE"].flops)


def test_sets_without_a_loss_are_not_reported_by_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "dense")
    records = folder.read("results")
    for record in records:
        del record["scores"]["0/in"]["loss"]
    folder.replace("results", *records)
    assert len(read_runs([tmp_path]).runs) == 1
    found = read_runs([tmp_path], by_loss=True)
    assert not found.runs
    (warning,) = found.warnings
    assert "no loss was recorded on 0/in" in warning and "leave --by-loss out" in warning
    assert "overwrite" not in warning


def test_a_finished_run_without_results_begins_again_by_overwrite(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    (folder.path / "results.jsonl").unlink()
    with pytest.raises(RecordError, match="overwrite=true"):
        read_run(folder)
    assert "overwrite=true" in read_runs([tmp_path]).warnings[0]
    (folder.path / "done").unlink()
    with pytest.raises(RecordError, match="start it again"):
        read_run(folder)


def test_the_page(sweep: Path, tmp_path: Path) -> None:
    files = page.write(read_runs([sweep]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert files and "beats" in text and "Scores by kind of question" not in text
    assert "Loss against cost" in text and "one test sample" not in text
