"""Comparison of language runs: searched values, measures by name, a table over tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from language_runs import LRS, SAMPLES, write_language_run
from sweeps import EVAL_TIME, FLOPS_OTHER, STEP_TIME, write_sweep

from dynmoe.report import page
from dynmoe.report.claim import examine
from dynmoe.report.claim_figures import draw_curves
from dynmoe.report.claim_tables import accuracy_table, claim_table, statements
from dynmoe.report.cost_tables import cost_table, search_table, taken, values_table
from dynmoe.report.costs import search_cost
from dynmoe.report.document import Sheet, to_text
from dynmoe.report.routing_figures import draw_overlap
from dynmoe.report.runs import Collection, read_runs
from dynmoe.report.set_tables import ROWS, sets_table, task_tables
from dynmoe.report.summary import compare
from dynmoe.report.tables import Strong


def write(folder: Path, setting: str, best: float, seed: int = 0, **options: Any) -> None:
    """A run that reaches `best` in its second evaluation of three."""
    write_language_run(folder, setting, (best - 0.1, best, best - 0.05), seed, **options)


def write_search(folder: Path, dataset: str = "RTE") -> Path:
    """dense is best with the second value, DynMoE with the first; two seeds."""
    for seed in (0, 1):
        for lr, dense, dynmoe in zip(LRS, (0.60, 0.65, 0.5), (0.70, 0.66, 0.5), strict=True):
            write(folder, "dense", dense + seed / 100, seed, dataset=dataset, lr=lr)
            write(folder, "DynMoE", dynmoe + seed / 100, seed, dataset=dataset, lr=lr)
    return folder / dataset


def read(*folders: Path) -> Collection:
    collection = read_runs(list(folders))
    assert not collection.warnings
    return collection


def test_values_that_are_searched_are_one_setting_and_the_best_mean_stands(tmp_path: Path) -> None:
    collection = read(write_search(tmp_path))
    assert [
        (run.setting, run.config["task.optimizer.lr"], run.repetition) for run in collection.runs
    ] == [
        ("dense", LRS[1], (0, 0)),
        ("dense", LRS[1], (1, 0)),
        ("DynMoE", LRS[0], (0, 0)),
        ("DynMoE", LRS[0], (1, 0)),
    ]
    assert [run.outcome.accuracy for run in collection.runs] == [0.65, 0.66, 0.70, 0.71]
    assert len(collection.others) == 8
    (problem,) = collection.problems
    assert taken(collection, problem) == {"dense": "3e-05 (of 3)", "DynMoE": "2e-05 (of 3)"}


def test_a_value_that_lacks_repetitions_is_not_taken(tmp_path: Path) -> None:
    for seed in (0, 1):
        write(tmp_path, "dense", 0.6, seed)
    write(tmp_path, "dense", 0.9, lr=LRS[1])
    assert [run.outcome.accuracy for run in read(tmp_path / "RTE").runs] == [0.6, 0.6]


def test_the_search_is_shown_with_every_value(tmp_path: Path) -> None:
    collection = read(write_search(tmp_path))
    (problem,) = collection.problems
    table = values_table(collection, problem)
    assert table is not None and table.columns[1] == "task.optimizer.lr"
    assert table.rows[:2] == (
        ("dense", "2e-05", "60.5 +/- 0.4", "60.5 +/- 0.4", "2"),
        ("dense", "3e-05", "65.5 +/- 0.4", "65.5 +/- 0.4", "2"),
    )
    taken_rows = [row[:2] for row in table.rows if isinstance(row[2], Strong)]
    assert taken_rows == [("dense", "3e-05"), ("DynMoE", "2e-05")]
    settings = accuracy_table(collection, problem)
    assert settings.columns == ("setting", "evaluation set dev", "task.optimizer.lr taken")
    assert settings.rows[1] == ("DynMoE", "70.5 +/- 0.4", "2e-05 (of 3)")


def test_a_single_value_is_no_search(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6)
    write(tmp_path, "DynMoE", 0.7)
    collection = read(tmp_path / "RTE")
    (problem,) = collection.problems
    assert taken(collection, problem) == {} and values_table(collection, problem) is None
    assert accuracy_table(collection, problem).columns == ("setting", "evaluation set dev")


def test_where_data_and_weights_lie_is_no_setting(tmp_path: Path) -> None:
    hub = {"backbone.model": "sentence-transformers/minilm", "backbone.path": None}
    for seed, place in enumerate(
        (
            {**hub, "data.source": "hub", "data.root": None, "data.ood": []},
            {**hub, "backbone.path": "/here/minilm", "data.source": "tsv", "data.root": "/here"},
            {**hub, "backbone.path": "there/minilm", "data.eval_batch_size": 8, "data.ood": ["x"]},
        )
    ):
        write(tmp_path, "dense", 0.6, seed, config=place)
    write(tmp_path, "dense", 0.6, config=hub | {"backbone.path": "/here/bert"})
    names = [run.setting for run in read(tmp_path / "RTE").runs]
    assert names == ["dense, backbone.model=bert", *["dense, backbone.model=minilm"] * 3]


@pytest.mark.parametrize(
    "config",
    [{"backbone.lora.r": 8}, {"backbone.lora": None, "backbone.adapter.freeze": True}],
    ids=["LoRA", "adapters"],
)
def test_the_bill_of_runs_with_frozen_weights_is_not_known(
    config: dict[str, Any], tmp_path: Path
) -> None:
    for setting in ("top-1 of 2", "DynMoE"):
        write(tmp_path, setting, 0.6, config=config)
    collection = read(tmp_path / "RTE")
    own = next(run.setting for run in collection.runs if run.kind == "adaptive")
    cost = search_cost(collection, collection.problems[0], own, {})
    table = search_table(collection, cost)
    assert [row[2] for row in table.rows] == ["X", "X", "X"] and "are frozen" in table.note


def test_names_tell_of_sparse_tokens_and_adapters(tmp_path: Path) -> None:
    plain = {"backbone.token_sparsify": None, "backbone.adapter": None}
    keep = {"backbone.token_sparsify.keep": 0.5}
    for config in (plain, {**plain, "backbone.adapter": {}}, {"backbone.adapter.dim": 4, **keep}):
        write(tmp_path, "dense", 0.6, config=config)
    names = [run.setting for run in read(tmp_path / "RTE").runs]
    assert names == ["dense", "dense, adapters", "dense, adapters, 0.5 of patches"]


def test_flops_are_of_a_text_of_mean_length(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6)
    collection = read(tmp_path / "RTE")
    note = cost_table(collection, collection.problems[0]).note
    assert "one forward pass of a text of the training set's mean length" in note


def test_a_run_that_ended_early_stays_in_the_mean_curve(tmp_path: Path) -> None:
    write_language_run(tmp_path, "dense", (0.5, 0.6), seed=0)
    write_language_run(tmp_path, "dense", (0.3, 0.4, 0.5, 0.6), seed=1)
    picture = draw_curves(read(tmp_path / "RTE").runs)
    assert picture is not None and "its last value is kept" in picture.caption
    mean = picture.figure.axes[0].get_lines()[0]
    assert mean.get_ydata() == pytest.approx([0.4, 0.5, 0.55, 0.6])


def test_sets_that_not_all_runs_have_are_left_out_of_the_overlap(tmp_path: Path) -> None:
    write(tmp_path, "DynMoE", 0.6, seed=0, others=["hans"])
    write(tmp_path, "DynMoE", 0.6, seed=1)
    assert draw_overlap(read_runs([tmp_path / "RTE"]).runs) is not None


def test_the_bill_of_the_search_counts_lost_values_and_the_steps_taken(tmp_path: Path) -> None:
    for lr in LRS[:2]:
        write(tmp_path, "top-1 of 2", 0.6, lr=lr, facts={"steps": 1000})
        write(tmp_path, "DynMoE", 0.6, lr=lr, facts={"steps": 1000})
    collection = read(tmp_path / "RTE")
    cost = search_cost(collection, collection.problems[0], "DynMoE", {"top-1 of 2": 36.0})
    assert (cost.grid.runs, cost.own.runs) == (2, 2)
    steps = 101  # of 1000, then patience
    sample = FLOPS_OTHER + 2 * 4 * (2 * 20 + 2 + 200)
    assert cost.grid.flops == 2 * 3 * sample * steps * SAMPLES
    assert cost.grid.measured == pytest.approx(2 * steps * 0.036 / 3600)
    assert cost.grid.recorded == pytest.approx(2 * (steps * STEP_TIME + 3 * EVAL_TIME) / 3600)


def test_words_name_the_measure_and_the_set(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        write(tmp_path, "top-1 of 8", -0.05 + seed / 100, seed, dataset="CoLA")
        write(tmp_path, "DynMoE", 0.1 + seed / 50, seed, dataset="CoLA")
    collection = read(tmp_path / "CoLA")
    first, second, *others = statements(collection)
    assert first.startswith("DynMoE on CoLA, evaluation set dev, beats top-1 of 8, the grid's only")
    assert second == (
        "DynMoE reaches 12.0 +/- 0.9 (Matthews correlation, x 100): rank 1 of 2 settings by mean "
        "score."
    )
    assert any("by the very score that is reported" in sentence for sentence in others)
    assert not any("%" in sentence or "Tested on" in sentence for sentence in others)
    (claim,) = examine(collection, collection.problems[0])
    table = claim_table(collection, claim)
    assert table.columns[1:3] == ("evaluation set", "Matthews correlation, x 100")
    assert "chosen by the reported score itself" in table.note


def test_tasks_side_by_side_with_their_mean_and_published_rows(tmp_path: Path) -> None:
    for dataset, best in (("CoLA", 0.3), ("RTE", 0.7)):
        for seed in (0, 1):
            write(tmp_path, "DynMoE", best + seed / 50, seed, dataset=dataset)
    write(tmp_path, "dense", 0.6)  # one seed of two
    (table,) = task_tables(read(tmp_path / "CoLA", tmp_path / "RTE")).values()
    assert table.columns == ("setting", "CoLA", "RTE", "mean of tasks")
    assert table.rows[:2] == (
        ("dense", "X", "60.0 (n = 1)", "X"),
        ("DynMoE", "31.0 +/- 0.7", "71.0 +/- 0.7", "51.0 +/- 0.7"),
    )
    assert [type(cell) for cell in table.rows[1]] == [str, Strong, Strong, Strong]
    assert table.rows[2] == ("dense (published)", "64.0", "74.4", "69.2")
    assert table.rows[3] == ("top-1 of 16 (published)", "63.6", "74.0", "68.8")
    assert ("mean of 8 fixed settings (published)", "64.3", "74.1", "69.2") in table.rows
    assert len(table.rows) == 2 + len(ROWS)
    assert table.note.startswith("CoLA: Matthews correlation; RTE: accuracy. ")
    assert "second-hand" in table.note and "chosen by the dev score itself" in table.note
    assert "task.optimizer.lr" not in table.note  # a single value was no search


def test_one_task_has_no_mean_and_an_unknown_one_nothing_published(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6)
    write(tmp_path, "dense", 0.6, facts={"dataset": "glosses"}, config={"data.name": "glosses"})
    (table,) = task_tables(read_runs([tmp_path / "RTE"])).values()
    assert table.columns == ("setting", "RTE", "glosses", "mean of tasks")
    assert table.rows[1] == ("dense (published)", "74.4", "X", "X")


def test_protocols_have_tables_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6)
    write(tmp_path / "held", "dense", 0.6, heldout=(0.1, 0.2, 0.3))
    tables = task_tables(read(tmp_path / "RTE", tmp_path / "held" / "RTE"))
    assert list(tables) == ["tasks_glue_best_dev", "tasks_glue_heldout_heldout"]
    assert [table.rows[0] for table in tables.values()] == [
        ("dense", "60.0"),
        ("dense", "55.0"),
    ]


def test_further_evaluation_sets_are_shown_at_the_same_step(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6, dataset="MNLI", others=["mismatched"])
    collection = read(tmp_path / "MNLI")
    table = sets_table(collection, collection.problems[0])
    assert table is not None and table.columns == ("setting", "dev", "mismatched")
    assert table.rows == (("dense", "60.0", "50.0"),)


def test_an_absent_run_has_its_place(tmp_path: Path) -> None:
    write(tmp_path, "dense", 0.6)
    write(tmp_path, "dense", 0.6, seed=1, state="failed")
    write(tmp_path, "DynMoE", 0.7)
    config = read(tmp_path / "RTE").runs[-1].config | {"seed": 1}
    del config["data.test_envs"], config["task.selection"]  # as in a configuration of the task
    job = {"overrides": "seed=1", "config": config}
    (tmp_path / "RTE" / "sweep.json").write_text(
        json.dumps({"commands": [], "jobs": {"later": job}})
    )
    collection = read(tmp_path / "RTE")
    places = [
        (entry.setting, entry.environment, entry.repetition, entry.state)
        for entry in collection.absent
    ]
    assert places == [("dense", "dev", (1, 0), "failed"), ("DynMoE", "dev", (1, 0), "missing")]
    rows = accuracy_table(collection, collection.problems[0]).rows
    assert rows[0][1] == "60.0 (1 of 2: seed 1 failed)"


def test_a_result_without_its_score_is_left_out(tmp_path: Path) -> None:
    folder = write_language_run(tmp_path)
    record = folder.read("results")[-1]
    folder.append("results", {**record, "step": 500, "scores": {"dev": {}}})
    (warning,) = read_runs([tmp_path / "RTE"]).warnings
    assert "line 5, scores of dev: expected `score` as a number, found none" in warning


def test_the_page_of_several_tasks(tmp_path: Path) -> None:
    folders = [write_search(tmp_path, dataset) for dataset in ("CoLA", "MRPC")]
    document = page.build(read(*folders))
    sheets = [block.name for block in document.blocks if isinstance(block, Sheet)]
    assert sheets == ["tasks", "overview"]
    text = to_text(document)
    assert "| CoLA | DynMoE |" in text and "1 evaluation set, 2 repetitions" in text
    for word in ("image", "environment,", "environments", "test token", "class token"):
        assert word not in text
    assert "| examples | 2000 train, 200 dev | 2000 train, 200 dev |" in text


def test_language_beside_vision(tmp_path: Path) -> None:
    write_search(tmp_path)
    vision = write_sweep(tmp_path / "vision", {"dense": {"0": [0.5]}, "DynMoE": {"0": [0.6]}})
    document = page.build(read(tmp_path / "RTE", vision))
    (sheet,) = [
        each for each in document.blocks if isinstance(each, Sheet) and each.name == "tasks"
    ]
    assert sheet.table.columns == ("setting", "RTE")
    text = to_text(document)
    assert "| examples | 2000 train, 200 dev | unknown |" in text
    assert "| reported on | dev | 0/in |" in text
    assert "| batch size | 32 | 8 x 2 |" in text
    assert "| tokens of an example, mean | 40.5 | - |" in text
    assert "| protocol | glue | domainbed |" in text
    assert "test environment 0" in text and "evaluation set dev" in text


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": "MRPC", "others": ["twitter"]}
    write(tmp_path, "dense", 0.6, **options)
    write(tmp_path, "DynMoE", 0.65, **options)
    first, second = read(tmp_path / "MRPC").runs
    found = compare(first, second)
    assert "On dev, B is 5.0 points above A: 65.0 % against 60.0 %." in found.sentences
    table = found.tables[1]
    assert table.columns == ("evaluation set", "measure", "A", "B", "B − A, points")
    assert table.rows[:4] == (
        ("dev", "mean of accuracy and F1", "60.0", "65.0", "+5.0"),
        ("dev", "accuracy", "58.0", "63.0", "+5.0"),
        ("dev", "F1", "62.0", "67.0", "+5.0"),
        ("twitter", "mean of accuracy and F1", "50.0", "55.0", "+5.0"),
    )
