"""``dynmoe-convert``: folders as on Hugging Face's hub to folders of ours, and back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from official_models import config_of, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynmoe.backbones.official import to_dynmoe
from dynmoe.backbones.official_config import describe
from runners import convert

TOP_ANY, TOP_2 = -1, 2


def published(folder: Path, family: str, top_k: int, suffix: str) -> dict[str, Tensor]:
    """In two shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(family, top_k)))
    state = {name: tensor.half() for name, tensor in weights(family, top_k).items()}
    names = sorted(state)
    shards = {1: names[::2], 2: names[1::2]}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {}
    for number, part in shards.items():
        file = folder / f"{stem}-0000{number}-of-00002.{suffix}"
        tensors = {name: state[name] for name in part}
        save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
        index |= dict.fromkeys(part, file.name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    return state


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["dynmoe-convert", *arguments])
    convert.main()


@pytest.mark.parametrize(
    ("family", "top_k", "suffix"),
    [("stablelm", TOP_ANY, "bin"), ("qwen", TOP_2, "safetensors"), ("phi", TOP_ANY, "safetensors")],
)
def test_there_and_back(
    tmp_path: Path,
    family: str,
    top_k: int,
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = published(tmp_path / "hub", family, top_k, suffix)
    run(monkeypatch, f"from={tmp_path}/hub", f"to={tmp_path}/ours")
    printed = capsys.readouterr().out.splitlines()
    files = [str(tmp_path / "ours" / "checkpoints" / "last.ckpt"), f"{tmp_path}/ours/settings.yaml"]
    assert printed[0].endswith(" numbers") and printed[-2:] == files
    assert any("noise" in line for line in printed) == (top_k == TOP_2)

    settings = yaml.safe_load((tmp_path / "ours" / "settings.yaml").read_text())
    assert settings == describe(config_of(family, top_k))
    checkpoint: dict[str, Any] = torch.load(files[0], weights_only=True)
    assert checkpoint["global_step"] == 0 and "pytorch-lightning_version" in checkpoint
    expected = to_dynmoe(state, settings)
    assert checkpoint["state_dict"].keys() == {f"backbone.{name}" for name in expected}
    for name, tensor in expected.items():
        assert torch.equal(checkpoint["state_dict"][f"backbone.{name}"], tensor)

    run(monkeypatch, f"run={tmp_path}/ours", f"to={tmp_path}/back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert describe(config) == settings
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_what_the_backbone_alone_is_not_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained run's checkpoint, by its file."""
    state = published(tmp_path / "hub", "phi", TOP_2, "bin")
    run(monkeypatch, f"from={tmp_path}/hub", f"to={tmp_path}/ours")
    file = tmp_path / "ours" / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["patience.count"] = torch.ones(1)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    file.unlink()
    arguments = f"run={tmp_path}/ours", f"to={tmp_path}/back"
    run(monkeypatch, *arguments, f"checkpoint={tmp_path}/other.ckpt")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == state.keys()


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_files_are_not_overwritten_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path / "hub", "stablelm", TOP_2, "bin")
    arguments = f"from={tmp_path}/hub", f"to={tmp_path}/ours"
    settings = tmp_path / "ours" / "settings.yaml"
    settings.parent.mkdir()
    settings.write_text("mine")
    message = refused(monkeypatch, capsys, *arguments)
    assert message == (
        f"dynmoe-convert: to={tmp_path}/ours: {settings} would be lost. overwrite=true?\n"
    )
    assert settings.read_text() == "mine"
    run(monkeypatch, *arguments, "overwrite=true")
    assert yaml.safe_load(settings.read_text())["family"] == "stablelm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from=a"], "expected from=FOLDER to=FOLDER, or run=FOLDER to=FOLDER"),
        (["from=a", "run=b", "to=c"], "expected from=FOLDER to=FOLDER, or run=FOLDER to=FOLDER"),
        (
            ["form=a"],
            "form=a: unknown argument, expected from=, run=, to=, checkpoint=, overwrite=",
        ),
        (["from=a", "to=b", "overwrite=yes"], "overwrite=yes: expected true or false"),
        (["from=a", "to=b", "checkpoint=last"], "checkpoint= belongs to run=: from= reads all"),
        (["from={0}/none", "to={0}/b"], "from={0}/none: expected a folder with config.json"),
        (["run={0}/none", "to={0}/b"], "run={0}/none: expected a folder with settings.yaml"),
    ],
)
def test_refused_commands(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [argument.format(tmp_path) for argument in arguments]
    assert message.format(tmp_path) in refused(monkeypatch, capsys, *given)


def test_folders_that_are_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = tmp_path / "hub"
    published(hub, "stablelm", TOP_2, "bin")
    arguments = f"from={hub}", f"to={tmp_path}/ours"
    (hub / "pytorch_model-00002-of-00002.bin").unlink()
    message = "names shards that are not there: pytorch_model-00002-of-00002.bin"
    assert message in refused(monkeypatch, capsys, *arguments)
    (hub / "pytorch_model.bin.index.json").unlink()
    assert "the weights do not fit the configuration; missing: " in refused(
        monkeypatch, capsys, *arguments
    )
    (hub / "pytorch_model-00001-of-00002.bin").unlink()
    assert "expected model*.safetensors or pytorch_model*.bin, found none" in refused(
        monkeypatch, capsys, *arguments
    )
    (hub / "config.json").write_text("{")
    assert f"{hub}/config.json: expected JSON" in refused(monkeypatch, capsys, *arguments)
    assert not (tmp_path / "ours").exists()


def test_the_checkpoint_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.yaml").write_text("{}")
    arguments = f"run={tmp_path}", f"to={tmp_path}/back", "checkpoint=selected"
    message = f"checkpoint=selected: there is no file {tmp_path}/checkpoints/selected.ckpt"
    assert message in refused(monkeypatch, capsys, *arguments)


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--help")
    assert "dynmoe-convert from=FOLDER to=FOLDER" in capsys.readouterr().out
