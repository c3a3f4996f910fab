"""A whole run: records in DomainBed's format, summary, figures, resume without a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from tiny_runs import NO_DROPOUT, Run, Trained, tiny_config

from dynmoe import job
from dynmoe.errors import ConfigError, DataError, UserError
from dynmoe.records import RunFolder
from dynmoe.selection import selected
from dynmoe.tasks.base import MoETask
from dynmoe.training import evaluate

MEASURED = {"step_time", "eval_time", "mem_gb"}  # differ from run to run
SLOW = pytest.mark.slow


def stable(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what was measured on the clock, and without the folder's name."""
    return [
        {k: v for k, v in r.items() if k not in MEASURED}
        | ({"args": {**r["args"], "output_dir": None}} if "args" in r else {})
        for r in records
    ]


def everything(folder: RunFolder) -> dict[str, list[dict[str, Any]]]:
    return {kind: stable(folder.read(kind)) for kind in ("results", "routing", "events")}


def test_a_run_leaves_what_it_promises(
    copied: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied
    job.show(folder)
    assert folder.is_done
    names = {p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*.*")}
    assert {
        "config.yaml",
        "run.json",
        "results.jsonl",
        "routing.jsonl",
        "events.jsonl",
        "summary.md",
        "checkpoints/last.ckpt",
        "checkpoints/selected.ckpt",
        "figures/scores.png",
        "figures/experts.png",
        "figures/k_per_layer.png",
        "figures/load.png",
    } <= names
    printed = capsys.readouterr().out
    for word in ("0/in (reported)", "15/out (selects)", "loss", "mean k", "unrouted", "steps/s"):
        assert word in printed


def test_every_line_says_what_selects_and_what_is_reported(trained: Trained) -> None:
    validation = [f"{angle}/out" for angle in (15, 30, 45, 60, 75)]
    for record in trained().read("results"):
        assert record["selects"] == {"sets": validation, "measure": "accuracy"}
        assert record["reported"] == {"sets": ["0/in"], "measure": "accuracy"}
        assert set(record["scores"]) > {*validation, "0/in"}


def test_evaluations_are_domainbeds(trained: Trained) -> None:
    """After one update, then every `eval_every`, and at the last step."""
    folder = trained()
    assert [r["step"] for r in folder.read("results")] == [0, 4, 8]
    assert [e["step"] for e in folder.read("events")] == [2, 2, 5, 5, 8, 8]


def test_results_are_readable_by_domainbed(trained: Trained) -> None:
    """The keys its collect_results.py uses; its reader cuts off each line's last character."""
    lines = (trained().path / "results.jsonl").read_text().splitlines(keepends=True)
    for line in lines:
        record = json.loads(line[:-1])
        assert list(record) == sorted(record)
        assert {f"env{i}_{s}_acc" for i in range(6) for s in ("in", "out")} <= set(record)
        args = record["args"]
        assert (args["algorithm"], args["dataset"]) == ("DynMoE", "RotatedDigits")
        assert (args["test_envs"], args["trial_seed"], args["hparams_seed"]) == ([0], 0, 0)
        assert record["hparams"]["batch_size"] == 4


def test_scores_are_of_the_whole_split_however_it_is_cut(trained: Trained) -> None:
    folder = trained()
    record = folder.read("results")[-1]
    words = [f"run={folder.path}", "checkpoint=last", "data.eval_batch_size=100"]
    other = evaluate.evaluate(*evaluate.parse(words)[1:])
    for index, env in enumerate(("0", "15", "30", "45", "60", "75")):
        for split in ("in", "out"):
            scores = record["scores"][f"{env}/{split}"]
            assert scores["accuracy"] == record[f"env{index}_{split}_acc"]
            assert other[f"{env}/{split}"] == pytest.approx(scores, rel=1e-5)
        correct = record[f"env{index}_in_acc"] * 240  # of 299 or 300 images 80 % are in
        assert math.isclose(correct, round(correct), abs_tol=1e-6)


def test_training_routing_counts_every_token(trained: Trained) -> None:
    """Batches of 4 images from 5 environments with 5 tokens each, 4 steps between evaluations."""
    routing = trained().read("routing")
    tokens = [
        r["tokens"] for r in routing if r["source"] == "train" and r["layer"] == "blocks.0.mlp"
    ]
    assert tokens == [100, 400, 400]


def test_evaluation_routing_is_broken_down_by_position_and_class(trained: Trained) -> None:
    """5 tokens per image; the sums over positions and over classes are the whole."""
    routing = [r for r in trained().read("routing") if r["source"] != "train"]
    for record in routing:
        k = record["k_by_position"]
        assert len(k) == 5 and sum(k) / 5 == pytest.approx(record["mean_k"], abs=1e-4)
        assert [sum(column) for column in zip(*record["load_by_class"], strict=True)] == record[
            "load"
        ]
        assert len(record["load_by_class"]) == 10


def test_facts_hold_the_configuration_and_the_machine(trained: Trained) -> None:
    facts = trained().read_run()
    config = facts["config"]
    assert (config["task.steps"], config["moe.adaptation.length"], config["seed"]) == (9, 3, 0)
    assert "data.trial_seed" not in config and "paths.outputs" not in config
    assert facts["class_names"] == [str(digit) for digit in range(10)]
    assert facts["machine"].keys() == {"cpu", "cores"}


def test_selected_checkpoint_is_the_selected_records(trained: Trained) -> None:
    folder = trained()
    record = selected(folder.read("results"), folder.read_run())
    assert record is not None
    for name, step in (("selected", record["step"]), ("last", 8)):
        checkpoint = torch.load(folder.path / f"checkpoints/{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] - 1 == step


@pytest.mark.slow
def test_seeds_matter_and_repeat(run: Run, trained: Trained) -> None:
    first = everything(trained())
    assert everything(run(name="b")) == first
    assert everything(run("seed=1", name="c"))["results"] != first["results"]


class Stop(Exception):
    pass


class StopAt(L.Callback):
    """Dies in the middle of a step, as a killed process does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Stop


SPARSE = (
    "backbone.token_sparsify={keep: 0.5, blocks: [1, 3], shrink_start: 2, shrink_steps: 5}",
    "backbone.adapter={dim: 4}",
)


@pytest.mark.parametrize(
    ("moe", "step", "options"),
    [
        ("dynmoe", 5, ()),
        pytest.param("dynmoe", 3, (), marks=SLOW),
        pytest.param("dynmoe", 7, (), marks=SLOW),
        pytest.param("gmoe", 5, (), marks=SLOW),
        pytest.param("dynmoe", 5, SPARSE, marks=SLOW),
    ],
)
def test_an_interrupted_run_resumes_without_a_trace(
    step: int,
    moe: str,
    options: tuple[str, ...],
    run: Run,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dropout, stochastic depth, routing noise, a half-filled window: later records are equal."""
    straight = everything(trained(*options, moe=moe))
    from dynmoe.training import build

    callbacks = build.build_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_callbacks", lambda *a: [*callbacks(*a), StopAt(step)])
        with pytest.raises(Stop):
            run(*options, moe=moe, name="broken")
    broken = RunFolder(tmp_path / "broken")
    assert 0 < len(broken.read("results")) < 3 and not broken.is_done
    # A record that the checkpoint has not seen, and a line cut short by the kill.
    broken.append("results", {**broken.read("results")[-1], "step": 99})
    with (broken.path / "results.jsonl").open("a") as file:
        file.write('{"step": 1')
    assert everything(run(*options, moe=moe, name="broken")) == straight


@SLOW
def test_fewer_patches_are_routed_as_the_share_shrinks(trained: Trained) -> None:
    """All 4 patches are kept after steps 0 and 4 (a share of 0.83), 2 and the fused one after 8."""
    records = trained(*SPARSE).read("routing")
    last = [each for each in records if each["layer"] == "blocks.2.mlp"]
    tokens = {each["step"]: len(each["k_by_position"]) for each in last if "k_by_position" in each}
    assert tokens == {0: 5, 4: 5, 8: 4}


def test_nothing_of_a_finished_run_is_repeated(
    copied: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied
    folder.mark_done()
    before = {p: p.stat().st_mtime_ns for p in folder.path.glob("*.jsonl")}

    class Hydra:
        class runtime:
            output_dir = str(folder.path)

    from hydra.core.hydra_config import HydraConfig

    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: Hydra))
    monkeypatch.setattr(job, "train", lambda *a: pytest.fail("trained again"))
    assert job.job(tiny_config()) is not None
    assert {p: p.stat().st_mtime_ns for p in folder.path.glob("*.jsonl")} == before
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        job.job(tiny_config("overwrite=true"))
    assert not list(folder.path.glob("*.jsonl"))


def test_a_kill_while_a_run_is_cleared_leaves_no_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.mark_done()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        job._clear(folder)
    assert not folder.is_done


@pytest.mark.parametrize(
    "moe", ["dense", "topk", "gmoe", "dynmoe_official_tutel", "dynmoe_official_deepspeed"]
)
@pytest.mark.slow
def test_every_mixture_trains(moe: str, trained: Trained) -> None:
    folder = trained(moe=moe)
    assert all(math.isfinite(r["loss"]) for r in folder.read("results"))
    assert bool(folder.read("events")) == moe.startswith("dynmoe")


@pytest.mark.parametrize("selection", ["oracle", "leave_one_domain_out"])
@pytest.mark.slow
def test_other_selection_rules(selection: str, run: Run) -> None:
    folder = run(f"task.selection={selection}")
    chosen = (folder.path / "checkpoints" / "selected.ckpt").exists()
    assert chosen == (selection == "oracle")


@pytest.mark.slow
def test_bf16_stays_near_fp32(run: Run, trained: Trained) -> None:
    full = trained().read("results")
    mixed = run("trainer.precision=bf16-mixed", name="mixed").read("results")
    for a, b in zip(mixed, full, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05) and a["loss"] != b["loss"]


@pytest.mark.slow
def test_recorded_loss_is_the_mean_of_the_logged_ones_in_pure_bf16(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[float] = []
    log = MoETask.log

    def kept(self: MoETask, name: str, value: Any, **options: Any) -> None:
        if name == "train/loss":
            logged.append(float(value))
        log(self, name, value, **options)

    monkeypatch.setattr(MoETask, "log", kept)
    results = run("trainer.precision=bf16-true").read("results")
    parts = [logged[:1], logged[1:5], logged[5:]]
    assert [line["loss"] for line in results] == pytest.approx(
        [sum(part) / len(part) for part in parts], rel=1e-5
    )


@pytest.mark.slow
def test_accumulation_does_not_change_the_run(run: Run) -> None:
    whole = everything(run(*NO_DROPOUT, name="whole"))
    halves = everything(run(*NO_DROPOUT, "trainer.accumulate_grad_batches=2", name="halves"))
    assert halves["events"] == whole["events"]
    for a, b in zip(halves["results"], whole["results"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@SLOW
def test_activation_checkpointing_does_not_change_the_run(run: Run, trained: Trained) -> None:
    plain = everything(trained())
    checkpointed = everything(run("backbone.grad_checkpointing=true", name="checkpointed"))
    for kind in ("routing", "events"):
        assert checkpointed[kind] == plain[kind]
    for a, b in zip(checkpointed["results"], plain["results"], strict=True):
        assert (a["loss"], a["env0_in_acc"]) == (b["loss"], b["env0_in_acc"])


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="another process is running")
    folder = RunFolder(tmp_path / "run")
    with folder.hold(), refused, RunFolder(folder.path).hold(wait=0):
        pass


def test_a_damaged_checkpoint_is_named(copied: RunFolder, run: Run) -> None:
    folder = copied
    checkpoint = folder.path / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(
        ConfigError, match=r"last\.ckpt: not a checkpoint.*cp .*selected\.ckpt .*overwrite=true"
    ):
        run()


@pytest.mark.parametrize("harm", ["lost", "changed", "doubled"])
def test_records_that_the_checkpoint_has_not_seen_so_are_refused(
    copied: RunFolder, run: Run, harm: str
) -> None:
    """And left as they are; an earlier checkpoint whose records are whole is the way on."""
    file = copied.path / "results.jsonl"
    first, *others = file.read_text().splitlines(keepends=True)
    harmed = {"lost": others, "changed": [first.replace("0", "1"), *others]}
    file.write_text("".join(harmed.get(harm, [first, first, *others])))
    before = file.read_text()
    with pytest.raises(ConfigError, match=r"results\.jsonl: not as they were .*overwrite=true"):
        run()
    assert file.read_text() == before


def test_a_run_does_not_go_on_with_other_data(
    copied: RunFolder, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = copied.read_run()
    sizes = facts["sizes"] | {"0/in": facts["sizes"]["0/in"] + 1}
    copied.write_run(facts | {"data_hash": "0123456789abcdef", "sizes": sizes})
    checkpoint = copied.path / "checkpoints" / "last.ckpt"
    evaluate.evaluate(copied, checkpoint, tiny_config())
    change = (
        f"data hash 0123456789abcdef -> {facts['data_hash']}; examples: 0/in {sizes['0/in']} ->"
    )
    assert f"The data are not those of this run, so scores differ: {change}" in (
        " ".join(capsys.readouterr().out.split())
    )
    before = everything(copied)
    with pytest.raises(DataError, match=r"RotatedDigits: not those .*overwrite=true") as error:
        run()
    assert change in str(error.value)
    assert everything(copied) == before


@pytest.mark.parametrize(
    ("baseline", "recorded", "said"),
    [
        (lambda: {"name": "linear", "scores": {}}, {"name": "linear", "scores": {}}, ""),
        (lambda: None, None, ""),
        (lambda: int("one class"), None, "no linear baseline: "),
    ],
)
def test_a_baseline_is_fitted_last_and_stops_no_run(
    baseline: Any, recorded: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run({"seed": 1, "baseline": None})
    job.add_baseline(folder, SimpleNamespace(baseline=baseline))
    assert folder.read_run() == {"seed": 1, "baseline": recorded}
    assert capsys.readouterr().out.startswith(said)
