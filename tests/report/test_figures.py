"""Every figure that has something to show is drawn and no other, from records alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dynmoe.report.figures import draw_all
from dynmoe.report.records import RunFolder

ALL = ["accuracy.png", "experts.png", "k_per_layer.png", "load.png", "thresholds.png"]


def names(paths: list[Path]) -> list[str]:
    return sorted(path.name for path in paths)


def test_all_figures_of_an_adaptive_run(synthetic_run: RunFolder) -> None:
    paths = draw_all(synthetic_run)
    assert names(paths) == ALL
    for path in paths:
        assert path.parent == synthetic_run.path / "figures"
        with Image.open(path) as image:
            assert round(image.info["dpi"][0]) == 150
            # Blank paper has one colour.
            assert len(set(image.convert("L").tobytes())) > 50


@pytest.mark.parametrize(
    ("missing", "drawn"),
    [
        (["events"], ["accuracy.png", "k_per_layer.png", "load.png", "thresholds.png"]),
        (["events", "routing"], ["accuracy.png"]),
        (["events", "routing", "results"], []),
    ],
)
def test_nothing_is_drawn_of_records_that_are_not_there(
    synthetic_run: RunFolder, missing: list[str], drawn: list[str]
) -> None:
    for kind in missing:
        (synthetic_run.path / f"{kind}.jsonl").unlink()
    assert names(draw_all(synthetic_run)) == drawn


def test_a_router_without_thresholds_has_no_figure_of_them(synthetic_run: RunFolder) -> None:
    routing = [line | {"thresholds": None} for line in synthetic_run.read("routing")]
    synthetic_run.truncate_after(-1)
    synthetic_run.append("routing", *routing)
    assert names(draw_all(synthetic_run)) == ["k_per_layer.png", "load.png"]


def test_reports_need_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys, dynmoe.report.figures, dynmoe.report.render, dynmoe.report.tables;"
        "print({'torch', 'lightning', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (output.stdout, output.stderr) == ("set()\n", "")
