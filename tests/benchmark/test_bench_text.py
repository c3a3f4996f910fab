"""`dynmoe-bench step` and `epoch` on tiny texts: what is measured, what is refused. No time."""

from __future__ import annotations

import json
import math
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refused, Run
from tiny_texts import TINY_TEXT, TRAIN, config, write_rte, write_stsb

from dynmoe import job
from dynmoe.benchmark.epochs import LabelledTexts, plain_loader
from dynmoe.benchmark.models import (
    ENDLESS,
    calls_of_sample,
    costs_of_sample,
    data_of,
    padded_share,
    random_batches,
    tokens_of,
    training_batches,
)
from dynmoe.benchmark.starts import Start
from dynmoe.data.text.tokens import encode
from dynmoe.errors import ConfigError
from dynmoe.layers import moe_layers
from dynmoe.metrics.efficiency import flops
from dynmoe.records import RunFolder
from dynmoe.training import build

pytestmark = pytest.mark.usefixtures("short_samples")

QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "2"]
CPU = torch.device("cpu")
DIM, HIDDEN = 16, 32  # of TINY_TEXT's backbone
EPOCH = (8, 8, 6)  # texts of the batches of an epoch, in some order


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stsb(write_rte(tmp_path_factory.mktemp("glue")))


def texts(glue: Path, *overrides: str) -> list[str]:
    system = ["runtime.malloc=system", "data.cache=null"]
    return [*TINY_TEXT, "data=rte", f"data.root={glue}", *system, *overrides]


def read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, Any]]]:
    content = json.loads(file.read_text())
    return content["workload"], {(row["mode"], row["case"]): row for row in content["rows"]}


