"""``dynmoe-convert``: folders as on Hugging Face's hub to folders of ours, and back."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Refused, Run
from hydra import compose, initialize_config_module
from official_models import DENSE, VOCAB, config_of
from omegaconf import OmegaConf
from published_models import add_tokenizer, published
from safetensors.torch import load_file

from dynmoe import cli
from dynmoe.convert.config import describe
from dynmoe.convert.weights import to_dynmoe
from dynmoe.data.text.tokens import load_tokenizer
from dynmoe.data.vl.chat import conversation_tokenizer
from dynmoe.records import RunFolder

assert cli  # registers the resolvers of conf/

TOP_ANY, TOP_2 = -1, 2


@pytest.mark.parametrize(
    ("family", "top_k", "suffix"),
    [("stablelm", TOP_ANY, "bin"), ("qwen", TOP_2, "safetensors"), ("phi", DENSE, "safetensors")],
)
def test_there_and_back(
    tmp_path: Path,
    family: str,
    top_k: int,
    suffix: str,
    capsys: pytest.CaptureFixture[str],
    run: Run,
) -> None:
    state = published(tmp_path / "hub", family, top_k, suffix)
    run(f"from={tmp_path}/hub", f"to={tmp_path}/ours")
    printed = capsys.readouterr().out.splitlines()
    files = [str(tmp_path / "ours" / name) for name in ("checkpoints/last.ckpt", "config.yaml")]
    assert printed[0].endswith(" numbers") and printed[-2:] == files
    assert any("noise" in line for line in printed) == (top_k == TOP_2)
    assert RunFolder(tmp_path / "ours").is_done

    settings = describe(config_of(family, top_k))
    checkpoint: dict[str, Any] = torch.load(files[0], weights_only=True)
    assert checkpoint["global_step"] == 0 and "pytorch-lightning_version" in checkpoint
    expected = to_dynmoe(state, settings)
    assert checkpoint["state_dict"].keys() == {f"backbone.{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(checkpoint["state_dict"][f"backbone.{name}"], tensor)
    selected = torch.load(tmp_path / "ours" / "checkpoints" / "selected.ckpt", weights_only=True)
    assert selected["state_dict"].keys() == checkpoint["state_dict"].keys()

    run(f"run={tmp_path}/ours", f"to={tmp_path}/back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert describe(config) == {**settings, "notes": describe(config)["notes"]}
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_the_backbone_alone_is_not_is_left_out(tmp_path: Path, run: Run) -> None:
    """A trained run's checkpoint, by its file."""
    state = published(tmp_path / "hub", "phi", TOP_2, "bin")
    run(f"from={tmp_path}/hub", f"to={tmp_path}/ours")
    file = tmp_path / "ours" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["patience.count"] = torch.ones(1)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    file.unlink()
    arguments = f"run={tmp_path}/ours", f"to={tmp_path}/back"
    run(*arguments, f"checkpoint={tmp_path}/other.ckpt")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == state.keys()


def test_files_are_not_overwritten_unasked(tmp_path: Path, run: Run, refused: Refused) -> None:
    published(tmp_path / "hub", "stablelm", TOP_2, "bin")
    arguments = f"from={tmp_path}/hub", f"to={tmp_path}/ours"
    settings = tmp_path / "ours" / "config.yaml"
    settings.parent.mkdir()
    settings.write_text("mine")
    message = refused(*arguments)
    assert f"to={tmp_path}/ours: {settings} already exist" in message
    assert "overwrite=true" in message
    assert settings.read_text() == "mine"
    run(*arguments, "overwrite=true")
    assert OmegaConf.load(settings).backbone.template == "stablelm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from=a"], "expected from=FOLDER to=FOLDER, or run=FOLDER to=FOLDER"),
        (["from=a", "run=b", "to=c"], "from= and run= are two directions: give one"),
        (
            ["form=a"],
            "form=a: unknown argument, expected from=, run=, to=, format=, checkpoint=, tokenizer=",
        ),
        (["from=a", "to=b", "overwrite=yes"], "overwrite=yes: expected true or false"),
        (["from=a", "to=b", "checkpoint=last"], "checkpoint= belongs to run=FOLDER"),
        (["run=a", "to=b", "vision=c"], "vision= belongs to from=FOLDER"),
        (["from={0}/none", "to={0}/b"], "from={0}/none: expected a folder with config.json"),
        (["run={0}/none", "to={0}/b"], "{0}/none: expected a folder with config.yaml, found"),
    ],
)
def test_refused_commands(
    arguments: list[str], message: str, tmp_path: Path, refused: Refused
) -> None:
    given = [argument.format(tmp_path) for argument in arguments]
    assert message.format(tmp_path) in refused(*given)


def test_folders_that_are_not_whole(tmp_path: Path, refused: Refused) -> None:
    hub = tmp_path / "hub"
    published(hub, "stablelm", TOP_2, "bin")
    arguments = f"from={hub}", f"to={tmp_path}/ours"
    (hub / "pytorch_model-00002-of-00002.bin").unlink()
    message = "names shards that are not there: pytorch_model-00002-of-00002.bin"
    assert message in refused(*arguments)
    (hub / "pytorch_model.bin.index.json").unlink()
    assert "the weights do not fit the configuration; missing: " in refused(*arguments)
    (hub / "pytorch_model-00001-of-00002.bin").unlink()
    assert "expected model*.safetensors or pytorch_model*.bin, found none" in refused(*arguments)
    (hub / "config.json").write_text("{")
    assert f"{hub}/config.json: expected JSON" in refused(*arguments)
    (hub / "config.json").write_text("[1]")
    assert f"{hub}/config.json: expected keys with values, found a list" in refused(*arguments)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"moe": [1]}, "moe: expected keys with values, found"),
        ({"hidden_size": "64"}, "hidden_size: expected a number, found '64'"),
        ({"model_type": ["llava_phi"]}, "model_type: expected one of"),
    ],
)
def test_a_config_of_other_types_is_named(
    wrong: dict[str, Any], message: str, tmp_path: Path, refused: Refused
) -> None:
    hub = tmp_path / "hub"
    published(hub, "stablelm", TOP_2, "bin")
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps({**config, **wrong}))
    assert message in refused(f"from={hub}", f"to={tmp_path}/ours")


