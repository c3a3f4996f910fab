"""Trained runs as other software reads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from omegaconf import DictConfig
from test_export_models import COSINE, KEYS, TOP_1, TOP_ANY
from timm.layers import Mlp
from tiny_lm import config as lm_config
from tiny_lm import write_corpus
from tiny_runs import tiny_config
from tiny_texts import config as text_config
from tiny_texts import write_rte, write_stsb
from torch import nn

from dynmoe import job
from dynmoe.convert.runs import trained_model
from dynmoe.layers import MoELayer
from dynmoe.layers.ffn import GatedFFN
from dynmoe.records import RunFolder
from dynmoe.training import trained

pytestmark = pytest.mark.slow

FIRST, SECOND = ["The cat sleeps.", "A dog runs"], ["the red cat never sees", "dog"]

ELSEWHERE = """
import importlib.abc, json, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *arguments):
        if name.split(".")[0] in ("dynmoe", "lightning", "hydra"):
            raise ImportError(name)

sys.meta_path.insert(0, Without())
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder, first, second = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
texts = tokenizer(first, second, padding=True, truncation=True, return_tensors="pt")
found = {"length": tokenizer.model_max_length, "ids": texts["input_ids"].tolist()}
for implementation in ("grouped_mm", "batched_mm", "eager"):
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=True, experts_implementation=implementation
    )
    with torch.no_grad():
        found[implementation] = model(**texts).logits.tolist()
        body = model.base_model(**texts).last_hidden_state
        alone = AutoModel.from_pretrained(
            folder, trust_remote_code=True, experts_implementation=implementation
        )
        torch.testing.assert_close(alone(**texts).last_hidden_state, body)
classify = pipeline("text-classification", folder, trust_remote_code=True)
pair = {"text": first[0], "text_pair": second[0]}
found["said"] = classify(pair)
try:
    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    found["untrusted"] = str(error)
