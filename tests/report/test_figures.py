"""Every figure that has something to show is drawn and no other, from records alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from dynmoe.records import RunFolder
from dynmoe.report.figures import draw_all, draw_k_over_steps, draw_scores
from dynmoe.report.run import read_run

ALL = ["experts.png", "k_per_layer.png", "load.png", "scores.png", "thresholds.png"]


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def test_all_figures_of_an_adaptive_run(synthetic_run: RunFolder) -> None:
    paths = draw_all(read_run(synthetic_run))
    assert names(paths) == ALL
    for path in paths:
        assert path.parent == synthetic_run.path / "figures"
        with Image.open(path) as image:
            assert round(image.info["dpi"][0]) == 150
            # Blank paper has one colour.
            assert len(set(image.convert("L").tobytes())) > 50


def test_a_name_with_dollar_signs_is_no_mathematics(synthetic_run: RunFolder) -> None:
    name = r"$\\frac{$"
    for file in ("run.json", "results.jsonl", "routing.jsonl"):
        text = (synthetic_run.path / file).read_text()
        text = text.replace('"0"', f'"{name}"').replace('"0/', f'"{name}/')
        (synthetic_run.path / file).write_text(text)
    assert names(draw_all(read_run(synthetic_run))) == ALL


@pytest.mark.parametrize(
    ("missing", "drawn"),
    [
        (["events"], ["k_per_layer.png", "load.png", "scores.png", "thresholds.png"]),
        (["events", "routing"], ["scores.png"]),
    ],
)
def test_nothing_is_drawn_of_records_that_are_not_there(
    synthetic_run: RunFolder, missing: list[str], drawn: list[str]
) -> None:
    for kind in missing:
        (synthetic_run.path / f"{kind}.jsonl").unlink()
    assert names(draw_all(read_run(synthetic_run))) == drawn


@pytest.mark.parametrize("recorded", [{"thresholds": None}, {"bias": 0.5}])
def test_a_router_without_thresholds_has_no_figure_of_them(
    synthetic_run: RunFolder, recorded: dict[str, object]
) -> None:
    lines = synthetic_run.read("routing")
    for line in lines:
        del line["thresholds"]
    routing = [line | recorded for line in lines]
    (synthetic_run.path / "routing.jsonl").unlink()
    synthetic_run.append("routing", *routing)
    expected = [name for name in ALL if name != "thresholds.png"]
    assert names(draw_all(read_run(synthetic_run))) == expected


def test_short_runs_have_whole_steps_and_the_title_names_the_protocol(
    synthetic_run: RunFolder,
) -> None:
    results = [line | {"step": step} for step, line in enumerate(synthetic_run.read("results")[:3])]
    for count in (1, 3):
        run = replace(read_run(synthetic_run), results=results[:count])
        axes = draw_scores(run).axes[0]
        assert axes.get_title() == "DynMoE on RotatedDigits, protocol domainbed"
        assert all(tick == round(tick) for tick in axes.get_xticks())


def test_layers_are_listed_from_the_first_down(synthetic_run: RunFolder) -> None:
    training = [line for line in synthetic_run.read("routing") if line["source"] == "train"]
    figure = draw_k_over_steps(read_run(synthetic_run), training)
    layers = ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == layers
    heat_map = figure.axes[1]
    assert [text.get_text() for text in heat_map.get_yticklabels()] == layers
    bottom, top = heat_map.get_ylim()
    assert bottom > top


def test_reports_need_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, dynmoe.report.figures, dynmoe.report.summary, dynmoe.report.tables;"
        "print({'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (output.stdout, output.stderr) == ("set()\n", "")
