"""Checkpoints on disk: written where they stay, and known to be whole before they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from dynmoe.errors import ConfigError, reason_of
from dynmoe.files import check_regular


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint straight to its file, and returns when it is on disk.

    Lightning's own writer needs memory for a second copy, and the folder of temporary files, where
    a kill leaves a file of that size for good.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises OSError, with the name of the file, where it cannot be written."""
        if "://" in str(path):  # a callback of one's own, for a place elsewhere
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except (OSError, RuntimeError) as error:
            # NOTE: PyTorch's writer of archives hides the error of the stream behind its own, about
            # positions, and names no file.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            file.unlink(missing_ok=True)
            raise OSError(cause.errno, cause.strerror, str(file)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What the file holds, on the CPU; it was read before, by ``read_checkpoint``."""
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return content


def read_checkpoint(file: Path, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a run's checkpoint: ``state_dict``, ``global_step`` and more.

    Raises:
        ConfigError: the file is damaged, or something else; it names those beside it that are not.
    """
    try:
        return _read(file, mmap)
    except ConfigError as error:
        whole = [other for other in sorted(file.parent.glob("*.ckpt")) if is_whole(other)]
        if not whole:
            raise
        names = ", ".join(other.name for other in whole)
        raise ConfigError(f"{error}. Whole checkpoints beside it: {names}") from error


def is_whole(file: Path) -> bool:
    """Whether a file is there that ``read_checkpoint`` can read."""
    try:
        _read(file, mmap=True)
    except ConfigError:
        return False
    return True


def _read(file: Path, mmap: bool) -> dict[str, Any]:
    try:
        check_regular(file)
        # PyTorch writes a checksum of every tensor, and does not look at it.
        with ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"it is damaged, in {damaged}")
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # a pickle that is none may raise anything
        # NOTE: to a file that it cannot trust PyTorch says how to run its code.
        reason = reason_of(error).partition("(1) In PyTorch")[0]
        raise _no_checkpoint(file, reason) from error
    found = content if isinstance(content, dict) else {}
    if not (
        isinstance(found.get("state_dict"), Mapping) and isinstance(found.get("global_step"), int)
    ):
        raise _no_checkpoint(file, "it has no state_dict and global_step")
    return found


def _no_checkpoint(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"{file}: not a checkpoint of dynmoe-run (checkpoint=selected, last or FILE): "
        f"{reason.strip()}"
    )
