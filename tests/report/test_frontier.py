"""Settings that decide their k beside fixed ones that cost no more; power; reports by the loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import nct, t, ttest_1samp
from sweeps import write_run, write_sweep

from dynmoe.report.claim import examine
from dynmoe.report.costs import model_costs
from dynmoe.report.frontier import frontier_table, power_sentence, stands
from dynmoe.report.paired import LEVEL, POWER, detectable
from dynmoe.report.runs import read_runs
from dynmoe.report.tables import Strong

# top-2 of 4 is best and as dear as ReMoE at k 2; top-4 of 8 is better still, and dearer.
ACCURACIES = {
    "dense": [0.50, 0.51, 0.52, 0.50],
    "top-1 of 2": [0.40, 0.42, 0.43, 0.41],
    "top-2 of 4": [0.60, 0.62, 0.63, 0.61],
    "top-4 of 8": [0.80, 0.82, 0.83, 0.81],
    "ReMoE": [0.55, 0.56, 0.59, 0.56],
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, {name: {"0": values} for name, values in ACCURACIES.items()})
    for seed in range(4):
        write_run(folder, "DynMoE", 0.7 + 0.01 * (seed % 2), seed=seed, mean_k=1.0)
    return folder


def test_rivals_cost_no_more(sweep: Path) -> None:
    collection = read_runs([sweep])
    found = {each.setting: each for each in stands(collection, collection.problems[0])}
    assert found.keys() == {"ReMoE", "DynMoE"}
    remoe = found["ReMoE"]
    assert remoe.tests.keys() == {"dense", "top-1 of 2", "top-2 of 4"}
    assert remoe.best == "top-2 of 4"
    assert remoe.better == ["top-2 of 4"]
    test = remoe.tests["top-2 of 4"]
    assert test.family == 3
    known = ttest_1samp(np.subtract(ACCURACIES["ReMoE"], ACCURACIES["top-2 of 4"]), 0)
    assert test.p == pytest.approx(known.pvalue)
    assert not found["DynMoE"].better


def test_the_table_names_the_best_and_counts_the_better(sweep: Path) -> None:
    collection = read_runs([sweep])
    table = frontier_table(collection, collection.problems[0])
    assert table is not None
    rows = {row[0]: row for row in table.rows}
    assert rows["ReMoE"][4] == "top-2 of 4"
    assert rows["ReMoE"][-2:] == ("1 of 3", "4")
    assert isinstance(rows["ReMoE"][5], Strong)
    assert float(rows["DynMoE"][2]) < float(rows["ReMoE"][2])
    assert power_sentence(collection.runs) in table.note


def test_the_unit_of_flops_is_named(tmp_path: Path) -> None:
    """Of several dense settings it is the cheapest; without one, the cheapest of all."""
    write_sweep(tmp_path, {name: {"0": ACCURACIES[name]} for name in ("top-1 of 2", "ReMoE")})
    collection = read_runs([tmp_path])
    table = frontier_table(collection, collection.problems[0])
    assert table is not None and table.columns[2] == "FLOPs, x top-1 of 2"
    assert [row[2] for row in table.rows] == [
        "1.25"
    ]  # 5000 + 8 x (1.5 x 200 + 162) over 5000 + 8 x (200 + 42)

    for depth, other in ((2, 8000), (1, 5000)):
        moe_free = {"parameters": {"other": 1, "layers": {}}, "slots": {}}
        costs = {**moe_free, "flops": {"other": other, "layers": {}}}
        for seed, accuracy in enumerate(ACCURACIES["dense"]):
            options = {"config": {"backbone.depth": depth}, "facts": {"costs": costs}}
            write_run(tmp_path, "dense", accuracy, seed=seed, **options)
    collection = read_runs([tmp_path])
    table = frontier_table(collection, collection.problems[0])
    assert table is not None and table.columns[2] == "FLOPs, x dense, backbone.depth=1"
    assert "over those of dense, backbone.depth=1" in table.note
    costs_of = model_costs(collection.runs)
    assert table.rows[0][2] == f"{costs_of['ReMoE'].flops / 5000:.2f}"


def test_no_table_without_rivals(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"ReMoE": {"0": [0.5, 0.6, 0.7]}, "top-4 of 8": {"0": [0.5, 0.6, 0.7]}})
    collection = read_runs([tmp_path])
    assert frontier_table(collection, collection.problems[0]) is None


def test_rivals_that_lack_repetitions_are_named(tmp_path: Path) -> None:
    accuracies = {name: values for name, values in ACCURACIES.items() if name != "top-4 of 8"}
    accuracies["top-2 of 4"] = [0.9]
    write_sweep(tmp_path, {name: {"0": values} for name, values in accuracies.items()})
    collection = read_runs([tmp_path])
    table = frontier_table(collection, collection.problems[0])
    assert table is not None
    assert "Left out, since they lack repetitions: top-2 of 4." in table.note


def test_two_repetitions_count_no_rival_as_worse(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"dense": {"0": [0.9, 0.91]}, "ReMoE": {"0": [0.3, 0.32]}})
    collection = read_runs([tmp_path])
    table = frontier_table(collection, collection.problems[0])
    assert table is not None and table.rows[0][-2:] == ("-", "2")


def test_no_row_without_a_common_repetition(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "dense", 0.5 + seed / 100, seed=seed)
        write_run(tmp_path, "ReMoE", 0.5, seed=seed + 3)
    collection = read_runs([tmp_path])
    assert frontier_table(collection, collection.problems[0]) is None


@pytest.mark.parametrize("count", [3, 5, 10, 30])
def test_power_of_the_smallest_difference(count: int) -> None:
    shift = detectable(0.2, count) / (0.2 / count**0.5)
    critical = t.ppf(1 - LEVEL / 2, count - 1)
    assert 1 - nct.cdf(critical, count - 1, shift) == pytest.approx(POWER, abs=1e-6)


def test_spread_is_of_differences_without_what_all_settings_share(tmp_path: Path) -> None:
    # Seeds move both settings by 0.1; their differences are 0.02 and 0.05 by turns.
    by_seed = [0.5, 0.6, 0.7, 0.8]
    other = [value + gap for value, gap in zip(by_seed, [0.02, 0.05, 0.02, 0.05], strict=True)]
    write_sweep(tmp_path, {"top-1 of 2": {"0": by_seed}, "top-2 of 4": {"0": other}})
    runs = read_runs([tmp_path]).runs
    spread = float(np.std([0.02, 0.05, 0.02, 0.05], ddof=1))
    assert f"standard deviation of {100 * spread:.1f} points" in power_sentence(runs)
    assert f"{100 * detectable(spread, 4):.1f} by 4 repetitions" in power_sentence(runs)


def test_a_report_by_the_loss(tmp_path: Path) -> None:
    for setting, worse in {"top-2 of 4": 0.0, "DynMoE": 0.1}.items():
        for seed, loss in enumerate((1.0, 1.3, 1.1)):
            folder = write_run(tmp_path, setting, 0.5 + worse, seed=seed)
            file = folder.path / "results.jsonl"
            records = [json.loads(line) for line in file.read_text().splitlines()]
            for record in records:
                # Selected by the accuracy is the second, by the loss the first.
                first = record is records[0]
                for scores in record["scores"].values():
                    scores["loss"] = loss * (1 + worse * (1 + seed / 10)) + (0 if first else 0.5)
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
    collection = read_runs([tmp_path], by_loss=True)
    (claim,) = examine(collection, collection.problems[0])
    assert claim.words.column == "loss, nats"
    assert claim.overall.accuracies == pytest.approx((1.1, 1.3 * 1.11, 1.1 * 1.12))
    (best,) = claim.overall.against("best")
    assert best.verdict == "is below"
    (usual,) = examine(read_runs([tmp_path]), collection.problems[0])
    assert usual.words.measure == "accuracy"
    assert usual.overall.accuracies == (0.6, 0.6, 0.6)
