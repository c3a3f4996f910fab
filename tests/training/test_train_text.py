"""Whole runs on texts: records, early stop, resume, other sets, regression, submission files."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tiny_texts import DEV, TRAIN, config, pairs, write, write_rte, write_stsb

from dynmoe import job
from dynmoe.errors import ConfigError, DataError
from dynmoe.records import RunFolder
from dynmoe.selection import measured_by
from dynmoe.tasks.text import TextClassification
from dynmoe.training import build, evaluate
from dynmoe.training.callbacks import RunRecorder


@pytest.fixture
def rte(tmp_path: Path) -> Path:
    return write_rte(tmp_path / "glue")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Train on RTE once, for all tests that only read the run."""
    path = tmp_path_factory.mktemp("trained")
    return run(write_rte(path / "glue"), path / "run")


def run(
    root: Path, folder: Path, *overrides: str, moe: str = "dynmoe_glue", show: bool = False
) -> RunFolder:
    made = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    job.train(config(root, f"paths.outputs={root}", "data=rte", *overrides, moe=moe), made)
    if show:
        job.show(made)
    return made


def stable(folder: RunFolder) -> list[dict[str, Any]]:
    dropped = ("step_time", "eval_time", "mem_gb", "args")
    return [
        {k: v for k, v in record.items() if k not in dropped}
        for kind in ("results", "routing", "events")
        for record in folder.read(kind)  # type: ignore[arg-type]
    ]


