"""Whole runs of task=lm: records, resume, evaluation again, budgets, the report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import config, write_corpus

from dynmoe import job
from dynmoe.benchmark import models as bench_models
from dynmoe.errors import DataError
from dynmoe.records import RunFolder
from dynmoe.report import page
from dynmoe.report.runs import read_runs
from dynmoe.tasks.lm import LanguageModelling
from dynmoe.training import budgets, build, evaluate

WINDOW = ("moe.adaptation.length=1", "moe.adaptation.period=2")


def run(root: Path, folder: Path, *overrides: str, **chosen: Any) -> RunFolder:
    made = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    job.train(config(root, f"paths.outputs={root.parent}", *overrides, **chosen), made)
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "corpus"
    write_corpus(path)
    return path


@pytest.fixture(scope="module")
def straight(root: Path) -> RunFolder:
    """Train once, for all tests that only read the run."""
    return run(root, root.parent / "straight", *WINDOW)


def stable(folder: RunFolder) -> list[dict[str, Any]]:
    dropped = ("step_time", "eval_time", "mem_gb", "args")
    return [
        {k: v for k, v in record.items() if k not in dropped}
        for kind in ("results", "routing", "events", "examples")
        for record in folder.read(kind)  # type: ignore[arg-type]
    ]


@pytest.mark.usefixtures("no_pictures")
def test_a_run_leaves_what_it_promises(straight: RunFolder) -> None:
    facts, results = straight.read_run(), straight.read("results")
    assert [r["step"] for r in results] == [2, 5]
    assert facts["selects"] == {"sets": ["validation"], "measure": "loss"}
    assert facts["reported"] == {"sets": ["test"], "measure": "loss"}
    for scores in results[-1]["scores"].values():
        assert scores.keys() == {"loss", "bits_per_byte", "perplexity", "accuracy"}
        assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert facts["costs"]["flops"] is not None and facts["samples_per_step"] == 4
    assert {r["source"] for r in straight.read("routing")} == {"train", "validation", "test"}
    assert straight.read("events")
    evaluated = [r for r in straight.read("routing") if r["source"] == "test"]
    assert {r["tokens"] for r in evaluated} == {facts["tokens"]["test"]}
    assert job.show(straight) == -min(r["scores"]["validation"]["loss"] for r in results)
    assert "nats per token" in (straight.path / "summary.md").read_text()


def test_a_stopped_run_goes_on_as_if_never_stopped(
    root: Path, straight: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = LanguageModelling.training_step

    def until_step_4(self: LanguageModelling, batch: Any, index: int) -> Any:
        if self.global_step == 4:
            raise RuntimeError("killed")
        return step(self, batch, index)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(LanguageModelling, "training_step", until_step_4)
        run(root, tmp_path / "run", *WINDOW)
    assert [r["step"] for r in RunFolder(tmp_path / "run").read("results")] == [2]
    assert stable(run(root, tmp_path / "run", *WINDOW)) == stable(straight)


def test_evaluation_repeats_the_recorded_scores(
    straight: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate.evaluate(*evaluate.parse([f"run={straight.path}", "checkpoint=last"])[1:])
    recorded = straight.read("results")[-1]["scores"]
    for name, measures in recorded.items():
        assert scores[name] == pytest.approx(measures, rel=1e-5)
    assert "bits per byte" in capsys.readouterr().out


def test_another_corpus_is_read_with_the_vocabulary_of_the_run(
    straight: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = straight.read_run()
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(
        "\n".join(f"zebras {each} quiz vexed jackdaws" for each in range(40))
    )
    _, folder, checkpoint, cfg = evaluate.parse([f"run={straight.path}", f"data.root={other}"])
    data, *_ = evaluate.loaded(folder, checkpoint, cfg)
    assert data.facts["tokenizer"] == facts["tokenizer"]
    out = capsys.readouterr().out
    assert "data hash" in out and "tokenizer" not in out
    anew: Any = build.build_data(cfg)
    anew.setup()
    assert anew.facts["tokenizer"] != facts["tokenizer"]
    assert f"tokenizer {facts['tokenizer']} -> " in str(build.other_data(folder, anew))


def test_a_damaged_vocabulary_is_named(root: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    data = build.build_data(config(root, "data.cache=null"))
    data.restore(tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.json.*overwrite=true"):
        data.setup()


def test_budgets_after_training(straight: RunFolder) -> None:
    words = [f"run={straight.path}", "mode=budget", "budget.rule=threshold", "budget.targets=[1]"]
    own, *others = budgets.budget(*evaluate.parse(words)[1:])
    assert own["measure"] == "loss" and own["score"] == own["loss"]
    assert others and others[0]["mean_k"] == pytest.approx(1, rel=0.2)


@pytest.mark.slow  # all figures of a report
def test_the_report(straight: RunFolder, tmp_path: Path) -> None:
    (straight.path / "done").touch()
    page.write(read_runs([straight.path]), tmp_path)
    assert "loss, nats per token" in (tmp_path / "report.md").read_text()


def test_steps_can_be_timed(root: Path) -> None:
    cfg = config(root, "data.cache=null")
    data = bench_models.data_of(cfg)
    work = bench_models.of_data(cfg, data, torch.device("cpu"))
    made, _ = bench_models.fresh(cfg, work, ["dense", "top-2"], [2.0], True, True, ["32-true"])
    for each in made:
        assert math.isfinite(each.loss(work.batches[0]).item())
        costs = bench_models.costs_of_sample(each.model, work.batches)
        assert costs["flops"]["other"] > 0
    assert work.facts["max_length"] == 16
