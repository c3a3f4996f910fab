"""How long the rest of a sweep takes, by jobs that have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynmoe.records import RunFolder
from dynmoe.sweep.manifest import Job, Standing, _completed

TEXTS = {"data.name": "RTE", "protocol.selection": "best_dev", "task.epochs": 3}


def standing(folder: Path, *, planned: int | None = None, **config: Any) -> Standing:
    """Of a job that counts its steps in epochs; `planned`: those that its run has counted."""
    if planned is not None:
        folder.mkdir()
        facts = {"steps": planned, "eval_every": planned // 3}
        (folder / "run.json").write_text(json.dumps(facts))
    return Standing.of(Job((), "", "", RunFolder(folder), TEXTS | config, -1, None))


def test_a_job_is_as_long_as_one_of_the_same_batches_and_epochs(tmp_path: Path) -> None:
    found = _completed(
        [
            standing(tmp_path / "a", planned=90, **{"data.batch_size": 32}),
            standing(tmp_path / "b", planned=180, **{"data.batch_size": 16}),
            standing(tmp_path / "c", **{"data.batch_size": 32}),
            standing(tmp_path / "d", **{"data.batch_size": 16, "task.epochs": 10}),
        ]
    )
    assert [each.planned for each in found] == [90, 180, 90, None]


def test_texts_are_not_evaluated_before_an_epoch(tmp_path: Path) -> None:
    assert standing(tmp_path / "a", planned=90).evaluations == 3
    assert standing(tmp_path / "b", planned=90, **{"protocol.selection": "oracle"}).evaluations == 4
