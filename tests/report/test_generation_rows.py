"""What `dynmoe-bench generate --runs` wrote, as reports read it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dynmoe.benchmark.results import Conditions, Output
from dynmoe.records import RecordError
from dynmoe.report.costs import GENERATION_KEYS, Generations, generation_rows

DENSE = {
    "run": "a",
    "problem": "Scenes, llava, last_step",
    "setting": "dense",
    "environment": "test",
    "batch": 128,
    "new_tokens": 32,
    "median_ms": 360.0,
    "quartiles_ms": (350.0, 370.0),
    "prompt_ms": 50.0,
    "prompt_quartiles_ms": (48.0, 52.0),
    "token_ms": 10.0,
    "tokens_per_s": 11378.0,
    "tokens_per_s_quartiles": (11070.0, 11703.0),
    "reference": "dense",
    "ratio": 1.0,
    "ratio_quartiles": (1.0, 1.0),
    "mean_k": {},
    "peak_bytes": 1000,
    "rounds": 7,
    "contaminated": 1,
}
DYNMOE = {
    **DENSE,
    "run": "b",
    "setting": "DynMoE",
    "ratio": 0.7,
    "ratio_quartiles": (0.6, 0.8),
    "mean_k": {"prompt": 1.5, "image": 1.2, "answer": 2.0},
}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    conditions = Conditions({"cpu": "Z80"}, {"malloc": "tuned"}, {"batch": 128})
    monkeypatch.setattr(sys, "argv", ["dynmoe-bench", "generate", "--runs", "outputs/vl"])
    Output(tmp_path / "generation.json", "generate").add([DENSE, DYNMOE], conditions)
    for name in "ab":
        (tmp_path / name).mkdir()
    return tmp_path


def test_rows_of_a_sweep_and_of_a_run(sweep: Path) -> None:
    found = generation_rows(sweep)
    assert found.command == "dynmoe-bench generate --runs outputs/vl"
    assert found.conditions == "cpu Z80, malloc tuned, batch 128"
    for row, written in zip(found.rows, (DENSE, DYNMOE), strict=True):
        expected = json.loads(json.dumps(written))
        assert {key: row[key] for key in GENERATION_KEYS} == {
            key: expected[key] for key in GENERATION_KEYS
        }
    (own,) = generation_rows(sweep / "b").rows
    assert own == found.rows[1]


def test_nothing_measured(tmp_path: Path) -> None:
    assert generation_rows(tmp_path) == Generations((), "", "")


@pytest.mark.parametrize("damage", ["{", {"rows": []}, {"rows": [{"run": "a"}]}])
def test_something_else_is_refused(sweep: Path, damage: Any) -> None:
    file = sweep / "generation.json"
    content = json.loads(file.read_text())
    file.write_text(damage if isinstance(damage, str) else json.dumps(content | damage))
    if damage == {"rows": []}:
        assert generation_rows(sweep).rows == ()
        return
    with pytest.raises(RecordError) as error:
        generation_rows(sweep)
    assert f"{file}: expected what `dynmoe-bench generate --runs {sweep}` writes" in str(
        error.value
    )
