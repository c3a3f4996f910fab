"""Files of converted models: weights as on Hugging Face's hub, and what is written whole or not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


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
        named = set(read_json(index)["weight_map"].values())
        if absent := sorted(named.difference(file.name for file in files)):
            raise DataError(f"{index}: names shards that are not there: {', '.join(absent)}")
    state: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".bin":
            state.update(torch.load(file, map_location="cpu", weights_only=True))
        else:
            state.update(load_file(file))
    return state


def read_json(file: Path) -> Any:
    """Raises DataError where there is something else."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: expected JSON, found something else: {error}") from None


def check_free(files: Sequence[Path], given: Mapping[str, str]) -> None:
    """Raises ConfigError where one is there already, and not ``given`` away."""
    taken = [str(file) for file in files if file.exists()]
    if taken and given.get("overwrite") != "true":
        raise ConfigError(f"to={given['to']}: {', '.join(taken)} would be lost. overwrite=true?")


def write(file: Path, content: str | bytes | Callable[[Path], Any]) -> None:
    """What is given, or a function writes; under another name first, so that the file is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    if callable(content):
        content(partial)
    else:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(file)


def write_again(file: Path, other: Path) -> None:
    """The same content under a second name; where the file system can, it takes no second place."""
    other.unlink(missing_ok=True)
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)