print(chr(10) + json.dumps(found))
"""


def elsewhere(folder: Path, home: Path) -> dict[str, Any]:
    """Load a folder in a process that has neither dynmoe nor a network."""
    where = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = json.dumps([str(folder), FIRST, SECOND])
    command = [sys.executable, "-c", ELSEWHERE, arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=where, cwd=home)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trained_run(cfg: DictConfig, path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    job.train(cfg, folder)
    folder.mark_done()
    return folder


def model_of(folder: RunFolder) -> Any:
    checkpoint = folder.path / "checkpoints" / "selected.ckpt"
    return trained_model(trained.configuration(folder), folder, checkpoint)


@pytest.fixture(scope="module")
def rte(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = write_rte(tmp_path_factory.mktemp("rte"))
    return trained_run(text_config(root, f"paths.outputs={root}", "data=rte"), root / "run")


def test_a_text_classifier_without_dynmoe(rte: RunFolder, tmp_path: Path, run: Run) -> None:
    run(f"run={rte.path}", f"to={tmp_path}/out")
    found = elsewhere(tmp_path / "out", tmp_path)
    ours = model_of(rte)
    texts = ours.tokenizer(FIRST, SECOND, padding=True, truncation=True, return_tensors="pt")
    assert found["ids"] == texts["input_ids"].tolist() and found["length"] == 128
    with torch.no_grad():
        logits = ours.model(texts)
    for implementation in ("grouped_mm", "batched_mm", "eager"):
        theirs = torch.tensor(found[implementation])
        torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=1e-5)
    names = ("entailment", "not_entailment")
    assert found["said"]["label"] == names[int(logits[0].argmax())]
    assert "trust_remote_code" in found["untrusted"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# DynMoE on RTE" in card and "| dev | accuracy |" in card
    assert "| model.bert.encoder.layer.2.intermediate |" in card


def test_a_language_model_is_trained_on(tmp_path: Path, run: Run) -> None:
    """A dense model and a mixture go out; the former is a backbone of further runs, with the
    vocabulary that it has learnt."""
    write_corpus(tmp_path / "corpus")
    for moe in ("dense", "topk"):
        cfg = lm_config(tmp_path / "corpus", f"paths.outputs={tmp_path}", moe=moe)
        folder = trained_run(cfg, tmp_path / moe)
        run(f"run={folder.path}", f"to={tmp_path}/out_{moe}")
        note = json.loads((tmp_path / f"out_{moe}" / "export.json").read_text())
        assert note["largest_difference"] < 1e-5
        card = (tmp_path / f"out_{moe}" / "README.md").read_text()
        assert "text-generation" in card and "blocks of 16 tokens" in card
    out = f"{tmp_path}/out_dense"
    own = (f"backbone.path={out}", "backbone.architecture=null", "backbone.pretrained=true")
    cfg = lm_config(tmp_path / "corpus", *own, f"paths.outputs={tmp_path}")
    job.train(cfg, RunFolder(tmp_path / "further"))
    later = RunFolder(tmp_path / "further").read("results")
    before = RunFolder(tmp_path / "dense").read("results")
    assert later[0]["scores"]["validation"]["loss"] < before[0]["scores"]["validation"]["loss"]


def test_other_kinds_of_runs(tmp_path: Path, run: Run) -> None:
    """Regression, adapters of LoRA, parts of an FFN with average keys, a dense model."""
    write_stsb(write_rte(tmp_path))
    for number, (moe, overrides) in enumerate(
        {
            "topk": ("data=stsb", "moe.num_experts=3"),
            "gmoe": ("data=rte", "backbone.lora={r: 2}", "moe.router.projection=4"),
            "emoe": ("data=rte", "moe.num_experts=4", "moe.top_k=2", "moe.init=random"),
            "dense": ("data=rte",),
        }.items()
    ):
        cfg = text_config(tmp_path, f"paths.outputs={tmp_path}", *overrides, moe=moe)
        folder = trained_run(cfg, tmp_path / f"run{number}")
        run(f"run={folder.path}", f"to={tmp_path}/out{number}")
        config = json.loads((tmp_path / f"out{number}" / "config.json").read_text())
        assert ("auto_map" in config) == (moe != "dense")
        if moe == "topk":
            assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
        note = json.loads((tmp_path / f"out{number}" / "export.json").read_text())
        assert note["largest_difference"] < 1e-5


SPARSE = "backbone.token_sparsify={keep: 0.5, shrink_steps: 9}", "backbone.adapter={dim: 4}"
MIXED = "mixing=dynamic", "mixing.every=2", "mixing.probe_tokens=40"


@pytest.mark.parametrize("options", [(), SPARSE, MIXED])
def test_an_image_classifier_in_onnxruntime(
    options: tuple[str, ...], tmp_path: Path, run: Run
) -> None:
    import onnxruntime

    cfg = tiny_config(f"paths.outputs={tmp_path}", "task.steps=4", *options)
    folder = trained_run(cfg, tmp_path / "run")
    run(f"run={folder.path}", f"to={tmp_path}/out")
    facts = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert facts["output"]["classes"] == [str(digit) for digit in range(10)]
    assert facts["input"]["shape"] == ["batch", 1, 28, 28]
    assert (facts["mean"], facts["std"]) == ([0.0], [1.0])  # digits are not normalised
    ours = model_of(folder).model
    file = str(tmp_path / "out" / "model.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        images = torch.randn(count, 1, 28, 28)
        with torch.no_grad():
            expected = ours(images)
        (logits,) = session.run(None, {"image": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)


def gated() -> nn.Module:
    layers = (nn.Linear(8, 12, bias=False) for _ in range(2))
    return GatedFFN(*layers, nn.SiLU(), nn.Linear(12, 8, bias=False), 0.1)


class Beside(nn.Module):
    """Layers on the same tokens: [B, N, D] -> [layers, B, N, D]."""

    def __init__(self, layers: list[MoELayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([layer(x) for layer in self.layers])


def test_every_layer_in_onnxruntime(tmp_path: Path) -> None:
    """Every router, and both forms of FFN. Tokens that are not finite come out as 0, and an expert
    may have no token."""
    from dynmoe.convert.onnx_file import export as to_onnx

    torch.manual_seed(0)
    layers = []
    for number, router in enumerate((TOP_ANY, TOP_1, COSINE, KEYS)):
        ffn = Mlp(8, 16) if number % 2 else gated()
        layer = MoELayer(ffn, 8, router, 3, init="fresh")
        if layer.adaptive:
            layer.remove_expert(1)
        layers.append(layer.compact())
    model = Beside(layers).eval()
    to_onnx(model, torch.randn(3, 5, 8), tmp_path / "layers.onnx")
    import onnxruntime

    file = str(tmp_path / "layers.onnx")
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 4):
        x = torch.randn(count, 5, 8)
        x[0, 0], x[0, 1, 3], x[-1, 2] = float("nan"), float("inf"), 0.0
        with torch.no_grad():
            expected = model(x)
        assert expected[:, 0, :2].eq(0).all() and expected.isfinite().all()
        (found,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected)


def test_a_text_classifier_as_an_exported_program(rte: RunFolder) -> None:
    ours = model_of(rte).model
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2, max=128)

    def texts(count: int, tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(4, 12, (count, tokens))
        mask = (torch.arange(tokens) < torch.randint(1, tokens, (count, 1))).long()
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids * 0}

    shapes = {name: {0: batch, 1: length} for name in texts(3, 7)}
    program = torch.export.export(ours, (texts(3, 7),), dynamic_shapes=(shapes,)).module()
    for count, tokens in ((1, 5), (4, 9)):
        given = texts(count, tokens)
        with torch.no_grad():
            torch.testing.assert_close(program(given), ours(given))
