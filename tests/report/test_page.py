"""The report says what the runs say, in every form, and again in the same bytes."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from sweeps import save_nothing, write_run, write_sweep

from dynmoe.report import page
from dynmoe.report.costs import read_timings
from dynmoe.report.document import Code, Document, Picture, Section, Sheet, write
from dynmoe.report.runs import read_runs
from dynmoe.report.tables import Strong

SWEEP = {
    "dense": {"0": [0.5, 0.5], "15": [0.5, 0.5]},
    "top-1 of 2": {"0": [0.4, 0.5], "15": [0.5, 0.5]},
    "top-2 of 4": {"0": [0.6, 0.8], "15": [0.5, 0.5]},
    "DynMoE": {"0": [0.55, 0.7], "15": [0.5, 0.5]},
}
TIMES = {
    "command": "dynmoe-bench step --runs sweep",
    "date": "2025-11-25",
    "machine": {"cpu": "Example CPU"},
    "settings": {},
    "workload": {"batch": 8},
    "rows": [
        {
            "run": "digits_dense_env0_seed0",
            "mode": "train",
            "median_ms": 20.0,
            "quartiles_ms": [19.0, 21.0],
            "samples_per_s": 400.0,
            "samples_per_s_quartiles": [380.0, 420.0],
            "peak_bytes": None,
            "contaminated": 0,
            "rounds": 3,
        }
    ],
}


def build(folder: Path) -> Document:
    return page.build(read_runs([folder]))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete sweep, not measured."""
    return write_sweep(tmp_path_factory.mktemp("page") / "sweep", SWEEP)


@pytest.fixture(scope="module")
def document(sweep: Path) -> Document:
    return build(sweep)


def made(folder: Path) -> Section:
    """The section on how the runs were made, without drawing the others."""
    collection = read_runs([folder])
    return page.how_it_was_made(collection, read_timings(collection).values())


def commands_of(folder: Path) -> list[str]:
    code = made(folder).blocks[1]
    assert isinstance(code, Code)
    return code.text.splitlines()


def outline(sections: list[Section] | tuple[Section, ...]) -> dict[str, list[str]]:
    """Names of each section's tables and pictures."""
    return {
        section.name: [b.name for b in section.blocks if isinstance(b, Sheet | Picture)]
        for section in sections
    }


def test_the_claim_comes_first_and_the_conditions_last(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", SWEEP)
    (sweep / "timing.json").write_text(json.dumps(TIMES))
    write_run(sweep, "DynMoE", environment="15", seed=2, state="failed")
    document = build(sweep)
    assert document.title == "DynMoE against fixed experts and k: RotatedDigits"
    finding, extent = document.blocks
    assert isinstance(finding, Strong)
    assert finding.startswith("DynMoE on RotatedDigits, mean of 2 test environments: ")
    assert extent == (
        "16 runs on RotatedDigits: 4 settings, 2 test environments, 2 repetitions. "
        "1 run without a result."
    )
    assert outline(list(document.sections)) == {
        "claim": ["claim", "claim", "accuracy"],
        "cost": ["frontier", "size", "time", "search"],
        "accuracy-by-cost": ["accuracy_by_parameters", "accuracy_by_time"],
        "experts": ["experts", "k_by_layer", "k_by_position"],
        "load": ["load_by_environment", "load_by_class", "overlap"],
        "curves": ["curves"],
        "made": ["conditions"],
        "missing": ["absent"],
        "every-run": ["runs"],
    }


def test_what_is_missing_has_its_reason(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"dense": {"0": [0.5]}})
    folder = write_run(tmp_path, "DynMoE", state="failed")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    missing = build(tmp_path).sections[-2]
    sheet, words, warnings = missing.blocks
    assert sheet.table.rows == (  # type: ignore[union-attr]
        (folder.path.name, "failed", "-", "DataError: no such folder"),
    )
    assert words == "Noticed while reading the records:"
    assert "broken" in warnings.lines[0]  # type: ignore[union-attr]


