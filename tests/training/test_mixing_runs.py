"""Runs that mix data: exact resume, probes without a trace, ranks and workers alike, records."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Run
from tiny_texts import DEV, TRAIN, config, write_mix

from dynmoe import job
from dynmoe.data.base import TaskData
from dynmoe.data.mixing import load_distances, moved_weights
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.report import figures, summary
from dynmoe.report.mixing import draw_mixing, drawn, mixed
from dynmoe.report.run import read_run
from dynmoe.tasks.text import TextClassification
from dynmoe.training import evaluate
from dynmoe.training.mixing import DataMixing, reference_losses
from dynmoe.training.quantize import quantize

# 9 steps an epoch, two epochs; probes after every third step.
MIX = (
    "data=glue_mix",
    "data.tasks=[rte,cola,stsb]",
    "mixing=dynamic",
    "mixing.every=3",
    "mixing.probe_tokens=20",
    "mixing.eta=50",
    "mixing.c=0.1",
)
MEASURED = ("step_time", "eval_time", "mem_gb", "args", "seconds")


def train(root: Path, path: Path, *overrides: str) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(exist_ok=True)
    job.train(config(root, f"paths.outputs={root}", *MIX, *overrides), folder)
    return folder


def everything(folder: RunFolder) -> dict[str, Any]:
    kinds = ("results", "routing", "events", "mixing")
    return {
        kind: [{k: v for k, v in each.items() if k not in MEASURED} for each in folder.read(kind)]  # type: ignore[arg-type]
        for kind in kinds
    }


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    state = torch.load(folder.path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return dict(state)


def same_weights(a: RunFolder, b: RunFolder) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mix(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train once, for all tests that only read the run."""
    return train(root, tmp_path_factory.mktemp("trained") / "run")


def test_weights_follow_the_recorded_loads(trained: RunFolder) -> None:
    facts, probes = trained.read_run()["mixing"], trained.read("mixing")
    assert [each["step"] for each in probes] == [2, 5, 8, 11, 14, 17]
    before = np.array([*facts["start"].values()])
    assert before == pytest.approx(np.full(3, 1 / 3))
    for each in probes:
        assert each["sources"] == ["cola", "rte", "stsb"]
        ((layer, load_DS),) = each["load"].items()
        assert ".2." in layer  # the last of two
        assert each["delta"] == pytest.approx(load_distances(load_DS).tolist())
        before = moved_weights(before, each["delta"], 50, 0.1)
        assert each["weights"] == pytest.approx(before.tolist())
    assert np.ptp(before) > 0.1
    assert all(n > 0 for n in facts["probe"].values())
    assert {size + facts["probe"][task] for task, size in facts["sizes"].items()} == {TRAIN}
    assert trained.read_run()["sizes"] == {"train": 3 * TRAIN, "rte": DEV, "cola": DEV, "stsb": DEV}


def test_each_task_has_scores_and_their_mean_selects(trained: RunFolder) -> None:
    run = read_run(trained)
    assert run.facts["selects"] == run.facts["reported"]
    assert run.facts["reported"] == {"sets": ["rte", "cola", "stsb"], "measure": "score"}
    metrics = {"rte": "accuracy", "cola": "matthews", "stsb": "pearson"}
    for record in run.results:
        assert all(metrics[task] in scores for task, scores in record["scores"].items())
    means = [np.mean([s["score"] for s in each["scores"].values()]) for each in run.results]
    assert run.outcome.accuracy == pytest.approx(max(means))


def test_the_summary_and_the_figures_show_the_sources(trained: RunFolder) -> None:
    run = read_run(trained)
    text = summary.to_markdown(run)
    for word in ("Sources, mixing=dynamic", "| cola", "held-out loss", "dynamic, 6 probes of 3"):
        assert word in text
    assert "mixing" in figures.figures_of(run)
    picture = draw_mixing([run])
    assert picture is not None
    found = mixed(run)
    assert found is not None
    lines = picture.figure.axes[0].lines
    assert [line.get_label() for line in lines] == found.sources
    assert lines[0].get_xdata().tolist() == [0, 4, 7, 10, 13, 16, 18]
    assert drawn(run, found).sum() == pytest.approx(8 * 18)


