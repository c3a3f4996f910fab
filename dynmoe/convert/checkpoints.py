"""Conversion of published checkpoints into run folders, and back; and the files of both.

PyTorch, transformers and Hydra are imported by the functions that need them: a wrong command is
refused at once.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

BACKBONE = "backbone."


def from_official(given: Mapping[str, str]) -> list[Path]:
    """Write a run folder, `done` last; return its files.

    Raises:
        ConfigError: files that are there already, or a tokenizer or tower that does not fit.
        DataError: a folder that holds no official model, or one that is not supported.
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
    """Write weights and config.json as the official code reads them; return both files.

    Raises:
        ConfigError: files that are there already, no run folder or checkpoint, or a model that the
            official code does not have.
        DataError: weights that do not fit the configuration.
    """
    from safetensors.torch import save_file

    from dynmoe.config.trust import KEY, packages
    from dynmoe.convert.config import official_config, settings_of
    from dynmoe.convert.weights import to_official as official_weights
    from dynmoe.records import RunFolder
    from dynmoe.training import trained
    from dynmoe.training.saving import read_checkpoint

    target = Path(given["to"]).expanduser()
    files = [target / "model.safetensors", target / "config.json"]
    check_free(files, given)
    folder = RunFolder(Path(given["run"]).expanduser())
    cfg = trained.configuration(folder, packages(given.get(KEY, "")))
    checkpoint = trained.given_checkpoint(folder, given.get("checkpoint", "last"))
    state = read_checkpoint(checkpoint)["state_dict"]
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
    """Return config.json and the files of a tokenizer by name, and notes for the user."""
    from transformers import AutoConfig

    from dynmoe.convert.config import hub_name

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
        f"There is no tokenizer in {source} that transformers reads without custom code. "
        f"Before use convert again with tokenizer=FOLDER, a folder of {hub_name(settings)}'s."
    ]


def _write_checkpoint(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the last checkpoint, which stages start from, and the selected one."""
    import torch

    checkpoint = {
        "state_dict": {BACKBONE + name: tensor for name, tensor in weights.items()},
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
    }
    write(file, lambda partial: torch.save(checkpoint, partial))
    selected = file.with_name("selected.ckpt")
    selected.unlink(missing_ok=True)
    try:
        os.link(file, selected)
    except OSError:  # a file system without links
        shutil.copyfile(file, selected)


def _report(files: list[Path], weights: Mapping[str, Tensor], notes: Sequence[str]) -> list[Path]:
    count = sum(tensor.numel() for tensor in weights.values())
    print(f"{len(weights)} tensors, {count:,} numbers")
    for line in (*notes, *files):
        print(line)
    return files


# Files.


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder as on the Hugging Face Hub, one shard after the other.

    Raises:
        DataError: no weights, or a shard that is missing though the folder's index names it.
    """
    from dynmoe.backbones.weights import read, shortened

    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise DataError(f"{folder}: expected model*.safetensors or pytorch_model*.bin, found none")
    for index in folder.glob(f"*{files[0].suffix}.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise DataError(f"{index}: expected weight_map with the shard of each weight")
        named = set(map(str, shards.values()))
        if absent := sorted(named.difference(file.name for file in files)):
            raise DataError(f"{index}: names shards that are not there: {', '.join(absent)}")
        files = [file for file in files if file.name in named]
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = read(file)
        if twice := sorted(state.keys() & tensors.keys()):
            raise DataError(
                f"{folder}: several files hold {shortened(twice)}. Leave those of one model"
            )
        state.update(tensors)
    return state


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DataError: the file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, found something else: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected keys with values, found a {type(content).__name__}")
    return content


def check_free(files: Sequence[Path], given: Mapping[str, str]) -> None:
    """Refuse to replace files without overwrite=true.

    Raises:
        ConfigError: naming those that exist.
    """
    taken = [str(file) for file in files if file.exists()]
    if taken and given.get("overwrite") != "true":
        raise ConfigError(
            f"to={given['to']}: {', '.join(taken)} already exist; pass "
            "overwrite=true to replace them"
        )


def write(file: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """Write the content, or let a function write it, under another name first: a file is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    if callable(content):
        content(partial)
    else:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    share(partial)
    partial.replace(file)


def share(file: Path) -> None:
    """Give a file the permissions of new files: safetensors keeps its own for their owner."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


# A fast tokenizer is made from one of these sets of files, and may have the settings too.
TOKENIZER_SETS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
TOKENIZER_SETTINGS = (
    *("tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)


def tokenizer_files(folder: Path, config: bytes, vocabulary: int) -> list[Path]:
    """Return the files of a folder that make a tokenizer for the model of the config.json
    ``config``.

    There are none if transformers cannot make a fast tokenizer of them without their custom code:
    the first Qwen's and the first StableLM-2's are tiktoken files.

    Raises:
        ConfigError: a tokenizer with more tokens than the model's ``vocabulary``.
    """
    names = {name for together in TOKENIZER_SETS for name in together}.union(TOKENIZER_SETTINGS)
    found = [folder / name for name in sorted(names) if (folder / name).is_file()]
    if not any(all((folder / name).is_file() for name in together) for together in TOKENIZER_SETS):
        return []
    tokens = _tokens(found, config)
    if tokens > vocabulary:
        raise ConfigError(
            f"tokenizer: {folder} has {tokens} tokens, but the model's vocabulary is {vocabulary}. "
            "Name the folder of the model's tokenizer: tokenizer=FOLDER"
        )
    return found if tokens else []


def _tokens(files: list[Path], config: bytes) -> int:
    """Return the number of tokens; 0 if the files hold no tokenizer."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as place:
        Path(place, "config.json").write_bytes(config)
        for file in files:
            shutil.copyfile(file, Path(place, file.name))
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, local_files_only=True, trust_remote_code=False
            )
        except Exception:  # transformers raises many kinds
            return 0
        return len(tokenizer) if tokenizer.is_fast else 0
