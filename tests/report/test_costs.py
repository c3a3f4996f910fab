"""Costs worked out by hand from the round sizes of `sweeps`, and what may not be compared."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from sweeps import write_run, write_sweep

from dynmoe.records import RecordError
from dynmoe.report.cost_tables import (
    cost_table,
    search_sentence,
    search_table,
    timing_table,
    unmeasured,
)
from dynmoe.report.costs import Bill, ModelCost, Timing, model_costs, read_timings, search_cost
from dynmoe.report.runs import read_runs

MACHINE = {"cpu": "Example CPU", "cores": 2, "threads": 2, "device": "cpu"}


def test_size_and_flops_of_a_setting(tmp_path: Path) -> None:
    write_sweep(tmp_path, {name: {"0": [0.5, 0.6]} for name in ("dense", "top-2 of 4", "DynMoE")})
    costs = model_costs(read_runs([tmp_path]).runs)
    nan = pytest.approx(math.nan, nan_ok=True)
    assert costs["dense"] == ModelCost(2, 1000, 1000, 1000, 5000, nan, nan)
    # Two layers of four experts: 4 x (100 + 10) + 1; of a token, 2 x 100 + 4 x 10 + 1; and for
    # each of 4 tokens, 2 x 200 + 4 x 20 + 2 FLOPs.
    assert costs["top-2 of 4"] == ModelCost(
        2,
        1000 + 2 * 441,
        1000 + 2 * 441,
        1000 + 2 * 241,
        5000 + 2 * 4 * 482,
        4,
        2,
    )
    # Eight slots, four alive at the selected step; k is 1.5 in one layer and 2 in the other.
    assert costs["DynMoE"] == ModelCost(
        2,
        1000 + 2 * 881,
        1000 + 2 * 441,
        1000 + 2 * 41 + 350,
        5000 + 2 * 4 * 82 + 4 * 700,
        4,
        1.75,
    )


def test_k_is_that_of_the_test_environment(tmp_path: Path) -> None:
    run = write_run(tmp_path, "DynMoE", environment="15")
    lines = [json.loads(line) for line in (run.path / "routing.jsonl").open()]
    for line in lines:
        line["mean_k"] = 3.0 if line["source"] == "15" else 1.0
    (run.path / "routing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert model_costs(read_runs([tmp_path]).runs)["DynMoE"].mean_k == 3


def test_the_bill_of_the_search(tmp_path: Path) -> None:
    accuracies = {"0": [0.5, 0.6, 0.7]}
    write_sweep(tmp_path, dict.fromkeys(("dense", "top-1 of 2", "top-2 of 4"), accuracies))
    write_run(tmp_path, "top-2 of 4", 0.9, hparams_seed=1)
    write_sweep(tmp_path, {"DynMoE": {"0": [0.5, 0.6]}})
    collection = read_runs([tmp_path])
    (problem,) = collection.problems
    step_ms = {"top-1 of 2": 20.0, "top-2 of 4": 30.0, "DynMoE": 60.0}
    cost = search_cost(collection, problem, "DynMoE", step_ms)
    # Seeds 0 and 1 alone, which DynMoE has; both draws of top-2 of 4.
    samples = 151 * 8 * 2
    small, large = 5000 + 2 * 4 * 242, 5000 + 2 * 4 * 482
    hours = (151 * 0.5 + 4 * 2) / 3600
    assert cost.grid == Bill(
        5,
        3 * samples * (2 * small + 3 * large),
        pytest.approx(5 * hours, rel=1e-12),
        pytest.approx(151 * (2 * 0.02 + 3 * 0.03) / 3600, rel=1e-12),
    )
    # 1 step with 2 experts per layer, then 50 steps each with 3, 4 and 5; k 1.5 and 2.
    forward = sum(
        steps * (5000 + 2 * 4 * (20 * experts + 2) + 4 * 700)
        for steps, experts in ((1, 2), (50, 3), (50, 4), (50, 5))
    )
    assert cost.own == Bill(
        2,
        2 * 3 * forward * 16,
        pytest.approx(2 * hours, rel=1e-12),
        pytest.approx(151 * 2 * 0.06 / 3600, rel=1e-12),
    )
    assert (cost.grid_settings, cost.machines) == (2, ())
    assert search_table(collection, search_cost(collection, problem, "DynMoE", {})).rows[2] == (
        "ratio",
        "2.5 x",
        "2.39 x",
        "2.5 x",
    )
    table = search_table(collection, cost)
    assert (table.columns[-1], table.rows[2][-1]) == ("hours at the measured step", "1.08 x")
    over = "The search over the grid (2 settings, 5 runs) took 2.39 x the training FLOPs and "
    assert search_sentence(cost) == (
        f"{over}1.08 x the training time, at the measured step, of DynMoE (2 runs)."
    )
    cost = search_cost(collection, problem, "DynMoE", {})
    assert search_sentence(cost) == f"{over.removesuffix(' and ')} of DynMoE (2 runs)."


def test_hours_of_different_machines_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2")
    write_run(tmp_path, "DynMoE", facts={"machine": {"cpu": "Other CPU", "cores": 2}, "threads": 1})
    collection = read_runs([tmp_path])
    (problem,) = collection.problems
    cost = search_cost(collection, problem, "DynMoE", {})
    assert cost.machines == (
        "machine (cpu Example CPU, cores 2; cpu Other CPU, cores 2)",
        "threads (2; 1)",
    )
    table = search_table(collection, cost)
    assert [row[3] for row in table.rows] == ["refused", "refused", "X"]
    assert "machines differ: machine (cpu Example CPU" in table.note


def test_what_was_not_recorded_is_not_made_up(tmp_path: Path) -> None:
    write_run(tmp_path, "top-1 of 2")
    run = write_run(tmp_path, "DynMoE")
    (run.path / "routing.jsonl").unlink()
    collection = read_runs([tmp_path])
    (problem,) = collection.problems
    own = cost_table(collection, problem).rows[1]
    assert own == ("DynMoE", "1", "X", "X", "0.00276", "X", "X", "X")
    cost = search_cost(collection, problem, "DynMoE", {})
    assert search_table(collection, cost).rows[2] == ("ratio", "1 x", "X", "1 x")


def test_without_a_grid_or_dense(tmp_path: Path) -> None:
    write_run(tmp_path, "DynMoE")
    collection = read_runs([tmp_path])
    (problem,) = collection.problems
    cost = search_cost(collection, problem, "DynMoE", {})
    assert search_sentence(cost) == "DynMoE: there is no grid whose search it could save."
    assert search_table(collection, cost).rows[0][0] == "the grid (0 settings)"
    assert cost_table(collection, problem).rows[0][:4] == ("DynMoE", "1", "4", "1.75")


def write_timing(sweep: Path, runs: list[str], **machine: Any) -> None:
    rows = [
        {
            "run": run,
            "setting": "",
            "environment": "0",
            "mode": mode,
            "median_ms": median + 2 * index,
            "quartiles_ms": [median - 1 + 2 * index, median + 1 + 2 * index],
            "samples_per_s": 16000 / median,
            "samples_per_s_quartiles": [16000 / median - 5, 16000 / median + 5],
            "ratio": 1.0,
            "ratio_quartiles": [1.0, 1.0],
            "mean_k": None,
            "peak_bytes": peak,
            "rounds": 20,
            "contaminated": 0,
        }
        for index, run in enumerate(runs)
        for mode, median, peak in (("train", 20.0, 2**30), ("inference", 8.0, None))
    ]
    content = {
        "command": "dynmoe-bench step",
        "date": "2025-01-01",
        "machine": {**MACHINE, **machine},
        "settings": {"matmul_precision": "medium"},
        "workload": {"batch": 16},
        "rows": rows,
    }
    (sweep / "timing.json").write_text(json.dumps(content))


def test_times_by_setting(tmp_path: Path) -> None:
    dense = write_run(tmp_path, "dense").path.name
    two = [write_run(tmp_path, "DynMoE", seed=seed).path.name for seed in (0, 1)]
    write_run(tmp_path, "top-1 of 2")
    collection = read_runs([tmp_path])
    (problem,) = collection.problems
    assert unmeasured(collection, read_timings(collection)[problem]) == (
        f"Times and memory are not measured: dynmoe-bench step --runs {tmp_path} does it."
    )
    write_timing(tmp_path, [dense, *two])
    timings = read_timings(collection)[problem]
    assert not unmeasured(collection, timings)
    assert timings.step_ms == {"dense": 20.0, "DynMoE": 23.0}
    assert timings.commands == ("dynmoe-bench step",)
    # DynMoE was measured on two runs, of 22 and 24 ms.
    assert timings.by_setting["DynMoE", "train"] == Timing(
        23.0, (21.0, 25.0), 800.0, (795.0, 805.0), float(2**30), False
    )
    table = timing_table(collection, problem, timings)
    assert table.columns[-1] == "peak memory of a training step beyond weights and optimizer, GiB"
    assert table.rows == (
        ("dense", "20 [19, 21]", "800 [795, 805]", "8 [7, 9]", "2,000 [1,995, 2,005]", "1"),
        ("top-1 of 2", *["X"] * 5),
        ("DynMoE", "23 [21, 25]", "800 [795, 805]", "11 [9, 13]", "2,000 [1,995, 2,005]", "1"),
    )
    assert "cpu Example CPU, cores 2, threads 2, device cpu, matmul_precision medium" in table.note


def test_times_of_different_machines_are_refused(tmp_path: Path) -> None:
    for name, setting, threads in (("a", "dense", 2), ("b", "DynMoE", 1)):
        run = write_run(tmp_path / name, setting)
        write_timing(tmp_path / name, [run.path.name], threads=threads)
    collection = read_runs([tmp_path / "a", tmp_path / "b"])
    (timings,) = read_timings(collection).values()
    assert unmeasured(collection, timings) == (
        "Times and memory are not compared: measured under different conditions: "
        "machine.threads (2; 1)."
    )
    alone = read_runs([tmp_path / "b"])
    (timings,) = read_timings(alone).values()
    assert timing_table(alone, alone.problems[0], timings).rows[0][1] == "20 [19, 21]"


@pytest.mark.parametrize("damage", ["truncated", "[]", "command", "machine", "mode"])
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, damage: str) -> None:
    write_timing(tmp_path, [write_run(tmp_path).path.name])
    file = tmp_path / "timing.json"
    content = json.loads(file.read_text())
    content.pop(damage, None)
    content["rows"][1].pop(damage, None)
    text = json.dumps(content)
    file.write_text({"truncated": text[:99], "[]": "[]"}.get(damage, text))
    with pytest.raises(RecordError, match=r"timing\.json: expected what `dynmoe-bench step"):
        read_timings(read_runs([tmp_path]))
