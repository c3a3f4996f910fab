"""Pictures show the numbers of the runs, worked out by hand, and are left out without any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sweeps import LAYERS, SELECTED, write_run, write_sweep

from dynmoe.records import Record, RunFolder
from dynmoe.report.claim import examine
from dynmoe.report.claim_figures import (
    ADAPTIVE,
    DENSE,
    GRID,
    VARYING,
    draw_accuracy_by_parameters,
    draw_accuracy_by_time,
    draw_claim,
    draw_curves,
)
from dynmoe.report.costs import Timing, Timings
from dynmoe.report.document import Picture
from dynmoe.report.drawing import Point, front, name_points, scatter, set_apart
from dynmoe.report.routing_figures import (
    draw_experts,
    draw_k,
    draw_k_by_position,
    draw_load_by_class,
    draw_load_by_environment,
    draw_overlap,
    experts_at,
    experts_over_steps,
    k_by_position,
    overlap,
)
from dynmoe.report.run import Run
from dynmoe.report.runs import read_runs

SWEEP = {
    "dense": {"0": [0.5, 0.5]},
    "top-1 of 2": {"0": [0.4, 0.5]},
    "top-2 of 4": {"0": [0.6, 0.8]},
    "DynMoE": {"0": [0.55, 0.65]},
}
DRAWINGS: list[Callable[[list[Run]], Picture | None]] = [
    draw_accuracy_by_parameters,
    draw_experts,
    draw_k,
    draw_k_by_position,
    draw_load_by_environment,
    draw_load_by_class,
    draw_overlap,
    draw_curves,
]


def runs_in(folder: Path) -> list[Run]:
    return read_runs([folder]).runs


def change_routing(folder: RunFolder, change: Callable[[Record], Record]) -> None:
    lines = [change(line) for line in folder.read("routing")]
    text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
    (folder.path / "routing.jsonl").write_text(text)


def figure_of(picture: Picture | None) -> Figure:
    assert picture is not None
    return picture.figure


def shades(axes: Axes) -> np.ndarray:
    (image,) = axes.images
    return np.asarray(image.get_array())


def ticks(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_overlap_is_the_common_share_of_two_loads() -> None:
    loads = [[10, 10, 0], [0, 30, 10], [0, 0, 5]]
    found = overlap([{"load": load} for load in loads])
    # Shares (1/2, 1/2, 0), (0, 3/4, 1/4), (0, 0, 1).
    assert found == pytest.approx(np.array([[1, 0.5, 0], [0.5, 1, 0.25], [0, 0.25, 1]]))


def test_the_picture_of_overlap_is_the_mean_over_runs(tmp_path: Path) -> None:
    loads = {"0": [1, 1], "15": [1, 0], "30": [0, 1], "train": [1, 1]}
    same = {source: [1, 1] for source in loads}
    for seed, load in enumerate((loads, same)):
        folder = write_run(tmp_path, "top-1 of 2", seed=seed)
        change_routing(folder, lambda line, load=load: line | {"load": load[line["source"]]})
    figure = figure_of(draw_overlap(runs_in(tmp_path)))
    assert [axes.get_title() for axes in figure.axes] == LAYERS
    expected = np.array([[1, 0.75, 0.75], [0.75, 1, 0.5], [0.75, 0.5, 1]])
    for axes in figure.axes:
        assert shades(axes) == pytest.approx(expected)
        assert ticks(axes) == ["0", "15", "30"]


def test_k_is_read_on_the_test_environment_at_the_reported_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "DynMoE", environment="15")

    def change(line: Record) -> Record:
        at_outcome = (line["step"], line["source"]) == (SELECTED, "15")
        found = {"mean_k": 3.0, "k_by_position": [1.0, 5.0]} if at_outcome else {}
        return line | found

    change_routing(folder, change)
    (run,) = runs_in(tmp_path)
    assert run.layers[0].k_test == 3.0
    assert k_by_position(run, LAYERS[1]).tolist() == [1.0, 5.0]
    (axes,) = figure_of(draw_k_by_position([run])).axes
    assert shades(axes).tolist() == [[1.0, 5.0], [1.0, 5.0]]
    assert [text.get_text() for text in axes.texts] == ["1.0", "5.0", "1.0", "5.0"]
    (axes,) = figure_of(draw_k([run])).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["mean k"]) == [3.0, 3.0]
    assert list(lines["living experts"]) == [4.0, 4.0]  # 2, and one more at each of two updates


def test_experts_over_steps_and_their_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_run(tmp_path, "DynMoE", seed=seed)
    (folder.path / "events.jsonl").write_text(
        '{"added": 2, "after": 5, "layer": "blocks.2.mlp", "removed": [], "step": 99}\n'
    )
    runs = runs_in(tmp_path)
    assert experts_over_steps(runs[0], LAYERS[0]) == ([0, 49, 99, 149, 150], [2, 3, 4, 5, 5])
    assert experts_over_steps(runs[1], LAYERS[0]) == ([0, 99, 150], [2, 5, 5])
    at = experts_at(np.array([0, 48, 49, 150]), *experts_over_steps(runs[0], LAYERS[0]))
    assert at.tolist() == [2, 2, 3, 5]
    axes = figure_of(draw_experts(runs)).axes[0]
    (mean,) = (line for line in axes.lines if line.get_label() == "living experts")
    assert list(mean.get_xdata()) == [0, 49, 99, 149, 150]
    assert list(mean.get_ydata()) == [2, 2.5, 4.5, 5, 5]
    assert list(axes.lines[-1].get_ydata()) == [8, 8]  # the slots of the pool


def test_load_is_a_share_of_the_rows_tokens(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "top-1 of 2", environment="15")

    def change(line: Record) -> Record:
        classes = [[1, 0], [1, 1]] if line["source"] == "0" else [[1, 0], [0, 1]]
        by_class = {} if line["source"] == "train" else {"load_by_class": classes}
        return line | {"load": [1, 3] if line["source"] == "15" else [1, 1]} | by_class

    change_routing(folder, change)
    runs = runs_in(tmp_path)
    axes = figure_of(draw_load_by_environment(runs)).axes[0]
    assert shades(axes).tolist() == [[50, 50], [25, 75], [50, 50]]
    assert ticks(axes) == ["0", "15 (test)", "30"]
    axes = figure_of(draw_load_by_class(runs)).axes[0]
    assert shades(axes).tolist() == [[100, 0], [25, 75]]
    assert ticks(axes) == ["odd", "even"]
    assert axes.get_title() == "top-1 of 2\nblocks.2.mlp"


def test_the_classes_that_differ_most_are_shown(tmp_path: Path) -> None:
    names = [str(index) for index in range(30)]
    folder = write_run(tmp_path, "top-1 of 2", facts={"class_names": names})
    load = [[0, 2] if index % 3 == 0 else [1, 1] for index in range(30)]
    change_routing(folder, lambda line: line | {"load_by_class": load})
    picture = draw_load_by_class(runs_in(tmp_path))
    assert picture is not None
    assert "the 20 of 30 classes whose rows differ most" in picture.caption
    rows = ticks(picture.figure.axes[0])
    assert len(rows) == 20 and set(rows) >= {str(index) for index in range(0, 30, 3)}


def test_the_claim_has_a_row_for_each_rival(tmp_path: Path) -> None:
    collection = read_runs([write_sweep(tmp_path, SWEEP)])
    (claim,) = examine(collection, collection.problems[0])
    figure = figure_of(draw_claim(claim))
    (axes,) = figure.axes
    assert ticks(axes) == [
        "mean of the grid",
        "dense",
        "top-1 of 2, worst",
        "top-2 of 4, best",
    ]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "."]
    assert [list(each) for each in dots] == [
        pytest.approx(each) for each in ([5, 0], [5, 15], [15, 15], [-5, -15])
    ]
    points = [line for line in axes.lines if line.get_marker() not in ("None", ".")]
    means = [float(line.get_xdata()[0]) for line in points]
    assert means == pytest.approx([2.5, 10, 15, -10])
    assert [line.get_marker() for line in points] == ["x"] * 4  # two repetitions prove nothing
    assert axes.get_xlabel() == "DynMoE minus it: accuracy, percentage points (n = 2)"
    assert "no verdict: two repetitions prove nothing" in " ".join(figure.get_suptitle().split())


def test_marks_of_the_claim_are_by_the_corrected_verdict(tmp_path: Path) -> None:
    """In black and white too: not significant is open, above points up, below points down."""
    accuracies = {
        "top-1 of 2": [0.39, 0.4, 0.41],
        "top-2 of 4": [0.795, 0.8, 0.815],
        "dense": [0.3, 0.6, 0.9],
        "DynMoE": [0.6, 0.6, 0.6],
    }
    sweep = {name: {"0": values} for name, values in accuracies.items()}
    collection = read_runs([write_sweep(tmp_path, sweep)])
    (claim,) = examine(collection, collection.problems[0])
    figure = figure_of(draw_claim(claim))
    marks = [line.get_marker() for line in figure.axes[0].lines]
    assert [mark for mark in marks if mark not in ("None", ".")] == ["o", "o", "^", "v"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["better", "not significantly different", "worse"]


def test_no_two_families_have_one_mark() -> None:
    """A shape comes again only with another filling, whatever the colour."""
    looks = [DENSE, *ADAPTIVE, *VARYING, *GRID]
    keys = ("marker", "markerfacecolor", "fillstyle")
    marks = [tuple(look.get(key) for key in keys) for look in looks]
    assert len(set(marks)) == len(marks) > 40
    lines = [(look["color"], look["linestyle"]) for look in (*ADAPTIVE, *VARYING)]
    assert len(set(lines[:9])) == 9 and len(set(lines[9:])) == 24


def test_accuracy_against_activated_parameters(tmp_path: Path) -> None:
    (axes,) = figure_of(draw_accuracy_by_parameters(runs_in(write_sweep(tmp_path, SWEEP)))).axes
    points = {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6)): line.get_marker()
        for line in axes.lines
        if line.get_marker() != "None"
    }
    # Per layer: 1 + 10 for each expert + 100 for each activated one; DynMoE's k are 1.5 and 2.
    fixed = {(1000 + 2 * (1 + 20 + 100), 45.0): "o", (1000 + 2 * (1 + 40 + 200), 70.0): "o"}
    dense = {(1000, 50.0): "s"}
    assert points == dense | fixed | {(1000 + 2 * (1 + 40) + 150 + 200, 60.0): "D"}
    assert sorted(text.get_text() for text in axes.texts) == sorted(SWEEP)
    assert axes.get_ylabel() == "accuracy on test environment 0, %"
    best = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert list(best.get_xdata()) == [1000, 1432, 1432, 1482, 1482, 1482]
    assert list(best.get_ydata()) == pytest.approx([50, 50, 60, 60, 70, 70])


def test_accuracy_against_time_shows_what_was_measured(tmp_path: Path) -> None:
    runs = runs_in(write_sweep(tmp_path, SWEEP))
    timing = Timing(20.0, (19.0, 22.0), 400.0, (390.0, 410.0), None, False)
    timings = Timings({("dense", "train"): timing, ("DynMoE", "train"): timing}, "cpu X", "")
    picture = draw_accuracy_by_time(runs, timings)
    (axes,) = figure_of(picture).axes
    assert axes.get_xlabel() == "training step, ms"
    assert [text.get_text() for text in axes.texts] == ["dense", "DynMoE"]
    assert picture is not None and "interleaved: cpu X." in picture.caption
    refused = Timings({}, "", "measured under different conditions: cpu (X, Y)")
    assert draw_accuracy_by_time(runs, refused) is None


def test_front_keeps_what_nothing_beats_in_both() -> None:
    style = {"color": "black", "marker": "o"}
    places = {"a": (1, 1), "b": (2, 3), "c": (2, 2), "d": (3, 3), "e": (4, 5)}
    points = [Point(name, x, y, 0, style) for name, (x, y) in places.items()]
    assert [point.name for point in front(points)] == ["a", "b", "e"]
    assert [point.name for point in front(points, more_is_better=True)] == ["e"]


def test_points_of_almost_the_same_x_are_set_apart() -> None:
    places = {"a": (0, 5), "b": (500, 3), "c": (500, 4), "d": (501, 9), "e": (1000, 1)}
    points = [Point(name, x, y, 0.1, {}) for name, (x, y) in places.items()]
    moved = set_apart(points)
    assert [(point.name, point.x) for point in moved] == [
        *(("a", 0), ("c", 488.5), ("b", 500.5), ("d", 512.5), ("e", 1000))
    ]
    assert [p.name for p in front(moved)] == [p.name for p in front(points)]
    assert set_apart(points[:1]) == points[:1]


def test_names_with_dollar_signs_are_no_mathematics(tmp_path: Path) -> None:
    names = {"env_names": [r"$\frac{$", "15", "30"], "class_names": ["$_", "$^$"]}
    runs = runs_in(write_sweep(tmp_path / "sweep", {"DynMoE": {"0": [0.5]}}, facts=names))
    for draw in (draw_load_by_class, draw_overlap, draw_curves):
        picture = draw(runs)
        assert picture is not None
        picture.figure.draw_without_rendering()
    figure = Figure()
    axes = figure.subplots()
    points = [
        Point(r"$\frac{$", 0, 0, 0.1, {"color": "black"}),
        Point("b", 1, 1, 0.1, {"color": "k"}),
    ]
    scatter(axes, points)
    name_points(axes, points)


def test_names_of_points_do_not_cover_one_another() -> None:
    style = {"color": "black", "marker": "o"}
    points = [Point(f"top-{n} of 8", 10 + n % 3, 5 + n // 3, 0.1, style) for n in range(9)]
    points += [Point("beside", 10.02, 5.02, 0.1, style)]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    scatter(axes, points)
    name_points(axes, points)
    figure.draw_without_rendering()
    extents = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    for index, extent in enumerate(extents):
        assert extent.count_overlaps(extents[:index]) == 0
        assert axes.bbox.containsx(extent.x0) and axes.bbox.containsx(extent.x1)


def test_curves_are_means_over_seeds_with_a_panel_for_each_environment(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"dense": {"0": [0.2, 0.4], "15": [0.5]}, "DynMoE": {"0": [0.5]}})
    picture = draw_curves(runs_in(tmp_path))
    figure = figure_of(picture)
    assert [axes.get_title() for axes in figure.axes] == [
        "test environment 0",
        "test environment 15",
    ]
    dense, marker = figure.axes[0].lines[:2]
    assert list(dense.get_xdata()) == [0, 50, 100, 150]
    assert dense.get_ydata() == pytest.approx([0.31, 0.31, 0.3, 0.31])
    assert (marker.get_marker(), list(marker.get_xdata())) == ("s", [SELECTED])
    assert list(marker.get_ydata()) == pytest.approx([0.3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "DynMoE"]


@pytest.mark.filterwarnings("error")
def test_steps_without_a_number_are_no_part_of_a_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "dense", 0.4)
    first, *others = folder.read("results")
    first["scores"]["0/in"]["accuracy"] = math.nan
    lines = [json.dumps(line) + "\n" for line in (first, *others)]
    (folder.path / "results.jsonl").write_text("".join(lines))
    dense = figure_of(draw_curves(runs_in(tmp_path))).axes[0].lines[0]
    assert list(dense.get_xdata()) == [50, 100, 150]


def test_a_dense_run_has_no_picture_of_routing(tmp_path: Path) -> None:
    write_run(tmp_path, "dense")
    runs = runs_in(tmp_path)
    drawn = [picture.name for draw in DRAWINGS if (picture := draw(runs)) is not None]
    assert drawn == ["accuracy_by_parameters", "curves"]


def test_details_that_were_not_recorded_have_no_picture(tmp_path: Path) -> None:
    new = ("k_by_position", "load_by_class")
    for setting in ("DynMoE", "top-1 of 2"):
        folder = write_run(tmp_path, setting)
        change_routing(folder, lambda line: {k: v for k, v in line.items() if k not in new})
    runs = runs_in(tmp_path)
    drawn = [picture.name for draw in DRAWINGS if (picture := draw(runs)) is not None]
    others = ["experts", "k_by_layer", "load_by_environment", "overlap", "curves"]
    assert drawn == ["accuracy_by_parameters", *others]


def test_every_picture_says_how_to_read_it(tmp_path: Path) -> None:
    runs = runs_in(write_sweep(tmp_path, SWEEP))
    pictures = [draw(runs) for draw in DRAWINGS]
    for picture in pictures:
        assert picture is not None and picture.alt and picture.caption.endswith(".")
        width, height = picture.figure.get_size_inches()
        assert width < 9 and math.isfinite(height)
