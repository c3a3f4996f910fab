"""``dynmoe-convert``: checkpoints of MoE-LLaVA and DynMoE-LLaVA as ours, and ours as theirs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dynmoe.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

HELP = """dynmoe-convert turns published MoE-LLaVA and DynMoE-LLaVA models into ours, and back.

  dynmoe-convert from=FOLDER to=FOLDER [overwrite=true]
  dynmoe-convert run=FOLDER to=FOLDER [checkpoint=last|selected|FILE] [overwrite=true]

from=FOLDER holds config.json and weights (*.safetensors or pytorch_model*.bin) as on Hugging Face's
hub; written are to/checkpoints/last.ckpt and to/settings.yaml. run=FOLDER is such a folder; written
are to/model.safetensors and to/config.json, which the official code reads. Tokenizers are not
copied.
"""

KEYS = ("from", "run", "to", "checkpoint", "overwrite")
BACKBONE = "backbone."


def main() -> None:
    """Exit 0, or 2 with a message that names what is wrong."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    try:
        given = parse(arguments)
        (from_official if "from" in given else to_official)(given)
    except UserError as error:
        print(f"dynmoe-convert: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def parse(arguments: list[str]) -> dict[str, str]:
    """The arguments by key.

    Raises:
        ConfigError: an unknown key or wrong value, or neither or both of from= and run=.
    """
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            known = ", ".join(f"{key}=" for key in KEYS)
            raise ConfigError(f"{argument}: unknown argument, expected {known}")
        given[key] = value
    if "to" not in given or ("from" in given) == ("run" in given):
        raise ConfigError("expected from=FOLDER to=FOLDER, or run=FOLDER to=FOLDER")
    if "checkpoint" in given and "from" in given:
        raise ConfigError("checkpoint= belongs to run=: from= reads all weights of its folder")
    if given.get("overwrite", "false") not in ("true", "false"):
        raise ConfigError(f"overwrite={given['overwrite']}: expected true or false")
    return given


def from_official(given: Mapping[str, str]) -> list[Path]:
    """The files written, our checkpoint and its settings.

    Raises:
        ConfigError: files that are there already.
        DataError: no or other files in the folder than an official model has.
    """
    import torch

    from dynmoe.backbones.official import to_dynmoe
    from dynmoe.backbones.official_config import describe

    source, target = Path(given["from"]).expanduser(), Path(given["to"]).expanduser()
    files = target / "checkpoints" / "last.ckpt", target / "settings.yaml"
    _check_free(files, given)
    config = source / "config.json"
    if not config.is_file():
        raise DataError(f"from={source}: expected a folder with config.json and weights")
    settings = describe(_read_json(config))
    weights = to_dynmoe(read_weights(source), settings)
    checkpoint = {
        "state_dict": {BACKBONE + name: tensor for name, tensor in weights.items()},
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }
    _write(files[0], lambda file: torch.save(checkpoint, file))
    text = yaml.safe_dump(settings, sort_keys=False)
    _write(files[1], lambda file: file.write_text(text, encoding="utf-8"))
    return _report(files, weights, settings["notes"])


def to_official(given: Mapping[str, str]) -> list[Path]:
    """The files written, weights and config.json as the official code reads them.

    Raises:
        ConfigError: files that are there already, or no such checkpoint.
        DataError: no settings.yaml in the folder, or weights they do not fit.
    """
    import torch
    from safetensors.torch import save_file

    from dynmoe.backbones import official
    from dynmoe.backbones.official_config import official_config
    from dynmoe.report.records import RunFolder
    from runners.trained import checkpoint_of

    target = Path(given["to"]).expanduser()
    files = target / "model.safetensors", target / "config.json"
    _check_free(files, given)
    folder = RunFolder(Path(given["run"]).expanduser())
    saved = folder.path / "settings.yaml"
    if not saved.is_file():
        raise DataError(f"run={folder.path}: expected a folder with settings.yaml, found none")
    name = given.get("checkpoint", "last")
    checkpoint = checkpoint_of(folder, name)
    if not checkpoint.is_file():
        raise ConfigError(f"checkpoint={name}: there is no file {checkpoint}")
    settings = yaml.safe_load(saved.read_text(encoding="utf-8"))
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    ours = {
        name.removeprefix(BACKBONE): tensor
        for name, tensor in state.items()
        if name.startswith(BACKBONE)
    }
    weights = official.to_official(ours, settings)
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    _write(files[0], lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    text = json.dumps(official_config(settings), indent=2) + "\n"
    _write(files[1], lambda file: file.write_text(text, encoding="utf-8"))
    return _report(files, weights, ())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder as Hugging Face's hub has them, one shard after the other.

    Raises:
        DataError: no weights, or a shard that the folder's index names and is not there.
    """
    import torch
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise DataError(f"{folder}: expected model*.safetensors or pytorch_model*.bin, found none")
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        named = set(_read_json(index)["weight_map"].values())
        if absent := sorted(named.difference(file.name for file in files)):
            raise DataError(f"{index}: names shards that are not there: {', '.join(absent)}")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".bin":
            state.update(torch.load(file, map_location="cpu", weights_only=True))
        else:
            state.update(load_file(file))
    return state


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, found something else: {error}") from None


def _check_free(files: tuple[Path, ...], given: Mapping[str, str]) -> None:
    if given.get("overwrite") != "true" and (taken := [str(f) for f in files if f.exists()]):
        raise ConfigError(f"to={given['to']}: {', '.join(taken)} would be lost. overwrite=true?")


def _write(file: Path, write: Callable[[Path], Any]) -> None:
    """Under another name first, so that a file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    write(partial)
    os.replace(partial, file)


def _report(
    files: tuple[Path, ...], weights: Mapping[str, Tensor], notes: tuple[str, ...] | list[str]
) -> list[Path]:
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{len(weights)} tensors, {count:,} numbers")
    for line in (*notes, *files):
        print(line)
    return list(files)


if __name__ == "__main__":
    main()