def test_a_run_leaves_what_it_promises(
    rte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        folder = run(rte, tmp_path / "run", show=True)
    assert "RTE train: expected 2,490 rows, found 22" in caplog.text
    results, facts = folder.read("results"), folder.read_run()
    assert [(r["step"], r["epoch"]) for r in results] == [(2, 1.0), (5, 2.0)]
    assert {"loss", "aux_loss"} <= results[0].keys()
    assert results[0]["scores"]["dev"].keys() == {"accuracy", "score", "loss"}
    assert facts["steps"] == 6 and facts["env_names"] == ["dev"]
    assert facts["sizes"] == {"train": TRAIN, "dev": DEV}
    assert (facts["measure"], facts["samples_per_step"]) == ("accuracy", 8)
    assert facts["costs"]["flops"] is not None
    assert facts["versions"].keys() >= {"transformers", "tokenizers", "datasets"}
    assert [e["step"] for e in folder.read("events")] == [2, 2, 5, 5]
    sources = {r["source"] for r in folder.read("routing")}
    assert sources == {"train", "dev"}
    for name in ("summary.md", "figures/scores.png", "checkpoints/selected.ckpt", "done"):
        assert (folder.path / name).exists()
    assert "dev (reported)" in capsys.readouterr().out


def test_a_vocabulary_is_kept_with_the_run(
    trained: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other training data, which would give other words, dev has the scores that it had."""
    other = write_rte(tmp_path / "glue")
    train = other / "RTE" / "train.tsv"
    train.write_text(train.read_text().replace("cat", "zebra").replace("red", "vermilion"))
    words = [f"run={trained.path}", "checkpoint=last", f"data.root={other}"]
    _, folder, checkpoint, cfg = evaluate.parse(words)
    scores = evaluate.evaluate(folder, checkpoint, cfg)
    assert "data hash" in capsys.readouterr().out
    assert scores["dev"] == pytest.approx(trained.read("results")[-1]["scores"]["dev"])
    anew: Any = build.build_data(cfg)
    anew.setup()
    kept: Any = build.build_data(cfg)
    kept.restore(trained.path)
    kept.read_tokenizer()
    assert not kept.sets  # it needs no data
    assert "zebra" in anew.tokenizer.get_vocab() and "cat" in kept.tokenizer.get_vocab()


def test_routing_counts_real_tokens(trained: RunFolder) -> None:
    """Each of the 22 examples once an epoch: the tokens are those of the texts, not of padding."""
    facts = trained.read_run()
    train_tokens = [
        r["tokens"]
        for r in trained.read("routing")
        if r["source"] == "train" and ".0." in r["layer"]
    ]
    assert train_tokens == [round(facts["mean_tokens"] * TRAIN)] * 2


def test_a_stopped_run_goes_on_as_if_never_stopped(
    rte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(rte, tmp_path / "straight", "task.epochs=3")
    folder = RunFolder(tmp_path / "stopped")
    folder.path.mkdir()
    cfg = config(rte, f"paths.outputs={rte}", "data=rte", "task.epochs=3")
    step = TextClassification.training_step

    def until_step_4(self: TextClassification, batch: Any, index: int) -> Any:
        if self.global_step == 4:
            raise RuntimeError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(TextClassification, "training_step", until_step_4)
        job.train(cfg, folder)
    assert [r["step"] for r in folder.read("results")] == [2]
    job.train(cfg, folder)
    assert stable(folder) == stable(straight)


@pytest.mark.usefixtures("no_pictures")
def test_training_stops_without_gain(
    rte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = ("task.epochs=9", "task.patience=1", "task.optimizer.lr=0.0")
    folder = run(rte, tmp_path / "run", *never, show=True)
    assert [r.get("stopped_early") for r in folder.read("results")] == [None, True]
    assert folder.is_done and folder.read_run()["steps"] == 27
    assert "unfinished" not in capsys.readouterr().out
    (folder.path / "done").unlink()  # as if killed before the summary
    run(rte, tmp_path / "run", *never)
    assert [r["step"] for r in folder.read("results")] == [2, 5]


@pytest.mark.parametrize(
    ("dev", "is_over"),
    [
        ((0.6, 0.7, 0.7, 0.65), True),
        ((0.6, 0.6, 0.7, 0.65), False),
        ((math.nan, math.nan), True),  # a constant prediction has no correlation
    ],
)
def test_patience_counts_evaluations_without_gain(
    tmp_path: Path, dev: tuple[float, ...], is_over: bool
) -> None:
    facts = {"selection": "best_dev", "test_envs": [0], **measured_by("best_dev", ["dev"], [0])}
    recorder, resumed = (
        RunRecorder(RunFolder(tmp_path), facts, {}, float, patience=2) for _ in range(2)
    )
    for step, score in enumerate(dev):
        recorder._compare({"step": step, "scores": {"dev": {"score": score}}})
    resumed.load_state_dict(recorder.state_dict())
    assert recorder._is_over() == resumed._is_over() == is_over


def test_the_learning_rate_falls_to_0(trained: RunFolder) -> None:
    state = torch.load(trained.path / "checkpoints/last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0
    assert state["lr_schedulers"][0]["last_epoch"] == 6


def test_heldout_chooses_and_dev_is_reported(rte: Path, tmp_path: Path) -> None:
    folder = run(rte, tmp_path / "run", "protocol=glue_heldout", "protocol.holdout_fraction=0.3")
    facts, results = folder.read_run(), folder.read("results")
    assert facts["sizes"]["train"] == 16 and facts["sizes"]["heldout"] == 6
    assert facts["selection"] == "heldout"
    assert all(r["scores"].keys() == {"heldout", "dev"} for r in results)
    assert facts["selects"] == {"sets": ["heldout"], "measure": "score"}
    assert facts["reported"] == {"sets": ["dev"], "measure": "score"}


def test_other_sets_are_evaluated_too(
    rte: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "sentence1\tsentence2\tlabel"
    lines = [line.split("\t", 1)[1] for line in pairs(5, ("entailment", "not_entailment"), 7)]
    write(rte / "ood" / "env_my_set.tsv", [header, *lines])
    folder = run(rte, tmp_path / "run", "data.ood=[env_my_set]", f"data.ood_root={rte / 'ood'}")
    assert "accuracy" in folder.read("results")[0]["scores"]["env_my_set"]
    assert folder.read_run()["env_names"] == ["dev", "env_my_set"]
    assert {r["source"] for r in folder.read("routing")} == {"train", "dev", "env_my_set"}
    evaluate.evaluate(*evaluate.parse([f"run={folder.path}"])[1:])
    assert "│ env_my_set   │ accuracy │" in capsys.readouterr().out


def test_regression(tmp_path: Path) -> None:
    root = write_stsb(tmp_path / "glue")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    job.train(config(root, f"paths.outputs={root}", "data=stsb"), folder)
    dev = folder.read("results")[-1]["scores"]["dev"]
    assert dev["score"] == pytest.approx((dev["pearson"] + dev["spearman"]) / 2)
    assert folder.read_run()["measure"] == "mean of Pearson and Spearman"


@pytest.mark.parametrize("moe", ["dense", "topk", "gmoe", "emoe", "emoe_learn"])
@pytest.mark.slow
def test_every_mixture(rte: Path, tmp_path: Path, moe: str) -> None:
    own = [] if moe == "dense" else ["moe.num_experts=4", "moe.top_k=2"]
    folder = run(rte, tmp_path / "run", "task.epochs=1", *own, moe=moe)
    assert len(folder.read("results")) == 1


def test_evaluation_repeats_the_recorded_scores_and_submits(
    trained: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = trained.path.parent / "glue" / ".cache"
    shutil.rmtree(cache)
    scores = evaluate.evaluate(*evaluate.parse([f"run={trained.path}", "checkpoint=last"])[1:])
    assert not cache.exists()
    recorded = trained.read("results")[-1]
    assert scores == recorded["scores"]
    mode, *parsed = evaluate.parse([f"run={trained.path}", "mode=submit"])
    assert mode == "submit"
    (file,) = evaluate.submit(*parsed)
    lines = file.read_text().splitlines()
    assert file.name == "RTE.tsv" and lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in range(6)]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    assert str(file) in capsys.readouterr().out


def test_a_finished_run_of_other_data_is_not_shown(
    trained: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a run has the name of the data's folder alone."""
    folder = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    folder.mark_done()
    runtime = SimpleNamespace(output_dir=str(folder.path))
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: SimpleNamespace(runtime=runtime)))
    monkeypatch.setattr(job, "show", lambda folder: 0.5)
    root = write_rte(tmp_path / "glue")
    assert job.job(config(root, "data=rte", f"paths.outputs={root}")) == 0.5  # a copy
    train = root / "RTE" / "train.tsv"
    flipped = {"\tentailment": "\tnot_entailment", "\tnot_entailment": "\tentailment"}
    lines = train.read_text().splitlines(keepends=True)
    for label, other in flipped.items():
        if label in lines[1]:
            lines[1] = lines[1].replace(label, other)
            break
    train.write_text("".join(lines))
    with pytest.raises(DataError, match=r"RTE: not those .*name=NAME.*overwrite=true"):
        job.job(config(root, "data=rte", f"paths.outputs={root}"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("mode=guess", "expected one of evaluate, answer, submit"),
        ("data.workers=1", "no such key"),
        ("data.ood=[dev]", "data.ood: dev is a set of the task itself"),
    ],
)
def test_eval_refuses(rte: Path, tmp_path: Path, argument: str, message: str) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "selected.ckpt").touch()
    OmegaConf.save(config(rte, "data=rte", f"paths.outputs={rte}"), folder / "config.yaml")
    with pytest.raises(ConfigError, match=message):
        evaluate.parse([f"run={folder}", argument])


def test_a_sweeps_runs_share_their_tokens(rte: Path) -> None:
    for seed in (0, 1):
        build.build_data(config(rte, f"paths.outputs={rte}", "data=rte", f"seed={seed}")).setup()
    files = list((rte / ".cache").rglob("*.arrow"))
    assert len(files) == 2  # train and dev, once