@pytest.mark.parametrize("step", [7, pytest.param(10, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_never_stopped(
    root: Path, trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed in the middle of a window, between two evaluations."""
    always = "+task.save_every=1"
    straight = TextClassification.training_step

    def until(self: TextClassification, batch: Any, index: int) -> Any:
        if self.global_step == step:
            raise RuntimeError("killed")
        return straight(self, batch, index)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TextClassification, "training_step", until)
        train(root, folder, always)
    assert [each["step"] for each in RunFolder(folder).read("mixing")] == [*range(2, step, 3)]
    resumed = train(root, folder, always)
    kept, whole = everything(resumed), everything(trained)
    assert kept["mixing"] == whole["mixing"]
    assert [each["scores"] for each in kept["results"]] == [
        each["scores"] for each in whole["results"]
    ]
    assert same_weights(resumed, trained)


def test_probes_leave_no_trace(
    root: Path, trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routing, adaptation, scores and weights are those of a run that is told the same weights."""
    told = {each["step"] + 1: np.array(each["weights"]) for each in trained.read("mixing")}

    def probe(self: DataMixing, trainer: Any, task: Any) -> None:
        self.mixture.move(trainer.global_step, told[trainer.global_step])

    monkeypatch.setattr(DataMixing, "probe", probe)
    without = train(root, tmp_path / "run")
    assert {**everything(without), "mixing": None} == {**everything(trained), "mixing": None}
    assert same_weights(without, trained)


def test_micro_batches_are_parts_of_one_batch(
    root: Path, trained: RunFolder, tmp_path: Path
) -> None:
    """The first probe sees a model that was trained on the same examples."""
    cut = train(root, tmp_path / "run", "trainer.accumulate_grad_batches=2", "task.epochs=1")
    assert cut.read("mixing")[0]["load"].keys() == trained.read("mixing")[0]["load"].keys()
    assert [each["step"] for each in cut.read("mixing")] == [2, 5, 8]


def test_an_evaluation_repeats_the_scores(
    trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate.evaluate(*evaluate.parse([f"run={trained.path}", "checkpoint=last"])[1:])
    recorded = trained.read("results")[-1]["scores"]
    assert scores.keys() == recorded.keys()
    for task, measures in scores.items():
        assert measures == pytest.approx(recorded[task], rel=1e-5)


def test_losses_above_a_reference(root: Path, trained: RunFolder, tmp_path: Path) -> None:
    """The reference is a run with probes; a dense model has losses as well."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    own = [each for each in MIX if each != "mixing=dynamic"]
    cfg = config(
        root,
        f"paths.outputs={root}",
        *own,
        "mixing=ref_loss",
        f"mixing.reference={trained.path}",
        "task.epochs=1",
        moe="dense",
    )
    job.train(cfg, folder)
    losses = trained.read("mixing")[-1]["loss"]
    for each in folder.read("mixing"):
        assert each["delta"] == pytest.approx(np.subtract(each["loss"], losses).tolist())
        assert each["load"] == {}
    assert draw_mixing([read_run(folder)]) is not None


@pytest.mark.parametrize(
    ("reference", "match"),
    [
        ({"a": 1.0}, r"mixing\.reference: .*a, b, found"),
        ({"a": 1.0, "b": float("nan")}, r"mixing\.reference: .*each source"),
        ("/nowhere", "has no losses of sources.*mixing=uniform mixing.every=100"),
    ],
)
def test_a_reference_of_other_sources_is_refused(reference: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        reference_losses(reference, ["a", "b"])
    assert reference_losses({"b": 2, "a": 1.0}, ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["mixing.layers=[2]"], r"mixing\.layers: expected indices of 2 MoE layers, from -2 to 1"),
        (["mixing.weights={rte: 1}"], r"mixing\.weights: .*cola, rte, stsb"),
    ],
)
def test_what_the_data_tell_is_refused_before_training(
    root: Path, tmp_path: Path, overrides: list[str], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        train(root, tmp_path / "run", *overrides)
    assert not (tmp_path / "run" / "run.json").exists()


# Images: the environments are the sources.

IMAGES = ("mixing=dynamic", "mixing.every=2", "mixing.probe_tokens=40", "mixing.eta=50")


@pytest.mark.usefixtures("no_pictures")
def test_equal_weights_are_domainbeds_batches(run: Run) -> None:
    """Bit for bit: a batch has as many images of each environment as without mixing."""
    without, uniform = run(name="without"), run("mixing=uniform", name="uniform")
    assert everything(without) == everything(uniform)
    assert same_weights(without, uniform)


def test_weights_of_environments_move(run: Run) -> None:
    folder = run(*IMAGES)
    facts, probes = folder.read_run(), folder.read("mixing")
    assert list(facts["mixing"]["start"]) == ["15", "30", "45", "60", "75"]
    assert [each["step"] for each in probes] == [1, 3, 5, 7, 8]
    assert np.ptp(probes[-1]["weights"]) > 0
    assert facts["mixing"]["probe"] == dict.fromkeys(facts["mixing"]["start"], 10)  # of 4 patches


@pytest.mark.slow
def test_workers_do_not_fetch_ahead_of_the_weights(run: Run) -> None:
    alone, workers = run(*IMAGES, name="alone"), run(*IMAGES, "data.workers=2", name="workers")
    assert everything(alone) == everything(workers)


def test_calibration_reads_what_is_trained_on(
    trained: RunFolder, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with mixed data, quantised: probes are held out of its calibration too."""
    copied, seen = RunFolder(tmp_path / "run"), []
    shutil.copytree(trained.path, copied.path)
    mix = TaskData.mix

    def watched(data: TaskData, *args: Any, **options: Any) -> Any:
        seen.append(mix(data, *args, **options))
        return seen[-1]

    monkeypatch.setattr(TaskData, "mix", watched)
    own = (f"paths.outputs={root}", *MIX, "+quant.bits.default=8", "+quant.calib.batches=1")
    cfg = config(root, *own)
    lines = quantize(copied, copied.path / "checkpoints" / "last.ckpt", cfg)
    assert [line["method"] for line in lines] == ["fp32", "gptq"]
    (mixture,) = seen
    assert mixture.facts == trained.read_run()["mixing"]
