"""Files of converted models: weights as on Hugging Face's hub, and what is written whole or not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
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


# The tokenizer of a converted model: of the official folder if transformers can read it.

# One of these sets is what a fast tokenizer is made from,
CONTENT = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
# and what else there may be.
SETTINGS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def tokenizer_files(folder: Path, config: bytes, vocabulary: int) -> list[Path]:
    """The files of a folder that make a tokenizer for the model of the config.json ``config``.

    Empty if transformers makes no fast tokenizer of them without code of their own: the first
    Qwen's and the first StableLM-2's are tiktoken files.

    Raises:
        ConfigError: a tokenizer with more tokens than the model's ``vocabulary``.
    """
    names = {name for together in CONTENT for name in together}.union(SETTINGS)
    found = [folder / name for name in sorted(names) if (folder / name).is_file()]
    if not any(all((folder / name).is_file() for name in together) for together in CONTENT):
        return []
    tokens = _tokens(found, config)
    if tokens > vocabulary:
        raise ConfigError(
            f"tokenizer: {folder} has {tokens} tokens, but the model's vocabulary is {vocabulary}. "
            "Give that of the model: tokenizer=FOLDER"
        )
    return found if tokens else []


def _tokens(files: list[Path], config: bytes) -> int:
    """How many tokens there are; 0 if there is no tokenizer in them."""
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
