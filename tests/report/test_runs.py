"""Runs of a sweep: which are read, what their settings are called, which one stands for a cell."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps import BATCH, SELECTED, write_run, write_sweep

from dynmoe.records import RecordError, RunFolder
from dynmoe.report.run import Outcome
from dynmoe.report.runs import Absent, Problem, different_conditions, read_runs
from dynmoe.report.setting_names import _words

PROBLEM = Problem("RotatedDigits", "domainbed", "training_domain_validation")


def named(folder: Path) -> list[str]:
    return list(dict.fromkeys(run.setting for run in read_runs([folder]).runs))


def test_a_sweep_is_read_in_order_and_reports_the_selected_step(tmp_path: Path) -> None:
    settings = ["DynMoE", "top-2 of 8", "top-1 of 8", "GMoE top-1 of 6", "top-2 of 4", "dense"]
    write_sweep(tmp_path, {name: {"0": [0.5], "15": [0.625, 0.75]} for name in settings})
    collection = read_runs([tmp_path])
    assert named(tmp_path) == [
        "dense",
        "GMoE top-1 of 6",
        "top-2 of 4",
        "top-1 of 8",
        "top-2 of 8",
        "DynMoE",
    ]
    assert [(run.environment, run.repetition) for run in collection.runs[:3]] == [
        ("0", (0, 0)),
        ("15", (0, 0)),
        ("15", (1, 0)),
    ]
    assert collection.runs[2].outcome == Outcome(SELECTED, 0.75, 0.75, last=0.76, is_selected=True)
    assert [run.kind for run in collection.runs[::3]] == ["dense", *["fixed"] * 4, "adaptive"]
    assert collection.problems == [PROBLEM]
    assert not collection.absent and not collection.warnings and not collection.others


def test_runs_and_sweeps_may_be_given_together_and_twice(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", seed=0)
    other = write_run(tmp_path / "b", seed=1)
    collection = read_runs([tmp_path / "a", other.path, one.path, tmp_path / "a"])
    assert [run.folder.path for run in collection.runs] == [one.path, other.path]
    assert not collection.warnings


def test_settings_that_share_a_name_say_in_what_they_differ(tmp_path: Path) -> None:
    write_run(tmp_path, "DynMoE")
    write_run(tmp_path, "DynMoE", seed=1)
    write_run(tmp_path, "DynMoE", config={"task.optimizer.lr": 0.01})
    write_run(tmp_path, "dense", config={"task.optimizer.lr": 0.01})
    write_run(tmp_path, "DynMoE", config={"moe.adaptation.length": 300, "extra.key": True})
    assert named(tmp_path) == [
        "dense",
        "DynMoE, extra.key=True, moe.adaptation.length=300, task.optimizer.lr=0.001",
        "DynMoE, moe.adaptation.length=100, task.optimizer.lr=0.001",
        "DynMoE, moe.adaptation.length=100, task.optimizer.lr=0.01",
    ]


def test_dense_has_one_name_in_old_runs_too(tmp_path: Path) -> None:
    write_run(tmp_path, "dense")
    write_run(tmp_path, "dense", seed=1, config={"moe.algorithm": "ERM"})
    assert named(tmp_path) == ["dense"]


def test_names_are_made_within_a_problem(tmp_path: Path) -> None:
    write_run(tmp_path)
    write_run(
        tmp_path,
        facts={"dataset": "PACS"},
        config={"data.name": "PACS", "data.batch_size": 4},
    )
    write_run(tmp_path, seed=1, config={"data.root": "/elsewhere"})
    assert named(tmp_path) == ["DynMoE"]
    assert len(read_runs([tmp_path]).problems) == 2


def test_the_best_draw_by_validation_is_reported(tmp_path: Path) -> None:
    def draw(number: int, accuracy: float, validation: float, lr: float) -> None:
        write_run(
            tmp_path,
            "dense",
            accuracy,
            validation=validation,
            hparams_seed=number,
            config={"task.optimizer.lr": lr, "data.batch_size": BATCH + number},
        )

    draw(0, 0.9, 0.7, 0.001)
    draw(1, 0.6, 0.8, 0.02)
    draw(2, 0.95, 0.75, 0.03)
    collection = read_runs([tmp_path])
    (run,) = collection.runs
    assert (run.setting, run.facts["hparams_seed"]) == ("dense", 1)
    assert run.outcome == Outcome(SELECTED, 0.6, 0.8, last=0.61, is_selected=True)
    assert [other.facts["hparams_seed"] for other in collection.others] == [0, 2]


def test_values_varied_by_hand_are_settings_beside_the_draws(tmp_path: Path) -> None:
    write_run(tmp_path, "dense")
    write_run(tmp_path, "dense", config={"task.optimizer.lr": 0.01})
    write_run(tmp_path, "dense", hparams_seed=1, config={"task.optimizer.lr": 0.02})
    keys = "dense, data.batch_size={}, task.optimizer.lr={}, task.optimizer.weight_decay={}"
    assert named(tmp_path) == [
        keys.format(BATCH, 0.001, 0.0),
        keys.format(BATCH, 0.01, 0.0),
        keys.format("drawn", "drawn", "drawn"),
    ]


def test_leave_one_domain_out_takes_its_step_from_pairs(tmp_path: Path) -> None:
    rule = {"selection": "leave_one_domain_out"}
    run = write_run(tmp_path, "dense", 0.5, facts=rule)
    for other in (1, 2):
        pair = write_run(tmp_path / "pairs", "dense", 0.5, str(15 * other), seed=0)
        lines = [json.loads(line) for line in (pair.path / "results.jsonl").open()]
        for line in lines:
            line["args"]["test_envs"] = [0, other]
            line[f"env{other}_in_acc"] = 0.9 if line["step"] == 50 else 0.1
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (pair.path / "results.jsonl").write_text(text)
        facts = pair.read_run()
        facts["config"]["data.test_envs"] = [0, other]
        pair.write_run({**facts, **rule, "test_envs": [0, other]})
    alone = read_runs([run.path])
    assert not alone.runs[0].outcome.is_selected
    collection = read_runs([tmp_path / "pairs", run.path])
    (chosen,) = collection.runs
    assert (chosen.outcome.step, chosen.outcome.is_selected) == (50, True)
    assert [other.environment for other in collection.others] == ["0+15", "0+30"]


def change(folder: RunFolder, **last: Any) -> None:
    """Write entries over those of the last result."""
    *before, record = folder.read("results")
    text = "".join(json.dumps(each) + "\n" for each in (*before, record | last))
    (folder.path / "results.jsonl").write_text(text)


def test_a_finished_run_without_a_sound_result_enters_no_mean(tmp_path: Path) -> None:
    write_run(tmp_path, "DynMoE", 0.5)
    write_run(tmp_path, "DynMoE", 0.9, seed=1, facts={"nonfinite_step": 12})
    change(write_run(tmp_path, "DynMoE", 0.9, seed=2), loss=math.nan)
    change(write_run(tmp_path, "DynMoE", 0.9, seed=3), nonfinite_step=140)
    write_run(tmp_path, "DynMoE", 0.9, seed=4, facts={"steps": 5001})
    write_run(tmp_path, "DynMoE", math.nan, seed=5)
    collection = read_runs([tmp_path])
    assert [run.repetition for run in collection.runs] == [(0, 0)]
    assert not collection.others
    assert [(entry.repetition, entry.state, entry.why) for entry in collection.absent] == [
        ((1, 0), "diverged", "the training loss was not finite at step 12"),
        ((2, 0), "diverged", "the training loss was not finite at step 150"),
        ((3, 0), "diverged", "the training loss was not finite at step 140"),
        ((4, 0), "short", "151 of 5001 steps are recorded"),
        ((5, 0), "without a score", "accuracy on 0/in is not a number"),
    ]
    assert {entry.environment for entry in collection.absent} == {"0"}
    assert collection.absent[0].problem == PROBLEM and collection.absent[0].setting == "DynMoE"


def test_pairs_of_test_environments_only_select(tmp_path: Path) -> None:
    for env in ("0", "15", "30"):
        write_run(tmp_path, "dense", 0.5, env)
    for pair in ([0, 1], [0, 2], [1, 2]):
        write_run(tmp_path / "pairs", "dense", 0.9, facts={"test_envs": pair})
        (tmp_path / "pairs" / "digits_dense_env0_seed0").rename(tmp_path / f"pair{sum(pair)}")
    collection = read_runs([tmp_path])
    assert [run.environment for run in collection.runs] == ["0", "15", "30"]
    assert not collection.others
    (warning,) = collection.warnings
    assert warning.startswith("3 runs with several test environments left out")
    # Alone they are what was asked for.
    for folder in tmp_path.glob("digits_*"):
        shutil.rmtree(folder)
    assert [run.environment for run in read_runs([tmp_path]).runs] == ["0+15", "0+30", "15+30"]


@pytest.mark.parametrize(
    ("facts", "difference"),
    [
        ({"device": "cuda"}, "device (cpu; cuda)"),
        ({"threads": 1}, "threads (2; 1)"),
        ({"runtime": {"precision": "bf16-mixed"}}, "precision (32-true; bf16-mixed)"),
        ({"versions": {"dynmoe": "0.1.0", "torch": "2.14.1"}}, "torch (2.11.0; 2.14.1)"),
        (
            {"versions": {"dynmoe": "0.1.0+abc", "torch": "2.11.0"}},
            "dynmoe (0.1.0; 0.1.0+abc)",
        ),
        (
            {"start_experts": {"blocks.2.mlp": 2, "blocks.3.mlp": 2}},
            "MoE layers (blocks.2 blocks.4; blocks.2 blocks.3)",
        ),
    ],
)
def test_different_conditions_of_compared_runs_are_warned_of(
    tmp_path: Path, facts: dict[str, Any], difference: str
) -> None:
    write_run(tmp_path, "dense")
    write_run(tmp_path, "top-1 of 2")
    runs = read_runs([tmp_path]).runs
    measured = [
        replace(run, facts=run.facts | {"bf16_gain": gain})
        for run, gain in zip(runs, (2.1, 4.7), strict=True)
    ]
    assert different_conditions(measured) == []
    other = replace(runs[1], facts=runs[1].facts | facts)
    assert different_conditions([*runs, other]) == [
        f"RotatedDigits: compared runs differ in {difference}; do not trust small differences"
    ]


def test_what_is_not_done_is_absent_and_says_where_it_belongs(tmp_path: Path) -> None:
    write_run(tmp_path, "dense", seed=0)
    write_run(tmp_path, "dense", seed=1, state="failed")
    write_run(tmp_path, "dense", seed=2, state="stopped")
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "failed.txt").write_text("DataError: no such folder\n\nTraceback\n")
    done = "digits_dense_env0_seed0"
    config = {**RunFolder(tmp_path / done).read_run()["config"], "seed": 3, "data.test_envs": [1]}
    jobs = {
        done: {"overrides": "moe=dense seed=0", "config": config},
        "no_folder": {"overrides": "moe=dense seed=3", "config": config},
    }
    (tmp_path / "sweep.json").write_text(json.dumps({"commands": [], "jobs": jobs}))
    collection = read_runs([tmp_path])
    assert [run.folder.path.name for run in collection.runs] == [done]
    why, place = "DataError: no such folder", (PROBLEM, "dense", "0")
    assert collection.absent == [
        Absent("digits_dense_env0_seed1", "", "failed", why, *place, (1, 0)),
        Absent("digits_dense_env0_seed2", "", "stopped", "", *place, (2, 0)),
        Absent("early", "", "failed", why),
        Absent("no_folder", "moe=dense seed=3", "missing", "", PROBLEM, "dense", "15", (3, 0)),
    ]


def test_a_run_that_cannot_be_used_is_named_and_left_out(tmp_path: Path) -> None:
    good = write_run(tmp_path, seed=0)
    old = write_run(tmp_path, seed=1)
    facts = old.read_run()
    del facts["config"]
    old.write_run(facts)
    damaged = write_run(tmp_path, seed=2)
    (damaged.path / "results.jsonl").write_text("{}\n")
    empty = write_run(tmp_path, seed=3)
    (empty.path / "results.jsonl").write_text("")
    with (good.path / "routing.jsonl").open("a") as file:
        file.write('{"step": 15')
    collection = read_runs([tmp_path])
    assert [run.folder.path for run in collection.runs] == [good.path]
    cut, *left_out = collection.warnings
    assert cut == f"{good.path / 'routing.jsonl'}: its last line was cut short; ignored"
    for warning, run, what in zip(
        left_out, (old, damaged, empty), ("`config`", "line 1", "results"), strict=True
    ):
        assert str(run.path) in warning and what in warning


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: None, "expected a JSON object, found 'None'"),
        (lambda facts: [], "expected a JSON object, found '[]'"),
        (lambda facts: {"config": {}}, "expected `dataset` as text, found none"),
        *(
            (
                lambda facts, key=key: {k: v for k, v in facts.items() if k != key},
                f"run.json: expected `{key}` as {kind}, found none; run it again with ",
            )
            for key, kind in [
                *(("env_names", "a list"), ("test_envs", "a list"), ("class_names", "a list")),
                *(("seed", "a whole number"), ("steps", "a whole number")),
                *(("batch_size", "a whole number"), ("selection", "text")),
                *(("start_experts", "an object"), ("costs", "an object")),
                *(("selects", "an object"), ("reported", "an object"), ("modality", "text")),
            ]
        ),
        (lambda facts: facts | {"config": {}}, "config: expected `moe.algorithm` as text"),
        (lambda facts: facts | {"costs": {}}, "costs: expected `parameters` as an object"),
        (lambda facts: facts | {"selects": {}}, "selects: expected `sets` as a list"),
        (lambda facts: facts | {"start_experts": {}}, "expected `blocks.2.mlp` as a whole number"),
        (lambda facts: facts | {"selection": "best"}, "expected `selection` as one of training_"),
        (lambda facts: facts | {"test_envs": [7]}, "expected `test_envs` as positions in `env_nam"),
    ],
)
def test_damaged_facts_are_named_and_their_run_left_out(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    good, bad = write_run(tmp_path, seed=0), write_run(tmp_path, seed=1)
    (bad.path / "run.json").write_text(json.dumps(change(bad.read_run())))
    collection = read_runs([tmp_path])
    assert [run.folder.path for run in collection.runs] == [good.path]
    (warning,) = collection.warnings
    assert warning.startswith(str(bad.path / "run.json")) and message in warning
    assert warning.endswith("run again with overwrite=true; left out") or warning.endswith(
        "run it again with overwrite=true; left out"
    )


@pytest.mark.parametrize("setting", ["DynMoE", "top-1 of 2"])
@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("results.jsonl", '{"step": 50}', "line 2: expected `args` as an object"),
        ("results.jsonl", '{"step": null}', "line 2: expected a JSON object with a step"),
        ("routing.jsonl", '{"step": 100, "la', "line 2: expected a JSON object with a step"),
        ("routing.jsonl", '{"step": 100, "a": 1}', "step 100: expected `layer` as text"),
        ("events.jsonl", "{", "expected a JSON object with a step, found '{'"),
        ("events.jsonl", '{"step": 50}', "step 50: expected `layer` as text"),
    ],
)
def test_a_damaged_line_is_named_and_its_run_left_out(
    tmp_path: Path, setting: str, file: str, line: str, message: str
) -> None:
    good, bad = write_run(tmp_path, setting, seed=0), write_run(tmp_path, setting, seed=1)
    lines = (bad.path / file).read_text().splitlines()
    lines[1:2] = [line]
    (bad.path / file).write_text("".join(f"{text}\n" for text in lines))
    collection = read_runs([tmp_path])
    assert [run.folder.path for run in collection.runs] == [good.path]
    (warning,) = collection.warnings
    assert warning.startswith(str(bad.path / file)) and message in warning


def test_a_layer_or_environment_without_its_line_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    lines = (run.path / "routing.jsonl").read_text().splitlines()
    kept = [text for text in lines if not ('"step": 100' in text and '"15"' in text)]
    (run.path / "routing.jsonl").write_text("".join(f"{text}\n" for text in kept))
    (warning,) = read_runs([tmp_path]).warnings
    assert "expected a line for every layer and environment at step 100, found 4 lines" in warning


def test_copies_and_different_data_are_named(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    copy = write_run(tmp_path / "b")
    write_run(tmp_path / "a", "dense", facts={"data_hash": "other"})
    collection = read_runs([tmp_path / "a", tmp_path / "b"])
    assert [run.folder.path for run in collection.runs if run.kind == "adaptive"] == [first.path]
    repeats, data = collection.warnings
    assert repeats == f"{copy.path}: repeats {first.path}; left out"
    assert "seed 0" in data and "abc0, other" in data


def test_many_copies_are_one_warning(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        for seed in range(3):
            write_run(tmp_path / folder, seed=seed)
    a, b = tmp_path / "a", tmp_path / "b"
    name = "digits_dynmoe_env0_seed0"
    assert read_runs([a, b]).warnings == [
        f"3 runs repeat others, the first is {b / name}: repeats {a / name}; left out"
    ]


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="found no run"):
        read_runs([tmp_path])
    with pytest.raises(RecordError, match="found no folder"):
        read_runs([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    "text",
    ['{"jobs"', "[]", '{"jobs": [1]}', '{"jobs": {"a": null}}', '{"jobs": {}, "commands": 1}'],
)
def test_a_damaged_sweep_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(RecordError, match=r"sweep\.json: expected the jobs"):
        read_runs([tmp_path])


def test_a_job_whose_configuration_says_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"commands": [], "jobs": {"a": {"config": {"seed": 0}}}}')
    with pytest.raises(RecordError, match=r"sweep\.json, a: expected `moe.algorithm` as text"):
        read_runs([tmp_path])


def test_routing_at_the_outcome_is_that_of_the_full_records(tmp_path: Path) -> None:
    write_run(tmp_path)
    (run,) = read_runs([tmp_path]).runs
    lines = run.folder.read("routing")
    assert run.routing_at_outcome == [line for line in lines if line["step"] == SELECTED]
    assert run.training_routing == [line for line in lines if line["source"] == "train"]
    assert len(run.routing_at_outcome) == 8


def words_of(configs: list[dict[str, Any]]) -> list[list[str]]:
    return list(_words({str(number): each for number, each in enumerate(configs)}).values())


def test_settings_with_one_part_changed_are_named_by_it() -> None:
    parts: list[dict[str, Any]] = [{}, {"a": 2}, {"a": 3}, {"b": 2}, {"b": 3, "c": None}]
    configs = [{"a": 1, "b": 1, "x": 1, **part} for part in parts]
    assert words_of(configs) == [[], ["a=2"], ["a=3"], ["b=2"], ["b=3", "c=None"]]
    assert words_of(configs[:2]) == [["a=1"], ["a=2"]]
    one_lacks = [{"a": 1}, {"a": 1, "c": 2}, {"a": 1, "c": 3}, {"a": 1, "c": 4}, {"c": 2}]
    assert words_of(one_lacks) == [["a=1"], *(["a=1", f"c={c}"] for c in (2, 3, 4)), ["c=2"]]
