"""Whole vision-language runs: a stage follows the one before it, whatever interrupts them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tiny_vl import STAGES, configuration, records, run, stage_folders
from torch import Tensor

from dynmoe import job
from dynmoe.data.base import TaskData
from dynmoe.errors import ConfigError
from dynmoe.layers import moe_layers
from dynmoe.records import RunFolder
from dynmoe.report import figures
from dynmoe.tasks.vl import VisionLanguage
from dynmoe.training import build, evaluate


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run of all three stages, which nobody changes; without pictures."""
    path = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda run: None)
        run(path)
    return path


def each_stage(outputs: Path) -> dict[str, RunFolder]:
    """Asserts that there is one run of each."""
    found = {}
    for stage, (folder,) in stage_folders(outputs).items():
        found[stage] = folder
    return found


def weights(folder: RunFolder) -> dict[str, Tensor]:
    file = folder.path / "checkpoints" / "last.ckpt"
    state: dict[str, Tensor] = torch.load(file, weights_only=True)["state_dict"]
    return {name.removeprefix("backbone."): value for name, value in state.items()}


def assert_equal_weights(found: RunFolder, expected: RunFolder) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_three_stages_leave_what_they_promise(outputs: Path) -> None:
    folders = each_stage(outputs)
    for stage, folder in folders.items():
        assert folder.is_done
        results, facts = folder.read("results"), folder.read_run()
        assert [record["step"] for record in results] == [1, 3]
        assert all(math.isfinite(record["loss"]) for record in results)
        scores = results[0]["scores"]
        assert (
            {"score", "kind_colour", "loss"} <= scores["test"].keys() == scores["shuffled"].keys()
        )
        assert (facts["stage"], facts["env_names"]) == (stage, ["test", "shuffled"])
        assert facts["sizes"]["train"] == 24 and facts["sizes"]["test"] == 10
        assert (facts["selection"], facts["weights"]) == (
            "last_step",
            "from scratch; vision tower from scratch",
        )
        examples = folder.read("examples")
        assert [(e["step"], e["row"]) for e in examples[:4]] == [(1, row) for row in range(4)]
        saved = OmegaConf.load(folder.path / "config.yaml")
        assert saved.stage.name == stage
        for name in ("summary.md", "checkpoints/selected.ckpt"):
            assert (folder.path / name).exists(), name
    last = folders["moe"]
    layers = [f"language_model.model.layers.{block}.mlp" for block in (0, 2)]
    assert [record["layer"] for record in last.read("events")] == layers * 2
    routing = last.read("routing")
    assert {record["source"] for record in routing} == {"train", "test", "shuffled"}
    assert all(record["parts"].keys() == {"prompt", "image", "answer"} for record in routing)
    assert last.read_run()["start_experts"] == dict.fromkeys(layers, 2)
    for stage in ("align", "instruct"):
        assert folders[stage].read("routing") == folders[stage].read("events") == []
        assert folders[stage].read_run()["start_experts"] == {}


