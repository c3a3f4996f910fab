"""The summary and figures of a language run: scores of evaluation sets, epochs, early stops."""

from __future__ import annotations

from pathlib import Path

import pytest
from language_runs import write_language_run

from dynmoe.records import RunFolder
from dynmoe.report.figures import draw_scores
from dynmoe.report.run import read_run
from dynmoe.report.summary import to_markdown


def shown(folder: RunFolder) -> str:
    return to_markdown(read_run(folder))


def test_a_score_and_the_metrics_that_it_is_the_mean_of(tmp_path: Path) -> None:
    text = shown(write_language_run(tmp_path, dataset="MRPC"))
    assert text.startswith(
        "# DynMoE on MRPC, evaluation set dev\n\nProtocol glue, selection best score on dev, "
    )
    assert (
        "## Scores at the selected step, 100 of 151 (epoch 2.0)\n\n"
        "| evaluation set | mean of accuracy and F1, % | accuracy | F1 | loss |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| dev (reported) | **70.0** | 68.0 | 72.0 | 1.5000 |\n"
    ) in text
    assert "mean k, dev" in text and "(at the mean k on dev)" in text
    assert "- length: 40.5 tokens per example, on average" in text
    assert "unfinished" not in text and "stopped early" not in text


def test_the_held_out_set_selects_and_dev_is_reported(tmp_path: Path) -> None:
    folder = write_language_run(
        tmp_path,
        dataset="CoLA",
        dev=(0.9, -0.125, 0.2, 0.3),
        heldout=(0.1, 0.4, 0.2, 0.1),
        others=["ood"],
    )
    run = read_run(folder)
    assert (run.outcome.step, run.outcome.validation) == (50, 0.4)
    assert (
        "| evaluation set | Matthews correlation, x 100 | loss |\n"
        "| --- | ---: | ---: |\n"
        "| dev (reported) | **-12.5** | 1.5000 |\n"
        "| ood | -22.5 | 1.5000 |\n"
        "| heldout (selects) | 40.0 | 1.5000 |\n"
    ) in to_markdown(run)


def test_a_baseline_is_named_beside_the_score(tmp_path: Path) -> None:
    scores = {"dev": {"score": 0.55}}
    baseline = {"name": "TF-IDF + logistic regression", "scores": scores}
    folder = write_language_run(tmp_path, facts={"baseline": baseline})
    assert "TF-IDF + logistic regression: 55.0 % on dev\n" in shown(folder)


def test_a_run_that_patience_ended_is_not_unfinished(tmp_path: Path) -> None:
    facts = {"steps": 300, "patience": 2}
    early = shown(write_language_run(tmp_path, facts=facts, stopped_early=True))
    assert "- stopped early: after 151 of 300 steps (patience 2)\n" in early
    running = shown(write_language_run(tmp_path, facts=facts))
    assert "- unfinished: 151 of 300 steps are recorded\n" in running


def test_the_figure_of_scores_has_epochs_and_every_set(tmp_path: Path) -> None:
    folder = write_language_run(tmp_path, dataset="MNLI", others=["mismatched"])
    figure = draw_scores(read_run(folder))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["dev (reported, selects)", "mismatched", "selected step (100)"]
    assert figure.axes[0].get_ylabel() == "accuracy, %"
    epochs = figure.axes[0].child_axes[0]
    assert epochs.get_xlabel() == "epoch"
    figure.draw_without_rendering()
    ends = zip(figure.axes[0].get_xlim(), epochs.get_xlim(), strict=True)
    for step, epoch in ends:  # the first epoch, of 50 steps, is over after step 49
        assert epoch == pytest.approx((step + 1) / 50)


def test_one_evaluation_is_a_point(tmp_path: Path) -> None:
    axes = draw_scores(read_run(write_language_run(tmp_path, dev=(0.5,)))).axes[0]
    (curve,) = axes.lines
    assert (curve.get_marker(), curve.get_xydata().tolist()) == ("o", [[0, 50]])
    assert axes.get_xlim()[0] == 0
