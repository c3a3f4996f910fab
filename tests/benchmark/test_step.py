"""`dynmoe-bench step` and `data` at a tiny size. No time is asserted."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refused, Run
from lightning.pytorch.plugins import Precision

from dynmoe.benchmark.models import AllThenMask, Loop, classification_loss, fit, random_batches
from dynmoe.benchmark.steps import Training
from dynmoe.layers import Experts, MoELayer, TopAnyRouter, moe_layers

DEPTH, DIM, PX, PATCH, BATCH, EXPERTS = 2, 32, 16, 4, 8, 8
TOKENS = BATCH * ((PX // PATCH) ** 2 + 1)
OPTIONS = f"{{depth: {DEPTH}, embed_dim: {DIM}, num_heads: 2, patch_size: {PATCH}}}"
TINY = [f"backbone.options={OPTIONS}", f"backbone.image_size={PX}", "runtime.malloc=system"]
STEP = ["step", "--device", "cpu", "--threads", "1", "--rounds", "2", "--batch", str(BATCH), *TINY]


@pytest.mark.usefixtures("short_samples")
def test_measures_all_cases_in_both_modes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    only = ["--only", "top-1", "top-2", "dynmoe", "loop", "all then mask"]
    run(*STEP, *only, "--k", "1", "1.5", "moe.router.smoothing=0.0")
    (file,) = Path("outputs/bench").glob("step-*.json")
    content: dict[str, Any] = json.loads(file.read_text())
    assert content["machine"]["threads"] == 1
    settings = {"matmul_precision", "malloc", "fused_attention", "wait"}
    assert content["settings"].keys() == settings
    assert content["workload"]["moe_layers"] == [1]
    names = ["dense", "top-1", "top-2", "dynmoe 1", "dynmoe 1.5", "loop", "all then mask"]
    rows = {(row["mode"], row["case"]): row for row in content["rows"]}
    assert list(rows) == [(mode, name) for mode in ("train", "inference") for name in names]
    for (mode, _), row in rows.items():
        numbers = [row[key] for key in ("samples_per_s", "median_ms", "ratio", "ideal", "of_ideal")]
        numbers += [*row["samples_per_s_quartiles"], *row["ratio_quartiles"], row["activated"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
        assert row["activated"] <= row["parameters"]
        assert (row["peak_bytes"] is not None) == (mode == "train")
    dense = rows["train", "dense"]
    assert dense["ratio"] == dense["ideal"] == 1 and dense["mean_k"] is None
    assert dense["activated"] == dense["parameters"]
    for name, k in (("top-1", 1), ("top-2", 2)):
        assert rows["train", name]["mean_k"] == rows["inference", name]["mean_k"] == k
    for k in (1, 1.5):
        row = rows["train", f"dynmoe {k:g}"]
        assert row["k"] == k and row["mean_k"] == pytest.approx(k, rel=0.15)
        assert rows["inference", f"dynmoe {k:g}"]["mean_k"] >= row["mean_k"]
    k_of = [rows["inference", name]["mean_k"] for name in ("dynmoe 1", "loop", "all then mask")]
    assert k_of == [k_of[0]] * 3  # the same routing

    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and str(file) in shown


@pytest.mark.usefixtures("short_samples")
def test_precisions_interleaved(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "step.json"
    precisions = ["32-true", "bf16-mixed", "bf16-true"]
    run(*STEP, "--only", "dynmoe", "--k", "2", "--precision", *precisions, "--json", str(file))
    content = json.loads(file.read_text())
    rows = [row for row in content["rows"] if row["mode"] == "train"]
    assert content["machine"]["dtype"] == ", ".join(precisions)
    assert [(row["case"], row["precision"]) for row in rows] == [
        (case, precision) for precision in precisions for case in ("dense", "dynmoe 2")
    ]
    assert [row["precision_ratio"] for row in rows[:2]] == [1, 1]
    assert all(row["precision_ratio"] > 0 and row["reference"] == "dense, 32-true" for row in rows)
    assert all(row["mean_k"] == pytest.approx(2, rel=0.15) for row in rows[1::2])
    assert len({row["ideal"] for row in rows[::2]}) == 1


@pytest.mark.usefixtures("short_samples")
def test_precision_is_that_of_the_configuration(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "step.json"
    few = ["--only", "dense", "--mode", "inference", "--json", str(file)]
    run(*STEP, *few, "trainer.precision=bf16-true")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["precision"] == "bf16-true"


@pytest.mark.usefixtures("short_samples")
def test_ideal_by_hand(tmp_path: Path, run: Run) -> None:
    """FLOPs of two blocks, patches and head; a second expert per token, and its router."""
    file = tmp_path / "step.json"
    run(*STEP, "--only", "top-2", "--mode", "inference", "--json", str(file))
    row = json.loads(file.read_text())["rows"][1]
    sequence = TOKENS // BATCH
    ffn = 2 * TOKENS * DIM * 4 * DIM * 2
    attention = 2 * TOKENS * DIM * 4 * DIM + 2 * 2 * TOKENS * sequence * DIM
    patches = 2 * BATCH * (sequence - 1) * 3 * PATCH**2 * DIM
    dense = DEPTH * (ffn + attention) + patches + 2 * BATCH * DIM * 10
    assert row["ideal"] == pytest.approx(dense / (dense + ffn + 2 * TOKENS * DIM * EXPERTS))
    router = EXPERTS * DIM
    one_ffn = 2 * 4 * DIM * DIM + 4 * DIM + DIM
    assert row["parameters"] - row["activated"] == (EXPERTS - 2) * one_ffn
    assert row["activated"] > 2 * one_ffn + router


@pytest.mark.usefixtures("short_samples")
def test_a_sparse_backbone_beside_the_dense_one(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "sparse.json"
    few = ["--only", "dynmoe", "--k", "1", "--mode", "inference", "--json", str(file)]
    run(*STEP, *few, "backbone.token_sparsify={keep: 0.25}", "backbone.adapter={dim: 4}")
    content = json.loads(file.read_text())
    rows = {row["case"]: row for row in content["rows"]}
    assert list(rows) == ["dense", "sparse", "dynmoe 1"]
    assert rows["sparse"]["ideal"] > 1.1 and rows["dense"]["ideal"] == 1
    assert rows["sparse"]["parameters"] > rows["dense"]["parameters"]
    assert content["workload"]["token_sparsify"] == "{'keep': 0.25}"


@pytest.mark.usefixtures("short_samples")
def test_baseline_may_have_other_settings_but_no_other_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run, refused: Refused
) -> None:
    old, new = tmp_path / "old.json", str(tmp_path / "new.json")
    few = [*STEP, "--only", "dense", "--mode", "inference", "--precision", "bf16-mixed"]
    run(*few, "runtime.fused_attention=true", "--json", str(old))
    capsys.readouterr()
    compared = [*few, "runtime.fused_attention=false", "--json", new, "--baseline", str(old)]
    run(*compared)
    shown = capsys.readouterr().out
    assert "fused_attention (True, now False)" in shown
    assert "samples/s" in shown.split("Against the baseline")[1]

    assert "batch (8, now 4)" in refused(*compared, "--batch", "4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "dynmo"], "--only dynmo: unknown case, expected some of 'dense', 'sparse'"),
        (["--only", "sparse"], "--only sparse: expected 'backbone.token_sparsify={keep: 0.7}'"),
        (["--k", "9"], "--k 9: expected a mean number of experts per token above 0 and up to 8"),
        (["--k", "2", "moe.num_experts=1"], "--k 2: expected a mean number of experts"),
        (["--k", "1", "moe.num_experts=1"], "top-2: expected moe.num_experts=2 or more"),
        (["moe.num_expert=3"], "moe.num_expert: unknown key. Did you mean 'num_experts'?"),
        (["moe=gmoe"], "moe=gmoe: expected the top-any router, as in moe=dynmoe"),
        (["moe=dense"], "moe=dense: expected the top-any router"),
        (["moe.layers=[]"], "moe.layers: [] leaves the router without a layer"),
        (["backbone.options.depth=1"], "moe.layers=[]: expected some blocks with MoE layers"),
        (
            ["moe.layers=[12]", "~backbone.options.depth"],
            "moe.layers=[12]: the backbone has 12 blocks",
        ),
        (["trainer.precision=64-true"], "trainer.precision=64-true: expected one of 32-true"),
        (["--against", "."], "--against .: expected a folder that holds dynmoe/"),
        (["backbone.model=nothing"], "backbone.model: timm knows no 'nothing'"),
        (["--baseline", "gone.json"], "--baseline gone.json: there is no such file"),
        (["--json", "."], "--json .: expected a file to write, this is a folder"),
    ],
)
def test_step_refuses_before_work(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*STEP, *arguments)
    assert not Path("outputs").exists()


def test_training_leaves_the_weights_and_gives_every_used_expert_a_gradient() -> None:
    model = tiny_model()
    batches = random_batches(BATCH, 3, 4, 10, torch.device("cpu"))
    loss = partial(classification_loss, model, 0.01)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    case = Training(model, loss, optimizer, batches, Precision())
    before = [p.clone() for p in model.parameters()]
    case()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(case.optimizer.state) == len(before)


def test_plain_ways_equal_the_experts() -> None:
    model = tiny_model().double()
    (layer,) = moe_layers(model).values()
    x_TD = torch.randn(30, 6, dtype=torch.float64)
    want_TD = layer(x_TD)
    own = layer.experts
    for way in (Loop, AllThenMask):
        layer.experts = way(own)
        torch.testing.assert_close(layer(x_TD), want_TD)
        torch.testing.assert_close(layer.compact()(x_TD), want_TD)
    assert isinstance(own, Experts)


def tiny_model() -> torch.nn.Module:
    """Pixels of 4 x 4 images to 10 classes, through one fitted MoE layer."""
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 6))
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(48, 6),
        MoELayer(mlp, 6, TopAnyRouter, 4, init="fresh"),
        torch.nn.Linear(6, 10),
    )
    fit(model, 2.0, random_batches(64, 3, 4, 10, torch.device("cpu"))[:1])
    return model


def test_loader_of_the_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run) -> None:
    file = tmp_path / "data.json"
    options = ["--workers", "0", "1", "--seconds", "0.1", "--json", str(file)]
    run("data", *options, "data.batch_size=4")
    content = json.loads(file.read_text())
    assert content["workload"] == {"data": "RotatedDigits", "image_size": 28, "batch": 20}
    assert [row["workers"] for row in content["rows"]] == [0, 1]
    for row in content["rows"]:
        assert row["images"] > 0 and row["images"] % 20 == 0
        assert row["images_per_s"] == pytest.approx(row["images"] / row["seconds"])
        assert row["ms_per_image"] == pytest.approx(1000 / row["images_per_s"])
        assert row["cpu_ms_per_image"] is None or 0 < row["cpu_ms_per_image"] < 1000
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "0: expected seconds, more than 0"),
        (["--workers", "-1"], "expected"),
        (["data=pacs"], "data.root: required, the folder of the data set"),
        (["data.test_envs=[9]"], "test_envs"),
    ],
)
def test_data_refuses(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    refused: Refused,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused("data", *arguments)
    assert not Path("outputs").exists()
