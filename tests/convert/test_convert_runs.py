"""Published models end to end: converted, they are started from, answer, and go back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from official_models import DENSE, config_of
from omegaconf import OmegaConf
from PIL import Image
from published_models import add_tokenizer, clip_folder, published, read
from safetensors.torch import load_file
from torch import Tensor

from dynmoe import job
from dynmoe.benchmark.candidates import configuration
from dynmoe.config.check import problems
from dynmoe.convert.checkpoints import from_official, to_official
from dynmoe.convert.config import describe
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder
from dynmoe.training import build, evaluate
from runners import convert

pytestmark = pytest.mark.slow

TOP_ANY, TOP_2 = -1, 2
QUESTIONS = 3


def pope(root: Path) -> Path:
    """A published set: every other image is red."""
    (root / "val2014").mkdir(parents=True)
    rows = []
    for i in range(QUESTIONS):
        Image.new("RGB", (40, 30), ("red", "blue")[i % 2]).save(root / "val2014" / f"{i}.png")
        row = {"question_id": i, "image": f"{i}.png", "text": "is it red ?"}
        rows.append({**row, "label": ("yes", "no")[i % 2]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "coco_pope_random.json").write_text(lines)
    return root


def run_convert(**given: str | Path) -> None:
    named = {key.rstrip("_"): str(value) for key, value in given.items()}
    arguments = convert.parse([f"{key}={value}" for key, value in named.items()])
    (from_official if "from" in arguments else to_official)(arguments)


def answers_of(run: Path, benchmark: Path) -> list[str]:
    arguments = [f"run={run}", "mode=answer", f"question_sets.pope={benchmark}"]
    small = ["data.max_new_tokens=3", "trainer.accelerator=cpu"]
    _, folder, checkpoint, cfg = evaluate.parse([*arguments, *small])
    cfg.trainer.enable_progress_bar = False
    scores = evaluate.answer(folder, checkpoint, cfg)
    assert 0 <= scores["pope"]["score"] <= 1
    file = run / "answers" / "pope" / "coco_pope_random_answers.jsonl"
    return [json.loads(line)["answer"] for line in file.read_text().splitlines()]


def assert_equal(found: Path, expected: dict[str, Tensor]) -> None:
    weights = load_file(found / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize(
    ("family", "top_k", "settings"),
    [
        ("stablelm", TOP_ANY, {"moe.name": "dynmoe_vl_official", "moe.num_experts": 2}),
        ("qwen", TOP_2, {"moe.name": "moe_llava", "moe.router.top_k": 2}),
    ],
)
def test_a_model_with_experts_answers_and_goes_back(
    family: str, top_k: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    """With its image tower, or without: then that of vision=FOLDER is taken."""
    clip, benchmark = clip_folder(tmp_path / "clip"), pope(tmp_path / "pope")
    found = []
    for tower in (clip, None):
        hub, ours = (tmp_path / f"{name}{tower is None}" for name in ("hub", "ours"))
        state = published(hub, family, top_k, tower=tower)
        add_tokenizer(hub)
        run_convert(from_=hub, to=ours, vision=clip)

        cfg = OmegaConf.load(ours / "config.yaml")
        cfg.mode = "check"  # there is nothing to train on
        assert problems(cfg) == []  # type: ignore[arg-type]
        expected = {
            "stage.start": None,
            "moe.layers": [0, 2],
            "backbone.template": family,
            "backbone.path": str(ours / "language_model"),
            "backbone.vision.image_size": 28,
            "backbone.vision.layer": -2,
            "data.fit": "pad",
            **settings,
        }
        assert {key: OmegaConf.select(cfg, key) for key in expected} == expected
        assert RunFolder(ours).is_done

        found.append(answers_of(ours, benchmark))
        run_convert(run=ours, to=tmp_path / f"back{tower is None}")
        assert_equal(tmp_path / f"back{tower is None}", read(state))
        back = json.loads((tmp_path / f"back{tower is None}" / "config.json").read_text())
        before = describe(config_of(family, top_k))
        assert describe(back) == {**before, "notes": describe(back)["notes"]}
    assert found[0] == found[1] and len(found[0]) == QUESTIONS
    assert any(found[0])  # a model that says nothing proves nothing


def conversations(root: Path) -> Path:
    rows = [
        {
            "id": str(i),
            "image": f"{i % QUESTIONS}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nis it red ?"},
                {"from": "gpt", "value": ("yes", "no")[i % QUESTIONS % 2]},
            ],
        }
        for i in range(8)
    ]
    (root / "train.json").write_text(json.dumps(rows))
    return root


def test_training_starts_from_a_dense_model(tmp_path: Path) -> None:
    """Two steps of DynMoE from a second stage; the result goes to the official format and back."""
    clip, benchmark = clip_folder(tmp_path / "clip"), pope(tmp_path / "pope")
    published(tmp_path / "hub", "phi", DENSE)
    add_tokenizer(tmp_path / "hub")
    ours = tmp_path / "ours"
    run_convert(from_=tmp_path / "hub", to=ours, vision=clip)
    assert len(answers_of(ours, benchmark)) == QUESTIONS

    root = conversations(benchmark / "val2014")
    command = [
        *("task=vl", "data=llava", f"data.root={root}", "data.content.files.moe=[train.json]"),
        *("backbone=vl_phi2", f"backbone.path={ours}/language_model", "backbone.pretrained=false"),
        *(f"backbone.vision.path={clip}", "backbone.vision.image_size=28"),
        *(f"stage.start={ours}", f"data.question_sets={{pope: {benchmark}}}", "data.batch_size=4"),
        *("trainer.max_steps=2", "data.max_new_tokens=3", "task.optimizer.lr=1e-2"),
        *("logger=none", "trainer.enable_progress_bar=false", f"paths.outputs={tmp_path}/out"),
    ]
    cfg = configuration(command, [])
    with pytest.raises(ConfigError, match=r"its language model has another layer_norm_eps than"):
        load_start(configuration([*command, "+backbone.options.layer_norm_eps=1e-6"], []))
    folder = RunFolder(tmp_path / "out" / "run")
    folder.path.mkdir(parents=True)
    place = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(folder.path)))
    with mock.patch.object(HydraConfig, "get", lambda: place):
        job.job(cfg)

    trained, start = (
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (folder.path, ours)
    )
    frozen = "backbone.language_model.model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(trained[frozen], start[frozen].float())
    assert trained["backbone.language_model.model.layers.0.mlp.active_E"].tolist() == [
        *(True, True, False, False)
    ]
    clip_state = load_file(clip / "model.safetensors")
    tower = "backbone.vision.model.embeddings.class_embedding"
    assert torch.equal(trained[tower], clip_state["embeddings.class_embedding"])

    run_convert(run=folder.path, to=tmp_path / "official")
    config = json.loads((tmp_path / "official" / "config.json").read_text())
    assert config["model_type"] == "moe_llava_phi" and config["moe"]["moe_layers_idx"] == [0, 2]
    run_convert(from_=tmp_path / "official", to=tmp_path / "again", vision=clip)
    again = torch.load(tmp_path / "again" / "checkpoints" / "last.ckpt", weights_only=True)
    names = [name for name in trained if name.startswith("backbone.")]
    assert again["state_dict"].keys() == set(names)
    for name in names:
        assert torch.equal(again["state_dict"][name], trained[name]), name


def load_start(cfg: Any) -> None:
    """Do the work of a run before its first step."""
    data = build.build_data(cfg)
    data.setup()
    build.build_task(cfg, data, fused_attention=True)
