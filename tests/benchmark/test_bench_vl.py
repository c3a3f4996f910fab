"""`dynmoe-bench step` and `generate` on conversations about scenes. No time is asserted."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_line import Refused, Run
from omegaconf import OmegaConf
from sweeps import write_run
from tiny_runs import tiny_config
from tiny_vl import TINY_VL, configuration

from dynmoe import job
from dynmoe.benchmark import models
from dynmoe.benchmark.candidates import candidates, groups
from dynmoe.benchmark.steps import Training
from dynmoe.layers import record_routing
from dynmoe.metrics.efficiency import count
from dynmoe.records import RunFolder

QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "2"]
CPU = torch.device("cpu")
BATCHES, PATCHES = 2, 9
ALONE = ("stage.start=null", "runtime.malloc=system", "data.cache=null")
SHORT = ("task.steps=2", "task.eval_every=2")
SETTINGS = {"dense": "b", "top-2 of 4": "a", "DynMoE": "c"}  # names of their run folders


@pytest.fixture(autouse=True)
def few_batches(short_samples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynmoe.benchmark.models.BATCHES", BATCHES)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep")
    for name, moe in (("c", "moe=dynmoe_vl"), ("a", "moe=topk"), ("b", "moe=dense")):
        few = ("moe.num_experts=4",) if moe == "moe=topk" else ()
        (path / name).mkdir()
        job.train(configuration(path, *ALONE, *SHORT, moe, *few), RunFolder(path / name))
        RunFolder(path / name).mark_done()
    return path


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def scenes(tmp_path: Path, *more: str) -> tuple[Any, models.Workload]:
    """A configuration with 4 experts, and its training batches."""
    own = ("moe=dynmoe_vl", "moe.num_experts=4", "moe.max_experts=4", "data.max_length=96")
    cfg = configuration(tmp_path, *ALONE, *own, *more)
    return cfg, models.of_data(cfg, models.data_of(cfg), CPU)


def test_batches_of_several_sources(tmp_path: Path) -> None:
    """Rows of conversations without, with one and with two images, by equal weights."""
    _, work = scenes(tmp_path, "mixing=uniform")
    images = [each.inputs[0]["image_mask"].any(1) for each in work.batches]
    assert len(work.batches) == BATCHES
    assert any(row.any() for row in images) and not all(row.all() for row in images)


def test_what_the_batches_hold(tmp_path: Path) -> None:
    _, work = scenes(tmp_path)
    assert len(work.batches) == BATCHES
    tokens = [each.inputs[0] for each in work.batches]
    facts = dict(work.facts)
    assert (facts["data"], facts["batch"], facts["max_length"]) == ("Scenes", 8, 96)
    images = sum(len(each["images"]) for each in tokens)
    assert images * PATCHES == sum(int(each["image_mask"].sum()) for each in tokens)
    assert facts["images"] == round(images / BATCHES, 1)
    real = sum(int(each["attention_mask"].sum()) for each in tokens)
    assert facts["tokens"] == round(real / BATCHES)
    places = sum(each["attention_mask"].numel() for each in tokens)
    assert facts["padded"] == round(1 - real / places, 3)
    scored = sum(int((each.label != -100).sum()) for each in work.batches)
    assert facts["scored"] == round(scored / BATCHES)


def test_a_step_is_that_of_the_stage(tmp_path: Path) -> None:
    """Its loss, and gradients of what it trains alone."""
    cfg, work = scenes(tmp_path)
    cfg.task.module.trains = ["projector", "moe_layers"]
    cfg.moe.aux_weight = 0.5
    built, facts = models.fresh(
        cfg, work, ["dense", "dynmoe 1.5"], [1.5], False, False, ["32-true"]
    )
    assert facts["moe_layers"] == [1, 3] and facts["experts"] == 4
    for each in built:
        name, model = each.name, each.model
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        experts = ("projector.", "language_model.model.layers.1.mlp.")
        assert trained and all(
            n.startswith((*experts, experts[1].replace("1", "3"))) for n in trained
        )
        assert any("layers.3.mlp" in n for n in trained) == (name != "dense")

    (_, each), batch = built, work.batches[0]
    model = each.model
    step = Training(model, each.loss, each.new_optimizer(), work.batches, each.precision)
    (loss,) = step.forward(batch)
    with record_routing(model) as tape:
        logits = model(batch.inputs[0])[:, :-1]
    following = batch.label[:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=-100)
    expected = expected + 0.5 * sum(call.aux for calls in tape.values() for call in calls)
    torch.testing.assert_close(loss, expected)
    step()
    assert {n for n, p in model.named_parameters() if p in step.optimizer.state} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_costs_are_those_of_one_conversation_where_all_are_alike(tmp_path: Path) -> None:
    """Padding counts outside of MoE layers alone."""
    cfg, work = scenes(tmp_path, "backbone.options.num_hidden_layers=2")
    cases, outside = ["dense", "top-1", "top-2"], dict[tuple[Any, ...], float]()
    built, _ = models.fresh(cfg, work, cases, [1.5], False, False, ["32-true"])
    batch: Any = work.batches[0]
    images = (batch.tokens["image_mask"].sum(1) // PATCHES).tolist()
    row = images.index(1)
    places = {"images": sum(images[:row])}
    one = {key: value[[places.get(key, row)]] for key, value in batch.tokens.items()}
    length = one["input_ids"].shape[1]
    one["attention_mask"] = (torch.arange(length) < length - 2).long()[None]
    tokens = {key: torch.cat([value] * 3) for key, value in one.items()}
    alike = batch._replace(tokens=tokens, label=batch.label[[row] * 3])
    del one["attention_mask"]
    scored_M = batch._replace(label=batch.label[[row]]).scored[0]
    for each in built:
        expected = count(each.model, one, scored_M)
        for layer in expected["flops"]["layers"].values():
            assert layer["tokens"] == length
            layer["tokens"] = length - 2
        assert models.costs_of_sample(each.model, [alike, alike], outside) == expected
    assert len(outside) == 2  # the second model with MoE layers takes what the first one counted


@pytest.mark.slow
def test_times_fresh_models(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    tiny = [*TINY_VL, *ALONE[1:], "data.max_length=96"]
    file = tmp_path / "step.json"
    only = ["--only", "top-2", "dynmoe", "--k", "1.5", "--mode", "train"]
    run("step", *QUICK, *only, "--json", str(file), *tiny)
    content = read(file)
    assert content["workload"]["max_length"] == 96 and content["workload"]["moe_layers"] == [1, 3]
    assert [row["case"] for row in content["rows"]] == ["dense", "top-2", "dynmoe 1.5"]
    assert [row["mean_k"] for row in content["rows"][:2]] == [None, 2]
    assert all(row["ideal"] > 0 and row["tokens_per_s"] > 0 for row in content["rows"])
    assert "patches of images included" in " ".join(capsys.readouterr().out.split())

    file = tmp_path / "generate.json"
    run("generate", *QUICK, "--new-tokens", "3", "--k", "1", "--json", str(file), *tiny)
    content = read(file)
    work = content["workload"]
    assert (work["data"], work["batch"], work["new_tokens"]) == ("Scenes", 5, 3)
    assert [row["setting"] for row in content["rows"]] == ["dense", "top-2", "dynmoe 1"]
    assert {row["run"] for row in content["rows"]} == {""}
    assert content["rows"][1]["mean_k"] == {"prompt": 2, "image": 2, "answer": 2}
    assert "3 new tokens each" in capsys.readouterr().out


@pytest.mark.slow
def test_times_a_sweep(sweep: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run("step", "--runs", str(sweep), *QUICK)
    content = read(sweep / "timing.json")
    keys = {"batch", "tokens", "padded", "images", "scored"}
    assert content["workload"].keys() == keys and content["workload"]["batch"] == 8
    assert [(row["mode"], row["setting"], row["run"]) for row in content["rows"]] == [
        (mode, *each) for mode in ("train", "inference") for each in SETTINGS.items()
    ]
    assert "of dense" in capsys.readouterr().out

    run("generate", "--runs", str(sweep), *QUICK, "--new-tokens", "4", "--batch", "4")
    content = read(sweep / "generation.json")
    assert content["command"].startswith("dynmoe-bench generate --runs")
    work = content["workload"]
    assert work.keys() == {"batch", "question_tokens", "new_tokens"}
    assert (work["batch"], work["new_tokens"]) == (4, 4) and work["question_tokens"] > PATCHES
    assert [(row["setting"], row["run"]) for row in content["rows"]] == [*SETTINGS.items()]
    for row in content["rows"]:
        assert row["problem"] == "Scenes, llava, last_step" and row["environment"] == "test"
        assert row["reference"] == "dense" and row["rounds"] == 2
        numbers = [row[key] for key in ("median_ms", "prompt_ms", "tokens_per_s", "ratio")]
        numbers += [*row["quartiles_ms"], *row["ratio_quartiles"], row["peak_bytes"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
    k = {row["setting"]: row["mean_k"] for row in content["rows"]}
    assert k["dense"] == {} and k["top-2 of 4"] == {"prompt": 2, "image": 2, "answer": 2}
    assert all(1 <= each <= 4 for each in k["DynMoE"].values())
    shown = capsys.readouterr().out
    assert all(setting in shown for setting in SETTINGS) and "4 questions at once" in shown


def test_a_training_step_has_the_gradients_of_training(sweep: Path) -> None:
    ((_, group),) = groups(candidates(sweep))
    data = models.data_of(group[0].cfg)
    batches = models.training_batches(data, CPU)
    loaded = models.trained(group, data, False, CPU, "32-true")
    assert all(len(batch.label) == 8 for batch in batches)
    for each in loaded:
        each.loss(batches[0]).backward()
        with_gradient = {n for n, p in each.model.named_parameters() if p.grad is not None}
        assert with_gradient and not any(n.startswith("vision.") for n in with_gradient)
        frozen = {n for n, p in each.model.named_parameters() if not p.requires_grad}
        assert frozen and not with_gradient & frozen


def test_conversations_in_another_form_are_not_interleaved(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "other")
    file = tmp_path / "other" / "c" / "config.yaml"
    file.write_text(file.read_text().replace("\n  template: simple", "\n  template: v1"))
    (file.parent / "done").write_text("\n")  # taken as it is
    members = [
        [each.run.setting for each in group] for _, group in groups(candidates(tmp_path / "other"))
    ]
    assert members == [["dense", "top-2 of 4"], ["DynMoE"]]


def test_images_are_not_answered(tmp_path: Path, refused: Refused) -> None:
    folder = write_run(tmp_path).path
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    OmegaConf.save(tiny_config(), folder / "config.yaml", resolve=True)
    message = "RotatedDigits has no questions to answer; expected runs of task=vl"
    assert message in refused("generate", "--runs", str(tmp_path), *QUICK)
    assert not (tmp_path / "generation.json").exists()