def test_a_stage_starts_where_the_one_before_it_ended(outputs: Path) -> None:
    """Experts are copies of its FFNs; what the stage does not train stays."""
    folders = each_stage(outputs)
    before, after = weights(folders["instruct"]), weights(folders["moe"])
    cfg = configuration(outputs)
    data = build.build_data(cfg)
    data.setup()
    start = build.build_task(cfg, data, fused_attention=True).backbone
    for name, layer in moe_layers(start).items():
        for slot in layer.experts.slots:
            for part in ("gate", "up", "down"):
                trained = before[f"{name}.{part}_proj.weight"]
                assert torch.equal(slot.get_submodule(part).weight, trained)
    shared = before.keys() & after.keys()
    assert all(torch.equal(start.state_dict()[name], before[name]) for name in shared)
    changed = {name for name in shared if not torch.equal(before[name], after[name])}
    trained = {name for name in shared if name.startswith("projector.")}
    trained |= {name for name in shared if ".mlp." in name and name.startswith("language_model.")}
    assert changed == trained
    first, second = weights(folders["align"]), weights(folders["instruct"])
    assert first.keys() == second.keys()
    assert all(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_runs_that_are_stopped_in_every_stage_go_on(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, stopped = VisionLanguage.training_step, set()

    def training_step(self: VisionLanguage, batch: Any, index: int) -> Any:
        stage = Path(self.trainer.default_root_dir).parents[1].name
        if self.global_step == 3 and stage not in stopped:
            stopped.add(stage)
            raise RuntimeError(f"killed in {stage}")
        return step(self, batch, index)

    monkeypatch.setattr(VisionLanguage, "training_step", training_step)
    for stage in ("vl_align", "vl_instruct", "vl"):
        with pytest.raises(RuntimeError, match=f"killed in {stage}$"):
            run(tmp_path)
    run(tmp_path)
    straight, broken = each_stage(outputs), each_stage(tmp_path)
    for stage in STAGES:
        assert broken[stage].path.name == straight[stage].path.name
        assert records(broken[stage]) == records(straight[stage])
        assert_equal_weights(broken[stage], straight[stage])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of what is trained, in order."""
    found: list[str] = []
    real = job.train

    def spy(cfg: Any, folder: RunFolder) -> bool:
        found.append(folder.path.parent.name)
        return real(cfg, folder)

    monkeypatch.setattr(job, "train", spy)
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_stages_are_shared_by_settings_and_shown_when_done(
    outputs: Path, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(outputs, tmp_path, dirs_exist_ok=True)
    before = each_stage(tmp_path)
    for moe in (("moe=topk", "moe.num_experts=2"), ("moe=dense",)):
        run(tmp_path, *moe)
        assert (
            f"stage instruct: done before, {before['instruct'].path}\n" in capsys.readouterr().out
        )
    assert trained == ["vl", "vl"] and len(stage_folders(tmp_path)["moe"]) == 3
    for command in ((), ("moe=dense",), ("stage=instruct",), ("stage=align",)):
        run(tmp_path, *command)
        assert "This run was finished before; nothing is trained" in capsys.readouterr().out
    assert len(trained) == 2
    assert {stage: len(runs) for stage, runs in stage_folders(tmp_path).items()} == {
        "align": 1,
        "instruct": 1,
        "moe": 3,
    }


@pytest.mark.usefixtures("no_pictures")
def test_a_start_of_ones_own_trains_nothing_before(
    outputs: Path, tmp_path: Path, trained: list[str]
) -> None:
    """And gives the very same run."""
    expected = each_stage(outputs)
    folder = run(tmp_path, f"stage.start={expected['instruct'].path}")
    assert trained == ["vl"]
    assert records(folder) == records(expected["moe"])
    assert_equal_weights(folder, expected["moe"])


@pytest.mark.parametrize("checkpoint", ["selected", "last"])
def test_evaluation_repeats_the_recorded_scores(
    outputs: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in each_stage(outputs).values():
        arguments = [f"run={folder.path}", f"checkpoint={checkpoint}"]
        scores = evaluate.evaluate(*evaluate.parse(arguments)[1:])
        recorded = folder.read("results")[-1]
        assert scores == recorded["scores"]
        assert "│ test         │ kind colour" in capsys.readouterr().out


# What is refused.


def fails(cfg: Any, message: str) -> None:
    data: TaskData = build.build_data(cfg)
    data.setup()
    with pytest.raises(ConfigError, match=message):
        build.build_task(cfg, data, fused_attention=True)


def test_weights_that_do_not_fit_are_refused(outputs: Path, tmp_path: Path) -> None:
    folders = each_stage(outputs)
    unfit = "for the backbone before it gets MoE layers: the weights do not fit .*"
    instruct = folders["instruct"].path
    for change, found in (
        ("backbone.projector=linear", "not in the model: projector.2"),
        ("backbone.options.intermediate_size=32", r"another size: language_model.* for \["),
        ("backbone.options.num_hidden_layers=5", "missing in the weights: .*layers.4"),
    ):
        cfg = configuration(tmp_path, f"stage.start={instruct}", change)
        fails(cfg, f"^stage.start={instruct}, {unfit}{found}")
    moe = folders["moe"].path
    fails(configuration(tmp_path, f"stage.start={moe}"), f"^stage.start={moe}, {unfit}layers.0.mlp")
    for start in (tmp_path, tmp_path / "nowhere"):
        message = "expected the folder of a finished run with checkpoints/last.ckpt$"
        fails(configuration(tmp_path, f"stage.start={start}"), f"{start.name}: {message}")


def test_a_stage_starts_from_no_earlier_checkpoint(outputs: Path, tmp_path: Path) -> None:
    start = shutil.copytree(each_stage(outputs)["instruct"].path, tmp_path / "instruct")
    last = start / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)
    torch.save({**saved, "global_step": saved["global_step"] - 2}, last)
    message = "last.ckpt: is of step 1, and the run ended with step 3.*overwrite=true"
    fails(configuration(tmp_path, f"stage.start={start}"), message)


def test_on_several_devices_the_stage_before_has_to_be_done(
    tmp_path: Path, trained: list[str]
) -> None:
    message = (
        r"^stage.start: stage instruct is not done. On several devices stages run one by one: run "
        r"the same command with stage=instruct and without moe and name first.$"
    )
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "trainer.devices=2")
    assert trained == []
