"""The tokenizer of a converted model: of the official folder if transformers can read it."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from dynmoe.errors import ConfigError

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
