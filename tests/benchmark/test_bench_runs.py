"""`dynmoe-bench step --runs`: trained runs of a tiny sweep, and what is refused. No time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refused, Run
from sweeps import write_run
from tiny_runs import tiny_config

from dynmoe import job
from dynmoe.benchmark.candidates import candidates, groups
from dynmoe.benchmark.models import data_of, trained, training_batches
from dynmoe.records import RunFolder

pytestmark = pytest.mark.usefixtures("short_samples")

QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "2"]
SETTINGS = ["dense", "top-2 of 4", "DynMoE"]


def again(folder: Path, seed: int) -> None:
    """A repetition, made of the same records."""
    copy = folder.with_name(f"{folder.name}_seed{seed}")
    shutil.copytree(folder, copy)
    facts = json.loads((copy / "run.json").read_text())
    facts["seed"] = facts["config"]["seed"] = seed
    (copy / "run.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three settings, trained with `malloc` as it is: the process goes on to other tests."""
    path = tmp_path_factory.mktemp("sweep")
    few = ("moe.num_experts=4", "task.steps=1", "runtime.malloc=system")
    for name, moe in (("c", "dynmoe"), ("a", "topk"), ("b", "dense")):
        (path / name).mkdir()
        config = tiny_config(*(few if moe != "dense" else few[1:]), moe=moe)
        job.train(config, RunFolder(path / name))
        RunFolder(path / name).mark_done()
    again(path / "a", seed=1)
    (path / "b" / "checkpoints" / "selected.ckpt").unlink()
    return path


def test_times_one_run_of_each_setting(
    sweep: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    run("step", "--runs", str(sweep), *QUICK)
    content: dict[str, Any] = json.loads((sweep / "timing.json").read_text())
    assert content["machine"].keys() == {"cpu", "cores", "threads", "torch", "device", "dtype"}
    assert content["machine"]["dtype"] == "32-true"
    settings = {"matmul_precision", "malloc", "fused_attention", "wait"}
    assert content["settings"].keys() == settings
    assert content["workload"] == {"batch": 20}  # 4 images of 5 environments
    rows = content["rows"]
    assert [(row["mode"], row["setting"], row["run"]) for row in rows] == [
        (mode, setting, name)
        for mode in ("train", "inference")
        for setting, name in zip(SETTINGS, "bac", strict=True)
    ]
    for row in rows:
        assert row["environment"] == "0" and row["rounds"] == 2
        numbers = [row[key] for key in ("median_ms", "samples_per_s", "ratio")]
        for key in ("quartiles_ms", "samples_per_s_quartiles", "ratio_quartiles"):
            numbers += row[key]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert (row["peak_bytes"] is not None) == (row["mode"] == "train")
        assert (row["mean_k"] is None) == (row["setting"] == "dense")
        assert row["ratio"] == 1 or row["setting"] != "dense"
    assert {row["mean_k"] for row in rows if row["setting"] == "top-2 of 4"} == {2}

    shown = capsys.readouterr().out
    assert all(setting in shown for setting in SETTINGS)
    assert "of dense" in shown and str(sweep / "timing.json") in shown


def test_times_a_single_run_into_the_file_given(sweep: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "new" / "timing.json"
    run("step", "--runs", str(sweep / "c"), "--json", str(file), "--mode", "train", *QUICK)
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["setting"], row["mode"], row["ratio"]) == ("DynMoE", "train", 1)
    assert not (sweep / "c" / "timing.json").exists()


def test_models_are_those_of_the_checkpoints_and_stay_so(sweep: Path) -> None:
    """With the run's own optimizer, at learning rate 0, and training images."""
    from dynmoe.benchmark.steps import Training

    ((_, group),) = groups(candidates(sweep))
    data = data_of(group[0].cfg)
    batches = training_batches(data, torch.device("cpu"))
    models = trained(group, data, False, torch.device("cpu"), "32-true")
    assert len({batch.image.sum().item() for batch in batches}) == len(batches) == 8
    assert all(batch.env.unique().tolist() == [1, 2, 3, 4, 5] for batch in batches)
    for candidate, each in zip(group, models, strict=True):
        saved = torch.load(candidate.checkpoint, weights_only=True)["state_dict"]
        step = Training(each.model, each.loss, each.new_optimizer(), batches, each.precision)
        step()
        assert type(step.optimizer) is torch.optim.Adam and step.optimizer.state
        for name, value in each.model.state_dict().items():
            assert torch.equal(value, saved[f"backbone.{name}"]), name


def failed(path: Path) -> list[str]:
    write_run(path, state="failed")
    return []


def without_checkpoint(path: Path) -> list[str]:
    write_run(path)
    return []


def beside(*arguments: str) -> Callable[[Path], list[str]]:
    return lambda path: list(arguments)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (failed, "expected a finished run, found none: digits_dynmoe_env0_seed0 is failed"),
        (without_checkpoint, "expected checkpoints/selected.ckpt or last.ckpt, found neither"),
        (beside(), "expected a sweep or a run, found no run.json"),
        (beside("--k", "3"), "--k: not together with --runs"),
        (beside("--only", "dense"), "--only: not together with --runs"),
        (beside("--batch", "8"), "--batch: not together with --runs"),
        (beside("moe=gmoe"), "moe=gmoe: not together with --runs"),
    ],
)
def test_refuses(
    prepare: Callable[[Path], list[str]], message: str, tmp_path: Path, refused: Refused
) -> None:
    arguments = prepare(tmp_path)
    assert message in refused("step", "--runs", str(tmp_path), *arguments, *QUICK)
    assert not (tmp_path / "timing.json").exists()


def test_runs_under_other_conditions_are_refused(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    shutil.copytree(sweep, tmp_path / "other")
    config = tmp_path / "other" / "c" / "config.yaml"
    config.write_text(config.read_text().replace("precision: 32-true", "precision: bf16-mixed"))
    (config.parent / "done").write_text("\n")  # taken as it is
    with pytest.raises(SystemExit):
        run("step", "--runs", str(tmp_path / "other"), *QUICK)
    assert "trainer.precision is 32-true in" in capsys.readouterr().err