def test_nothing_is_missing_of_a_complete_sweep(document: Document) -> None:
    assert [section.name for section in document.sections[-2:]] == ["made", "every-run"]


def test_every_run_can_be_worked_out_again(tmp_path: Path) -> None:
    write_sweep(tmp_path, {"dense": {"0": [0.5]}, "DynMoE": {"0": [0.6, 0.7015625]}})
    collection = read_runs([tmp_path])
    assert page.every_run(collection, collection.problems[0]).rows == (
        ("dense", "0", "0", "0", "100", "50.00", "50.00", "51.00"),
        ("DynMoE", "0", "0", "0", "100", "60.00", "60.00", "61.00"),
        ("DynMoE", "0", "1", "0", "100", "70.16", "70.16", "71.16"),
    )


def test_without_a_measurement_a_sentence_says_so(document: Document, sweep: Path) -> None:
    assert document.sections[1].blocks[3] == (
        f"Times and memory are not measured: dynmoe-bench step --runs {sweep} does it."
    )


def test_a_picture_of_time_is_left_out_with_the_reason(document: Document) -> None:
    section = next(part for part in document.sections if part.name == "accuracy-by-cost")
    assert section.blocks[1] == "Accuracy against time is left out: not measured."


def test_conditions_name_every_value(tmp_path: Path) -> None:
    sizes = {"0/in": 240, "0/out": 60}
    write_run(tmp_path, "dense", seed=0, facts={"sizes": sizes})
    write_run(tmp_path, "top-1 of 2", seed=1, facts={"batch_size": 16})
    sheet = made(tmp_path).blocks[0]
    assert isinstance(sheet, Sheet) and sheet.table.in_words
    assert dict(sheet.table.rows) == {
        "measure": "accuracy",
        "reported on": "0/in",
        "examples": "240 0/in / unknown",
        "protocol": "domainbed",
        "selection rule": "training-domain validation",
        "repetitions": "seeds 0, 1",
        "steps": "151",
        "batch size": "8 x 2 / 16 x 2",
        "learning rate": "0.001",
        "weight decay": "0.0",
        "backbone": "vit_digits",
        "weights": "from scratch",
        "data hash": "abc0 / abc1",
        "versions": "dynmoe 0.1.0, torch 2.11.0",
        "machine": "cpu Example CPU, cores 2",
        "device, threads": "cpu, 2",
        "runtime": "precision 32-true",
    }


@pytest.mark.parametrize(
    ("shared", "commands"),
    [
        (["sweep=mine", "task.note=a b"], ["dynmoe-run sweep=mine 'task.note=a b'"]),
        (["task=x"], ["dynmoe-run task=x moe=dense seed=0", "dynmoe-run task=x moe=topk seed=0"]),
    ],
)
def test_commands_are_those_that_hydra_recorded(
    tmp_path: Path, shared: list[str], commands: list[str]
) -> None:
    for setting, moe in (("dense", "dense"), ("top-1 of 2", "topk")):
        for seed in (0, 1):
            folder = write_run(tmp_path / "a b", setting, seed=seed)
            (folder.path / ".hydra").mkdir()
            overrides = json.dumps([*shared, f"moe={moe}", f"seed={seed}"])  # JSON is YAML
            (folder.path / ".hydra" / "overrides.yaml").write_text(overrides)
    assert commands_of(tmp_path / "a b") == [*commands, f"dynmoe-report '{tmp_path / 'a b'}'"]


@pytest.mark.parametrize("content", [b"\xff", b"a: [b", b"5", b"[1, null]", b"", None])
def test_a_damaged_file_of_hydra_is_a_file_without_words(
    tmp_path: Path, content: bytes | None
) -> None:
    damaged = write_run(tmp_path, "dense").path / ".hydra" / "overrides.yaml"
    damaged.parent.mkdir()
    if content is None:
        damaged.mkdir()
    else:
        damaged.write_bytes(content)
    assert commands_of(tmp_path) == [f"dynmoe-report {tmp_path}"]


