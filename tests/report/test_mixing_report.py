"""Data mixing in reports: what was drawn, by whose name, and what the probes cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeps import write_run

from dynmoe.report.mixing import draw_mixing, mixed, probe_time, sources_table
from dynmoe.report.run import Run, read_run
from dynmoe.report.setting_names import name_settings

START = {"a": 0.5, "b": 0.5}
SIZES = {"a": 100, "b": 1000}


def run(sweep: Path, rule: str, probes: list[dict[str, Any]]) -> Run:
    mixing = {"start": START, "sizes": SIZES, "probe": {"a": 4, "b": 4}}
    facts = {"mixing": mixing, "samples_per_step": 16}
    folder = write_run(sweep / rule, config={"mixing.rule": rule}, facts=facts)
    folder.append("mixing", *probes)
    return read_run(folder)


def probe(step: int, weight: float, delta: float | None = 0.1) -> dict[str, Any]:
    return {
        "step": step,
        "sources": ["a", "b"],
        "weights": [weight, 1 - weight],
        "delta": None if delta is None else [delta, 0.2],
        "loss": [1.0, 2.0],
        "load": {},
        "seconds": 0.5,
    }


def test_what_was_drawn(tmp_path: Path) -> None:
    made = run(tmp_path, "dynamic", [probe(49, 0.25), probe(99, 1.0)])
    table = sources_table(made)
    assert table is not None
    batch, steps = made.facts["samples_per_step"], made.steps_taken
    expected = batch * (51 * 0.5 + 50 * 0.25 + (steps - 101) * 1.0)
    assert table.rows[0][0] == "a" and table.rows[0][4] == f"{expected:,.0f}"
    assert table.rows[0][5] == f"{expected / 100:.2f}"
    share = 100 * 1.0 / (made.step_seconds * steps)
    assert probe_time(made) == f"dynamic, 2 probes of 2 sources: {share:.1f} % of the time"


def test_rules_are_settings_and_have_panels(tmp_path: Path) -> None:
    runs = name_settings(
        [
            run(tmp_path, "dynamic", [probe(49, 0.25)]),
            run(tmp_path, "uniform", [probe(49, 0.5, None)]),
        ]
    )
    names = ["DynMoE, dynamic mixing", "DynMoE, uniform mixing"]
    assert [each.setting for each in runs] == names
    picture = draw_mixing(runs)
    assert picture is not None and len(picture.figure.axes) == 6


@pytest.mark.parametrize("probes", [[], None])
def test_without_probes_there_is_no_figure(tmp_path: Path, probes: list[Any] | None) -> None:
    if probes is None:
        made = read_run(write_run(tmp_path, "DynMoE"))
        assert mixed(made) is None and sources_table(made) is None
    else:
        made = run(tmp_path, "uniform", probes)
        table = sources_table(made)
        assert table is not None and table.rows[0][4] == f"{batch_half(made):,.0f}"
    assert draw_mixing([made]) is None and probe_time(made) is None


def batch_half(made: Run) -> float:
    return float(made.facts["samples_per_step"] * made.steps_taken / 2)
