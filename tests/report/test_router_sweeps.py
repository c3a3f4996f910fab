"""Routers that decide how many experts a token activates, beside fixed mixtures and dense."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from sweeps import write_run, write_sweep

from dynmoe.report.claim import examine
from dynmoe.report.claim_figures import draw_accuracy_by_experts, draw_curves, family
from dynmoe.report.claim_tables import title_of
from dynmoe.report.cost_tables import router_table
from dynmoe.report.costs import Timings, search_cost
from dynmoe.report.page import build
from dynmoe.report.routing_figures import draw_budget
from dynmoe.report.runs import Collection, read_runs

ONE, TWO = (f"ReMoE, moe.router.target_k={k}" for k in (1.0, 2.0))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """A router that misses the lower of its two targets by 20 %."""
    folder = tmp_path_factory.mktemp("zoo")
    fixed = {"dense": [0.5, 0.5], "top-2 of 4": [0.5, 0.6], "DynMoE": [0.4, 0.5]}
    write_sweep(folder, {name: {"0": found} for name, found in fixed.items()})
    for seed, k in enumerate((1.1, 1.3)):
        for target, accuracy, mean_k in ((1.0, 0.4, k), (2.0, 0.7, 2.0)):
            config = {"moe.router.target_k": target}
            write_run(folder, "ReMoE", accuracy, seed=seed, config=config, mean_k=mean_k)
    return read_runs([folder])


def points(axes: Axes) -> set[tuple[float, float]]:
    marked = [line for line in axes.lines if line.get_marker() not in ("None", None)]
    return {
        (round(float(x), 6), round(float(y), 6)) for x, y in (m.get_xydata()[0] for m in marked)
    }


def test_every_router_stands_at_the_experts_it_activates(zoo: Collection) -> None:
    picture = draw_accuracy_by_experts(zoo.runs, Timings({}, "", ""))
    assert picture is not None
    by_k, by_flops = picture.figure.axes
    # Dense has no k: a line at its accuracy, with its mark at the edge.
    assert points(by_k) == {(1.2, 40.0), (2.0, 70.0), (2.0, 55.0), (1.75, 45.0), (1, 50.0)}
    assert [50.0, 50.0] in [list(line.get_ydata()) for line in by_k.lines]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in by_k.lines]
    assert ([pytest.approx(1.1), pytest.approx(1.3)], [40.0, 40.0]) in drawn  # both runs
    assert ([pytest.approx(1.2), 2.0], [pytest.approx(40), pytest.approx(70)]) in drawn  # joined
    # 5000, and of two layers of 4 tokens 2 + 20 for each expert + 200 for each activated one.
    flops = 5000 + 2 * 4 * (2 + 8 * 20 + 2 * 200)
    assert (flops, 70.0) in points(by_flops) and (5000, 50.0) in points(by_flops)
    names = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert names == ["ReMoE", "top-2 of 4", "dense", "DynMoE"]


def test_the_title_names_a_router_once(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"top-2 of 4": {"0": [0.5]}})
    for target in (1.0, 2.0):
        write_run(tmp_path, "DynMoE", 0.5, config={"moe.router.target_k": target})
    collection = read_runs([tmp_path])
    assert len(dict.fromkeys(run.setting for run in collection.runs)) == 3
    assert title_of(collection) == "DynMoE against fixed experts and k: RotatedDigits"


def test_a_budget_is_shown_over_training_as_a_share_of_the_target(zoo: Collection) -> None:
    picture = draw_budget(zoo.runs)
    assert picture is not None
    (axes,) = picture.figure.axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert curves[ONE] == pytest.approx([1.2] * 4) and curves[TWO] == pytest.approx([1.0] * 4)


def test_the_table_says_how_far_k_is_from_its_target(zoo: Collection) -> None:
    table = router_table(zoo.runs)
    assert table is not None
    rows = {row[0]: row[1:5] for row in table.rows}
    assert rows[ONE] == ("1", "1.2", "+20.0", "1.2") and rows[TWO] == ("2", "2", "+0.0", "2")
    assert rows["top-2 of 4"] == ("-", "2", "-", "2") and "dense" not in rows


def test_the_grid_is_of_fixed_k_alone(zoo: Collection) -> None:
    (claim,) = examine(zoo, zoo.problems[0])
    assert [each.setting for each in claim.overall.against("grid")] == ["top-2 of 4"]
    assert search_cost(zoo, zoo.problems[0], "DynMoE", {}).grid_settings == 1
    picture = draw_curves(zoo.runs)
    assert picture is not None and "Thin coloured lines" in picture.caption


def test_the_picture_is_the_first_of_the_report(zoo: Collection, tmp_path: Path) -> None:
    assert [section.name for section in build(zoo).sections][:2] == ["routers", "claim"]
    others = read_runs([write_sweep(tmp_path, {"top-1 of 2": {"0": [0.5]}})])
    assert build(others).sections[0].name == "claim"
    assert draw_accuracy_by_experts(others.runs, Timings({}, "", "")) is None


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("top-2 of 8", "top-k of 8"),
        ("GMoE top-1 of 6, seed=1", "GMoE top-k of 6, seed=1"),
        (TWO, "ReMoE"),
        ("AdaMoE, moe.router.target_k=[1, 2], task.steps=9", "AdaMoE, task.steps=9"),
        ("MoE++, moe.router.top_k=2", "MoE++"),
        ("DynMoE", "DynMoE"),
    ],
)
def test_settings_of_a_family_differ_in_k_alone(setting: str, name: str) -> None:
    assert family(setting) == name
