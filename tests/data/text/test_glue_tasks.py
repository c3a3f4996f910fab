"""Proves that the table of GLUE's problems holds together."""

from __future__ import annotations

import pytest

from dynmoe.data.text.tasks import TASKS, GlueTask


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_tasks_are_complete(task: GlueTask) -> None:
    assert task.measure
    assert len(task.columns) in (1, 2)
    assert {"train", "dev"} <= set(task.sizes)
    assert task.regression == (task.name == "stsb")
    # Every test set has a file for the server: eleven in all.
    assert set(task.submission) == {
        name for name in task.sizes if name.startswith("test") or name == "ax"
    }


def test_the_server_gets_eleven_files() -> None:
    assert sorted(file for task in TASKS.values() for file in task.submission.values()) == [
        "AX.tsv",
        "CoLA.tsv",
        "MNLI-m.tsv",
        "MNLI-mm.tsv",
        "MRPC.tsv",
        "QNLI.tsv",
        "QQP.tsv",
        "RTE.tsv",
        "SST-2.tsv",
        "STS-B.tsv",
        "WNLI.tsv",
    ]
    assert [name for name, task in TASKS.items() if task.text_labels] == ["mnli", "qnli", "rte"]