def test_commands_that_the_sweep_remembers_and_that_measured(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", SWEEP)
    (sweep / "timing.json").write_text(json.dumps(TIMES))
    commands = ["dynmoe-run sweep=mine seed=0", "dynmoe-run sweep=mine seed=1"]
    (sweep / "sweep.json").write_text(json.dumps({"jobs": {}, "commands": commands}))
    assert commands_of(sweep) == [*commands, TIMES["command"], f"dynmoe-report {sweep}"]


def test_every_problem_has_a_section_and_files_of_its_own(tmp_path: Path) -> None:
    settings = {"dense": {"0": [0.5]}, "top-1 of 2": {"0": [0.4]}, "DynMoE": {"0": [0.6]}}
    write_sweep(tmp_path / "a", settings)
    write_sweep(tmp_path / "b", settings, facts={"dataset": "Other <Set>"})
    document = page.build(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert [section.title for section in document.sections] == [
        "Other <Set>",
        "RotatedDigits",
        "How it was made",
        "Every run",
    ]
    assert outline(document.sections[-1:]) == {
        "every-run": ["other-set-runs", "rotateddigits-runs"]
    }
    names = outline(document.sections[0].sections) | outline(document.sections[1].sections)
    assert names["other-set-claim"][0] == "other-set-claim"
    files = [name for found in names.values() for name in found]
    pictures = {name for name in files if files.count(name) > 1}
    assert pictures == {"other-set-claim", "rotateddigits-claim"}  # a figure and a table
    overview = document.blocks[-1]
    assert isinstance(overview, Sheet)
    assert overview.table.rows[0] == (
        *("Other <Set>", "DynMoE", "60.0", "40.0", "40.0"),
        *["no verdict: one repetition proves nothing"] * 2,
    )


def test_contrast_is_a_setting_whose_tokens_choose(tmp_path: Path) -> None:
    write_sweep(
        tmp_path,
        {
            "top-1 of 2": {"0": [0.4]},
            "top-1 of 4": {"0": [0.5]},
            "top-4 of 4": {"0": [0.9]},
            "DynMoE": {"0": [0.6]},
        },
    )
    section = next(part for part in build(tmp_path).sections if part.name == "load")
    picture = section.blocks[0]
    assert isinstance(picture, Picture)
    titles = [axes.get_title().split("\n")[0] for axes in picture.figure.axes]
    assert titles == ["DynMoE", "DynMoE", "top-1 of 4", "top-1 of 4"]


def test_the_same_runs_give_the_same_bytes(document: Document, sweep: Path, tmp_path: Path) -> None:
    first, second = (
        # The claim, with a figure; that of all figures would take long.
        write(replace(each, sections=each.sections[:1]), tmp_path / name)
        for each, name in ((document, "first"), (build(sweep), "second"))
    )
    assert {".png", ".svg", ".html", ".md", ".csv", ".tex"} == {path.suffix for path in first}
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_all_forms_hold_all_tables(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynmoe.report.document.save", save_nothing)
    write(document, tmp_path / "first")
    html = unescape((tmp_path / "first" / "report.html").read_text())
    markdown = (tmp_path / "first" / "report.md").read_text()
    assert "http" not in html and "<script" not in html
    pictures = 0
    for section in document.sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                pictures += 1
                assert f"](figures/{block.name}.png)" in markdown
                assert (tmp_path / "first" / "figures" / f"{block.name}.svg").is_file()
            if isinstance(block, Sheet):
                file = tmp_path / "first" / "tables" / f"{block.name}.csv"
                with file.open(newline="") as stream:
                    rows = [tuple(row) for row in csv.reader(stream)]
                assert rows == [block.table.columns, *block.table.rows]
                latex = file.with_suffix(".tex").read_text()
                for cell in block.table.columns:
                    assert cell in html and cell in markdown
                assert latex.count(r"\\") == len(rows)
    assert html.count("<img ") == html.count(' alt="') == pictures
    for number in ("62.5 +/- 5.3", "70.0 +/- 7.1", "−7.5"):
        assert number in html and number in markdown