def test_step_on_texts(
    glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    file = tmp_path / "step.json"
    only = ["--only", "top-2", "dynmoe"]
    options = [*QUICK, *only, "--mode", "train", "--k", "1.5", "--json", str(file)]
    run("step", *options, *texts(glue, "moe.num_experts=4"))
    workload, rows = read(file)
    assert (workload["data"], workload["batch"], workload["model"]) == ("RTE", 8, "bert")
    assert workload["moe_layers"] == [1, 3] and 0 < workload["padded"] < 1
    names = ["dense", "top-2", "dynmoe 1.5"]
    assert list(rows) == [("train", name) for name in names]
    for row in rows.values():
        numbers = [
            row[key] for key in ("samples_per_s", "median_ms", "ratio", "ideal", "peak_bytes")
        ]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        tokens = row["tokens_per_s"] * row["median_ms"] / 1e3
        assert tokens == pytest.approx(workload["tokens"], abs=0.51)  # written as a whole number
    assert rows["train", "top-2"]["mean_k"] == 2
    assert rows["train", "dynmoe 1.5"]["mean_k"] == pytest.approx(1.5, rel=0.15)
    shown = " ".join(capsys.readouterr().out.split())
    assert "tokens/s" in shown and "ideal counts real tokens in MoE layers" in shown


@pytest.mark.slow
def test_step_on_numbers(glue: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "step.json"
    options = [*QUICK, "--only", "dense", "--mode", "train", "--batch", "5", "--json", str(file)]
    run("step", *options, *texts(glue, "data=stsb"))
    workload, rows = read(file)
    assert workload["batch"] == 5 and rows["train", "dense"]["ratio"] == 1


def test_costs_leave_padding_out_of_moe_layers(glue: Path) -> None:
    """Against the dense model an expert per token saves the FFN of all padding."""
    cfg = config(glue, "data=rte", "data.cache=null", "moe.layers=[1,3]")
    data = data_of(cfg)
    batches = training_batches(data, CPU)
    cfg.backbone.pretrained = False
    dense_cfg = config(glue, "data=rte", moe="dense")
    moe = build.build_task(cfg, data, False).backbone
    dense = build.build_task(dense_cfg, data, False).backbone
    sizes = [len(batch.label) for batch in batches]
    assert sorted(sizes[2:5], reverse=True) == list(EPOCH)  # the second epoch; step 0 is over
    assert calls_of_sample(batches) == len(batches) == 8
    assert calls_of_sample(random_batches(2, 3, 4, 10, CPU)) == 1

    experts = {name: len(layer.live) for name, layer in moe_layers(moe).items()}
    one = dict.fromkeys(experts, 1.0)
    counted = flops(costs_of_sample(moe, batches), experts, one)
    plain = flops(costs_of_sample(dense, batches), {}, {})
    assert counted is not None and plain is not None
    tokens = tokens_of(batches) * len(batches)  # type: ignore[operator]
    padding = tokens / (1 - padded_share(batches)) - tokens
    router = 2 * DIM * experts["model.bert.encoder.layer.1.intermediate"]
    saved = len(experts) * (padding * 4 * DIM * HIDDEN - tokens * router)
    assert plain - counted == pytest.approx(saved / sum(sizes))


@pytest.mark.slow
def test_times_a_language_sweep(
    glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    for moe in ("dynmoe_glue", "dense"):
        few = ("task.steps=1", "runtime.malloc=system", "data.cache=null", "data=rte")
        folder = RunFolder(tmp_path / moe)
        folder.path.mkdir()
        job.train(config(glue, *few, moe=moe), folder)
        folder.mark_done()
    run("step", "--runs", str(tmp_path), *QUICK)
    content = json.loads((tmp_path / "timing.json").read_text())
    work = content["workload"]
    assert work.keys() == {"batch", "tokens", "padded"} and work["batch"] == 8
    assert [(row["mode"], row["setting"]) for row in content["rows"]] == [
        (mode, setting) for mode in ("train", "inference") for setting in ("dense", "DynMoE")
    ]
    for row in content["rows"]:
        assert row["problem"] == "RTE, glue, best_dev" and row["environment"] == "dev"
        assert (row["mean_k"] is None) == (row["setting"] == "dense")
    assert "of dense" in capsys.readouterr().out


def test_epoch_beside_a_plain_loop(
    glue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    file = tmp_path / "epoch.json"
    run("epoch", *QUICK, "--json", str(file), *texts(glue))
    content = json.loads(file.read_text())
    assert content["workload"]["steps"] == 3
    plain, ours = content["rows"]
    assert (plain["case"], ours["case"]) == ("plain", "dynmoe")
    for row in (plain, ours):
        assert (row["steps"], row["samples"], row["rounds"]) == (3, TRAIN, 2)
        assert row["median_ms"] > 0 and 0 < row["padded"] < 1
    assert plain["ratio"] == 1 and ours["tokens"] == plain["tokens"]
    assert ours["padded"] < plain["padded"]
    shown = capsys.readouterr().out
    assert "One training epoch, 3 steps, 22 texts" in shown and str(file) in shown

    run("epoch", *QUICK, "--steps", "1", "--json", str(file), *texts(glue))
    plain, ours = json.loads(file.read_text())["rows"]
    assert plain["steps"] == ours["steps"] == 1 and plain["samples"] == 8


def test_the_plain_loader_gives_every_text_once(glue: Path) -> None:
    """The very tokens of our loader."""
    cfg = config(glue, "data=rte", "data.cache=null")
    data = data_of(cfg)
    data.setup()
    data.repeat_evaluation_of(0)
    assert data.eval_every == ENDLESS
    encoded = encode(data.sets["train"], data.tokenizer, 128, None)  # type: ignore[attr-defined]
    texts = LabelledTexts(encoded, data.sets["train"].label)  # type: ignore[attr-defined]

    def rows(batches: Any) -> list[tuple[Any, ...]]:
        found = []
        for tokens, labels in batches:
            ids = [row[mask.bool()].tolist() for row, mask in zip(*tokens, strict=True)]
            found += [(tuple(row), int(label)) for row, label in zip(ids, labels, strict=True)]
        return sorted(found)

    def keys(batch: Any) -> tuple[Any, Any]:
        return batch["input_ids"], batch["attention_mask"]

    plain = [*plain_loader(texts, data.tokenizer, 8, seed=0)]  # type: ignore[attr-defined]
    assert sorted((len(batch["labels"]) for batch in plain), reverse=True) == list(EPOCH)
    data.repeat_evaluation_of(2)  # the second epoch
    own = [*islice(data.train_dataloader(), 3)]
    assert rows((keys(b), b["labels"]) for b in plain) == rows(
        (keys(b.tokens), b.label) for b in own
    )
    again = next(iter(plain_loader(texts, data.tokenizer, 8, seed=0)))  # type: ignore[attr-defined]
    assert torch.equal(again["input_ids"], plain[0]["input_ids"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["epoch", "task=vit_domainbed"], "task=vit_domainbed: expected a task on texts"),
        (["epoch", "moe=dynmoe_glue"], "moe=dynmoe_glue: the dense encoder is measured here"),
        (["epoch", "--steps", "0"], "expected a whole number of 1 or more"),
        (["data", "task=glue"], "task=glue: expected a task on images"),
        (["step", "task=glue", "data=rte", "data.source=tsv"], "data.root: data.source=tsv needs"),
        (["step", "task=glue", "--k", "9"], "up to 8, which is moe.num_experts"),
    ],
)
def test_refuses(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not (tmp_path / "outputs" / "bench").exists()


@pytest.mark.slow
def test_starts_end_with_the_first_step(glue: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "start.json"
    run("start", "--rounds", "1", "--json", str(file), *texts(glue, "moe.num_experts=2"))
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["imports", "plain", "dynmoe"]
    assert rows[1]["time_ratio"] == 1 and rows[2]["time_ratio"] > 0


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [("print(1)", 42, "ended with 0 before its first step: 1"), ("1/0", 42, "ZeroDivisionError")],
)
def test_a_start_without_a_step_is_no_sample(code: str, status: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Start([sys.executable, "-c", code], status).sample(1)


def test_start_refuses_other_tasks(tmp_path: Path, refused: Refused) -> None:
    message = refused("start", "task=vl", "--json", str(tmp_path / "start.json"))
    assert "task=vl: expected a task on texts, task=glue" in message
