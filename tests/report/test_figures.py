"""Every figure that has something to show is drawn and no other, from records alone."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from synthetic_run import ENVIRONMENTS, write_synthetic_run

from dynmoe.records import RunFolder
from dynmoe.report.figures import draw_all, draw_k_over_steps, draw_loss, draw_scores, figures_of
from dynmoe.report.run import Run, read_run

ALL = ["experts", "k_per_layer", "load", "loss", "scores", "thresholds"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("figures") / "run"
    return read_run(write_synthetic_run(folder, layers=2, max_experts=40))


def changed(run: Run, folder: Path, change: Callable[[RunFolder], object]) -> Run:
    """A copy of a run whose files were changed."""
    shutil.copytree(run.folder.path, folder)
    change(RunFolder(folder))
    return read_run(RunFolder(folder))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def curves(figure: Figure) -> list[Line2D]:
    return list(figure.axes[0].lines)


def test_all_figures_of_an_adaptive_run(run: Run) -> None:
    paths = draw_all(run)
    assert sorted(path.stem for path in paths) == ALL
    for path in paths:
        assert path.parent == run.folder.path / "figures"
        with Image.open(path) as image:
            assert round(image.info["dpi"][0]) == 150
            # Blank paper has one colour.
            assert len(set(image.convert("L").tobytes())) > 50


def test_a_name_with_dollar_signs_is_no_mathematics(run: Run, tmp_path: Path) -> None:
    name = r"$\\frac{$"

    def rename(folder: RunFolder) -> None:
        for file in ("run.json", "results.jsonl", "routing.jsonl"):
            text = (folder.path / file).read_text()
            text = text.replace('"0"', f'"{name}"').replace('"0/', f'"{name}/')
            (folder.path / file).write_text(text)

    figures = figures_of(changed(run, tmp_path / "run", rename))
    assert sorted(figures) == ALL
    for each in ("scores", "load"):
        figures[each].draw_without_rendering()


@pytest.mark.parametrize(
    ("missing", "drawn"),
    [
        (["events"], ["k_per_layer", "load", "loss", "scores", "thresholds"]),
        (["events", "routing"], ["loss", "scores"]),
    ],
)
def test_nothing_is_drawn_of_records_that_are_not_there(
    run: Run, tmp_path: Path, missing: list[str], drawn: list[str]
) -> None:
    def remove(folder: RunFolder) -> None:
        for kind in missing:
            (folder.path / f"{kind}.jsonl").unlink()

    assert sorted(figures_of(changed(run, tmp_path / "run", remove))) == drawn


@pytest.mark.parametrize("recorded", [{"thresholds": None}, {"bias": 0.5}])
def test_a_router_without_thresholds_has_no_figure_of_them(
    run: Run, tmp_path: Path, recorded: dict[str, object]
) -> None:
    def forget(folder: RunFolder) -> None:
        lines = folder.read("routing")
        for line in lines:
            del line["thresholds"]
        (folder.path / "routing.jsonl").unlink()
        folder.append("routing", *[line | recorded for line in lines])

    expected = [name for name in ALL if name != "thresholds"]
    assert sorted(figures_of(changed(run, tmp_path / "run", forget))) == expected


def test_short_runs_have_whole_steps(run: Run) -> None:
    results = [line | {"step": step} for step, line in enumerate(run.results[:3])]
    for count in (1, 3):
        axes = draw_scores(replace(run, results=results[:count])).axes[0]
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_scores_show_what_selects_and_what_is_reported(run: Run) -> None:
    figure = draw_scores(run)
    step, score = run.outcome.step, 100 * run.outcome.accuracy
    assert " ".join(figure.get_suptitle().split()) == (
        f"DynMoE on RotatedDigits, protocol domainbed: {score:.1f} % on 0/in at step {step}, "
        "chosen by training-domain validation"
    )
    assert legend(figure)[:3] == ["validation (selects)", "0/in (reported)", "0 (test)"]
    assert legend(figure)[-2] == f"selected step ({step})"
    validation, reported = curves(figure)[:2]
    at = list(validation.get_xdata()).index(step)
    # The mean over the out splits of the five training environments, at its highest.
    outs = [run.reported["scores"][f"{name}/out"]["accuracy"] for name in ENVIRONMENTS[1:]]
    assert validation.get_ydata()[at] == pytest.approx(100 * sum(outs) / 5)
    assert max(validation.get_ydata()) == validation.get_ydata()[at]
    assert reported.get_ydata()[at] == pytest.approx(score)
    assert validation.get_linewidth() == reported.get_linewidth() > 2
    assert {line.get_color() for line in curves(figure)[1:3]} == {"black"}


def test_losses_of_training_and_of_every_set(run: Run) -> None:
    figure = draw_loss(run)
    assert figure is not None
    training, reported = curves(figure)[:2]
    assert list(training.get_ydata()) == [record["loss"] for record in run.results]
    scores = [record["scores"]["0/in"]["loss"] for record in run.results]
    assert list(reported.get_ydata()) == scores
    assert legend(figure)[0].startswith("training") and "75" in legend(figure)
    assert figure.axes[0].get_yscale() == "linear"


def test_a_loss_that_was_not_finite_is_marked(run: Run) -> None:
    last = run.results[-1] | {"loss": math.nan, "nonfinite_step": 390}
    steep = [record | {"loss": 10.0**-n} for n, record in enumerate(run.results[:-1])]
    figure = draw_loss(replace(run, results=[*steep, last]))
    assert figure is not None
    assert "not finite (step 390)" in legend(figure)
    assert figure.axes[0].get_yscale() == "log"
    nothing = [record | {"loss": None} for record in run.results]
    assert draw_loss(replace(run, results=nothing)) is None


def test_thresholds_of_many_slots_have_looks_and_names_of_their_own(run: Run) -> None:
    figure = figures_of(run)["thresholds"]
    slots = {slot for line in run.training_routing for slot in line["slots"]}
    assert legend(figure) == [str(slot) for slot in sorted(slots)]
    looks = {(line.get_color(), line.get_linestyle()) for line in curves(figure)}
    assert len(slots) > 14 and len(looks) == len(slots)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert all(not box.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_experts_end_with_the_run_below_the_pool(run: Run) -> None:
    figure = figures_of(run)["experts"]
    for axes, layer in zip(figure.axes, run.layers, strict=True):
        steps = [line.get_xdata() for line in axes.lines if line.get_label() == "living experts"]
        (end,) = (line for line in axes.lines if line.get_marker() == "o")
        (pool,) = (line for line in axes.lines if line.get_label() == "slots of the pool")
        assert max(steps[0]) == run.results[-1]["step"]
        assert list(end.get_ydata()) == [layer.end]
        assert list(pool.get_ydata()) == [40, 40]


def test_layers_are_listed_from_the_first_down(run: Run) -> None:
    figure = draw_k_over_steps(run, run.training_routing)
    layers = ["blocks.0.mlp", "blocks.1.mlp"]
    assert legend(figure) == layers
    heat_map = figure.axes[1]
    assert [text.get_text() for text in heat_map.get_yticklabels()] == layers
    bottom, top = heat_map.get_ylim()
    assert bottom > top