def test_the_checkpoint_has_to_be_there(tmp_path: Path, refused: Refused) -> None:
    save_run(tmp_path)
    arguments = f"run={tmp_path}", f"to={tmp_path}/back", "checkpoint=selected"
    message = f"checkpoint=selected: there is no file {tmp_path}/checkpoints/selected.ckpt"
    assert message in refused(*arguments)
    other = tmp_path / "other.ckpt"
    for content in (b"host\n", b"", b"PK\x03\x04", pickle.dumps({"a": 1}), pickle.dumps(Path("x"))):
        other.write_bytes(content)
        message = f"{other}: not a checkpoint of dynmoe-run (checkpoint=selected, last or FILE): "
        assert message in refused(*arguments[:2], f"checkpoint={other}")


# Tokenizers.


def test_a_tokenizer_comes_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run
) -> None:
    published(tmp_path / "hub", "stablelm", TOP_ANY)
    add_tokenizer(tmp_path / "hub")
    run(f"from={tmp_path}/hub", f"to={tmp_path}/ours")
    folder = tmp_path / "ours" / "language_model"
    assert "no tokenizer" not in capsys.readouterr().out
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("stablelm", VOCAB)
    assert len(load_tokenizer(str(folder), None)) == VOCAB


def test_a_tokenizer_of_code_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Run, refused: Refused
) -> None:
    """The first Qwen's: a file of tiktoken, and a class that transformers has not."""
    published(tmp_path / "hub", "qwen", TOP_2)
    (tmp_path / "hub" / "qwen.tiktoken").write_text("IQ== 0\n")
    own = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["a.QWenTokenizer"]}}
    (tmp_path / "hub" / "tokenizer_config.json").write_text(json.dumps(own))
    arguments = f"from={tmp_path}/hub", f"to={tmp_path}/ours", "overwrite=true"
    run(*arguments)
    message = "convert again with tokenizer=FOLDER, a folder of Qwen/Qwen1.5-1.8B's."
    assert message in capsys.readouterr().out
    folder = tmp_path / "ours" / "language_model"
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    (tmp_path / "other").mkdir()
    message = f"tokenizer={tmp_path}/other: expected a folder with tokenizer.json"
    other = f"tokenizer={tmp_path}/other"
    assert message in refused(*arguments, other)
    add_tokenizer(tmp_path / "other")
    run(*arguments, other)
    assert len(load_tokenizer(str(folder), None)) == VOCAB


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, refused: Refused) -> None:
    published(tmp_path / "hub", "phi", TOP_2)
    many = conversation_tokenizer([" ".join(f"word{i}" for i in range(50))], 100)
    many.save_pretrained(tmp_path / "hub")
    message = f"has 55 tokens, but the model's vocabulary is {VOCAB}"
    arguments = f"from={tmp_path}/hub", f"to={tmp_path}/ours"
    assert message in refused(*arguments)
    assert not (tmp_path / "ours").exists()


# Runs that the official code has no place for.


def save_run(folder: Path, *overrides: str) -> None:
    """A folder with a configuration and a checkpoint without weights."""
    with initialize_config_module("dynmoe.conf", version_base="1.3"):
        cfg = compose(
            "config",
            ["task=vl", "data=questions", "backbone=vl_tiny", "stage.start=null", *overrides],
        )
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)


def test_everything_that_is_refused_is_named(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "checkpoints").mkdir()
    weights = {"backbone.vision.model.cls_token": torch.ones(1)}
    checkpoint = {"state_dict": weights, "global_step": 0}
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    arguments = f"run={tmp_path}", f"to={tmp_path}/back"

    save_run(tmp_path)
    message = "the official code has the language models stablelm, qwen2, phi, found llama"
    assert message in refused(*arguments)

    few = "{num_attention_heads: 2, num_key_value_heads: 1, num_hidden_layers: 2, hidden_act: relu}"
    more = "backbone.architecture=qwen2", f"++backbone.options={few}", "data.fit=stretch"
    save_run(tmp_path, *more, "moe=gmoe")
    assert refused(*arguments).splitlines() == [
        "dynmoe-convert: backbone: hidden_act: expected silu, found relu",
        "backbone: num_key_value_heads: expected 2, as many as heads, found 1",
        "backbone.vision: expected a CLIP of transformers, found vit_tiny_patch16_224",
        "data.fit: expected one of pad, crop, found stretch",
        "moe.router: expected one of dynmoe.layers.TopAnyRouter, dynmoe.layers.TopKRouter, found "
        "dynmoe.layers.CosineTopKRouter",
    ]
    save_run(tmp_path, *more, "moe.router.combine=tutel")
    message = "moe.router.combine: expected constant_k or through_k, found tutel"
    assert message in refused(*arguments)


def test_help(capsys: pytest.CaptureFixture[str], run: Run) -> None:
    run("--help")
    assert "dynmoe-convert from=FOLDER to=FOLDER" in capsys.readouterr().out
