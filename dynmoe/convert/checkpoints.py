"""Published checkpoints as run folders, and run folders as published checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.convert.files import check_free, read_json, read_weights, write, write_again
from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

BACKBONE = "backbone."


def from_official(given: Mapping[str, str]) -> list[Path]:
    """The files of a run folder, `done` the last.

    Raises:
        ConfigError: files that are there already, or a tokenizer or tower that does not fit.
        DataError: no or other files in the folder than an official model has.
    """
    from omegaconf import OmegaConf

    from dynmoe.convert.config import describe, run_configuration
    from dynmoe.convert.weights import to_dynmoe, tower
    from dynmoe.records import RunFolder

    source, target = (Path(given[key]).expanduser().resolve() for key in ("from", "to"))
    files = [target / "checkpoints" / "last.ckpt", target / "config.yaml"]
    check_free(files, given)
    if not (source / "config.json").is_file():
        raise DataError(f"from={source}: expected a folder with config.json and weights")
    settings = describe(read_json(source / "config.json"))
    language_model, notes = _language_model(settings, source, given.get("tokenizer"))
    vision = tower(settings["vision"]["model"], given.get("vision"))
    config = run_configuration(settings, vision, target / "language_model")
    weights = to_dynmoe(read_weights(source), settings)

    (target / "done").unlink(missing_ok=True)
    for name, content in language_model.items():
        write(target / "language_model" / name, content)
    _write_checkpoint(files[0], weights)
    write(files[1], OmegaConf.to_yaml(config))
    RunFolder(target).mark_done()
    return _report(files, weights, [*settings["notes"], *notes])


def to_official(given: Mapping[str, str]) -> list[Path]:
    """The files written, weights and config.json as the official code reads them.

    Raises:
        ConfigError: files that are there already, no run folder or checkpoint, or a model that the
            official code has not.
        DataError: weights that do not fit the configuration.
    """
    import torch
    from safetensors.torch import save_file

    from dynmoe.convert.config import official_config, settings_of
    from dynmoe.convert.weights import to_official as official_weights
    from dynmoe.records import RunFolder
    from dynmoe.training import trained

    target = Path(given["to"]).expanduser()
    files = [target / "model.safetensors", target / "config.json"]
    check_free(files, given)
    folder = RunFolder(Path(given["run"]).expanduser())
    cfg = trained.configuration(folder)
    name = given.get("checkpoint", "last")
    checkpoint = trained.checkpoint_of(folder, name)
    if not checkpoint.is_file():
        raise ConfigError(f"checkpoint={name}: there is no file {checkpoint}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    ours = {k.removeprefix(BACKBONE): v for k, v in state.items() if k.startswith(BACKBONE)}
    settings = settings_of(cfg, ours)
    converted = official_weights(ours, settings)
    tensors = {name: tensor.contiguous() for name, tensor in converted.items()}
    write(files[0], lambda file: save_file(tensors, file, metadata={"format": "pt"}))
    write(files[1], json.dumps(official_config(settings), indent=2) + "\n")
    return _report(files, converted, [])


def _language_model(
    settings: Mapping[str, Any], source: Path, given: str | None
) -> tuple[dict[str, bytes], list[str]]:
    """Files by name, config.json and a tokenizer's; and what is to be said of them."""
    from transformers import AutoConfig

    from dynmoe.convert.config import hub_name
    from dynmoe.convert.files import tokenizer_files

    model = settings["language_model"]
    config = AutoConfig.for_model(model["architecture"], **model["options"])
    files = {"config.json": config.to_json_string().encode()}
    place = source if given is None else Path(given).expanduser()
    tokenizer = tokenizer_files(place, files["config.json"], config.vocab_size)
    if tokenizer:
        return files | {file.name: file.read_bytes() for file in tokenizer}, []
    if given is not None:
        raise ConfigError(f"tokenizer={given}: expected a folder with tokenizer.json")
    return files, [
        f"There is no tokenizer in {source} that transformers reads without code of its own. "
        f"Before use convert again with tokenizer=FOLDER, a folder of {hub_name(settings)}'s."
    ]


def _write_checkpoint(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Both as the last one, which stages start from, and as the selected one."""
    import torch

    checkpoint = {
        "state_dict": {BACKBONE + name: tensor for name, tensor in weights.items()},
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }
    write(file, lambda partial: torch.save(checkpoint, partial))
    write_again(file, file.with_name("selected.ckpt"))


def _report(files: list[Path], weights: Mapping[str, Tensor], notes: Sequence[str]) -> list[Path]:
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{len(weights)} tensors, {count:,} numbers")
    for line in (*notes, *files):
        print(line)
    return files
