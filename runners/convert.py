"""``dynmoe-convert``: checkpoints of MoE-LLaVA and DynMoE-LLaVA as ours, and ours as theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.convert.files import check_free, read_json, read_weights, write, write_again
from dynmoe.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

HELP = """dynmoe-convert turns published MoE-LLaVA and DynMoE-LLaVA models into ours, and back.

  dynmoe-convert from=FOLDER to=FOLDER [tokenizer=FOLDER] [vision=FOLDER] [overwrite=true]
  dynmoe-convert run=FOLDER to=FOLDER [checkpoint=last|selected|FILE] [overwrite=true]

from=FOLDER holds config.json, weights (*.safetensors or pytorch_model*.bin) and maybe a tokenizer
as on Hugging Face's hub. to=FOLDER becomes a finished run, for dynmoe-eval run=FOLDER mode=answer,
and, of a dense model, for dynmoe-run task=vl stage.start=FOLDER. tokenizer=FOLDER has a tokenizer
instead, vision=FOLDER the CLIP that config.json names, which else come from the hub.

run=FOLDER is such a folder, or that of a run of task=vl on StableLM, Qwen2 or Phi; written are
to/model.safetensors and to/config.json, which the official code reads.
"""

KEYS = ("from", "run", "to", "checkpoint", "tokenizer", "vision", "overwrite")
ONLY_WITH = {"checkpoint": "run", "tokenizer": "from", "vision": "from"}
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
    for key, other in ONLY_WITH.items():
        if key in given and other not in given:
            raise ConfigError(f"{key}= belongs to {other}=FOLDER")
    if given.get("overwrite", "false") not in ("true", "false"):
        raise ConfigError(f"overwrite={given['overwrite']}: expected true or false")
    return given


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


if __name__ == "__main__":
    main()
