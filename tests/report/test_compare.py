"""Two runs side by side; the numbers of the synthetic runs are round, see tests/sweeps.py."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweeps import write_run

from dynmoe.report.run import Run, read_run
from dynmoe.report.summary import Comparison, compare
from dynmoe.report.tables import Strong, Table, to_rich


def read(sweep: Path, *args: Any, **options: Any) -> Run:
    folder = write_run(sweep, *args, **options)
    return read_run(folder)


@pytest.fixture
def a(tmp_path: Path) -> Run:
    return read(tmp_path, "top-2 of 8", 0.59)


def against(a: Run, *args: Any, **options: Any) -> Comparison:
    return compare(a, read(a.folder.path.parent / "b", *args, **options))


def cells(table: Table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_sentences(a: Run) -> None:
    comparison = against(a, "DynMoE", 0.613)
    folder = a.folder.path.parent
    assert comparison.sentences == [
        f"A is top-2 of 8: {folder / 'digits_top-2-of-8_env0_seed0'}",
        f"B is DynMoE: {folder / 'b' / 'digits_dynmoe_env0_seed0'}",
        "On 0, B is 2.3 points above A: 61.3 % against 59.0 %.",
        "They are matched: both ran with seed 0, trial seed 0. Only more seeds rule out chance.",
    ]
    assert comparison.warnings == []


def test_both_values_are_shown_on_a_narrow_console(tmp_path: Path) -> None:
    found = compare(read(tmp_path, "dense"), read(tmp_path, "DynMoE"))
    table = next(each for each in found.tables if each.title.startswith("Configuration"))
    console = Console(width=60, file=StringIO(), record=True)
    console.print(to_rich(table))
    text = console.export_text()
    for row in table.rows:
        assert row[1][:8] in text and row[2][:8] in text


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [(0.57, "2.0 points below A: 57.0 %"), (0.59, "level with A: 59.0 %")],
)
def test_below_and_level(a: Run, accuracy: float, words: str) -> None:
    comparison = against(a, "DynMoE", accuracy)
    assert comparison.sentences[2] == f"On 0, B is {words} against 59.0 %."


def test_configuration_shows_what_differs_alone(a: Run) -> None:
    config = {"task.optimizer.lr": 0.01, "note": "ü"}
    table = against(a, "top-2 of 8", 0.6, config=config).tables[0]
    assert table.title == "Configuration: 1 key differs"
    assert table.rows == (("task.optimizer.lr", "0.001", "0.01"),)
    assert table.note == "Only B has note."


def test_keys_of_another_router_are_named_once(a: Run) -> None:
    table = against(a, "DynMoE", 0.6).tables[0]
    assert {row[0] for row in table.rows} == {
        *("moe.algorithm", "moe.name", "moe.num_experts", "moe.router._target_"),
    }
    assert table.note == (
        "Only A has moe.adaptation, moe.top_k.\n"
        "Only B has moe.adaptation.length, moe.adaptation.period, moe.max_experts."
    )


def test_equal_configurations(a: Run) -> None:
    table = against(a, "top-2 of 8", 0.6).tables[0]
    assert (table.title, table.rows, table.note) == ("Configuration: 0 keys differ", (), "")


def test_accuracy_at_the_selected_steps(a: Run) -> None:
    table = against(a, "DynMoE", 0.613, validation=0.8).tables[1]
    assert table.title == "Scores times 100, A at step 100, B at step 100"
    assert table.rows == (
        ("0/in", "accuracy", "59.0", "61.3", "+2.3"),
        ("0/out", "accuracy", "59.0", "61.3", "+2.3"),
        ("15/in", "accuracy", "59.0", "80.0", "+21.0"),
        ("15/out", "accuracy", "59.0", "80.0", "+21.0"),
        ("30/in", "accuracy", "59.0", "80.0", "+21.0"),
        ("30/out", "accuracy", "59.0", "80.0", "+21.0"),
        ("mean of those that select", "accuracy", "59.0", "80.0", "+21.0"),
    )
    strong = [cell for row in table.rows for cell in row if isinstance(cell, Strong)]
    assert strong == ["59.0", "61.3", "+2.3"]
    assert table.conditions.startswith(
        "Protocol domainbed; selection by training-domain validation;"
    )


def test_costs(a: Run) -> None:
    table = against(a, "DynMoE", 0.6).tables[2]
    # Two layers of 100 parameters per expert, 10 per expert in the router and 1 more; 1000 outside.
    # A: 8 experts, k 2. B: 2 experts + 1 for each record before step 100, k 1.5 and 2; 8 slots.
    assert cells(table) == {
        "experts per MoE layer": ("8.0", "4.0", "0.50"),
        "experts per token (mean k on 0)": ("2.00", "1.75", "0.88"),
        "parameters in training": ("2,762", "2,762", "1.00"),
        "parameters of living experts and the rest": ("2,762", "1,882", "0.68"),
        "parameters activated per token": ("1,562", "1,432", "0.92"),
        # Per layer and sample 4 tokens x (200 per expert and token, 20 per living expert, 2).
        "FLOPs per sample, forward": ("9,496", "8,456", "0.89"),
        # 151 steps of 0.5 s.
        "training, s": ("76", "76", "1.00"),
        "training step, s": ("0.500", "0.500", "1.00"),
        "peak memory, GiB": ("1.25", "1.25", "1.00"),
    }


def test_dense_has_no_experts(a: Run) -> None:
    costs = cells(against(a, "dense", 0.6).tables[2])
    assert costs["experts per MoE layer"] == ("8.0", "–", "–")
    assert costs["parameters activated per token"] == ("1,562", "1,000", "0.64")


def test_other_seeds_are_not_matched(a: Run) -> None:
    comparison = against(a, "DynMoE", 0.6, seed=1)
    assert comparison.sentences[3] == (
        "They are not matched: A ran with seed 0, trial seed 0, B with seed 1, trial seed 0."
    )
    assert comparison.warnings == ["Other data or other splits of them: data_hash (abc0; abc1)."]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"threads": 4}, "threads (2; 4)"),
        ({"device": "cuda"}, "device (cpu; cuda)"),
        (
            {"machine": {"cpu": "Other", "cores": 2}},
            "machine (cpu Example CPU, cores 2; cpu Other, cores 2)",
        ),
        ({"versions": {"dynmoe": "0.1.0", "torch": "2.12.0"}}, "torch (2.11.0; 2.12.0)"),
        ({"versions": {"dynmoe": "0.1.0"}}, "torch (2.11.0; unknown)"),
    ],
)
def test_measured_on_other_machines(a: Run, facts: dict[str, Any], why: str) -> None:
    comparison = against(a, "DynMoE", 0.6, facts=facts)
    assert comparison.warnings == [f"Times and memory are not compared: {why}."]
    costs = cells(comparison.tables[2])
    assert costs["training step, s"] == ("0.500", "0.500", "–")
    assert costs["peak memory, GiB"] == ("1.25", "1.25", "–")
    assert costs["parameters in training"][-1] == "1.00"


def test_other_rules(a: Run) -> None:
    assert against(a, "DynMoE", 0.6, facts={"protocol": "swad"}).warnings == [
        "Rules differ, so the accuracies mean different things: protocol (domainbed; swad)."
    ]


def test_other_environments_are_not_compared(a: Run) -> None:
    comparison = against(a, "DynMoE", 0.6, environment="15")
    assert comparison.sentences[2:] == [
        "Accuracies are not compared: A is tested on RotatedDigits, 0, B on RotatedDigits, 15."
    ]
    assert [table.title for table in comparison.tables] == ["Configuration: 5 keys differ", "Cost"]
