"""Files and folders that a run reads: what identifies them is what lies there, not where.

A run's name has a fingerprint in the place of each path, so that a relative path, a link, another
machine or working directory is the same run; ``config.yaml`` has absolute paths.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# Keys of paths, as far as the configuration has them.
PLACES = (
    *("data.root", "data.ood_root", "data.tokenizer_path"),
    *("data.environments.root", "data.environments.drop_list", "data.content.root"),
    *("backbone.path", "backbone.pretrained", "backbone.vision.path", "backbone.vision.pretrained"),
    "stage.start",
)

BLOCK, BLOCKS = 1 << 16, 8
"""Bytes and number of the parts that stand for a large file: reading weights of 30 GB for a name
would take longer than many a run."""

READ = 1000
"""Files of a folder that are looked into; of larger trees, images mostly, names and sizes count."""


def identity(cfg: DictConfig, key: str, value: object) -> object:
    """The value at ``key`` as it counts in the name of a run."""
    if key not in PLACES or not isinstance(value, str):
        return value
    place = Path(value).expanduser()
    if key == "stage.start":  # a run is what it has learnt
        place = place / "checkpoints" / "last.ckpt"
    elif key.endswith(".root") or key == "data.root":
        inside = OmegaConf.select(cfg, "data.environments.folder")
        if isinstance(inside, str) and (place / inside).is_dir():
            place = place / inside
    own = (str(OmegaConf.select(cfg, f"paths.{name}")) for name in ("outputs", "cache"))
    outside = tuple(os.path.realpath(path) for path in own)
    return fingerprint(os.path.realpath(place), outside) if place.exists() else value


@lru_cache
def fingerprint(place: str, outside: tuple[str, ...] = ()) -> str:
    """Hash of a file, or of a folder's files by name, without hidden ones and those ``outside``."""
    digest = hashlib.sha256()
    if os.path.isfile(place):
        digest.update(_parts(place))
    else:
        files = sorted(_files(place, outside))
        for name, size in files:
            digest.update(f"{name}\0{size}\0".encode())
            if len(files) <= READ:
                digest.update(_parts(os.path.join(place, name)))
    return f"content {digest.hexdigest()[:16]}"


def _files(folder: str, outside: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Relative names and sizes of all files below a folder; links are followed once."""
    seen = {*outside}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and (real := os.path.realpath(os.path.join(parent, name))) not in seen
            and not seen.add(real)  # type: ignore[func-returns-value]
        ]
        for name in names:
            file = os.path.join(parent, name)
            if not name.startswith(".") and os.path.isfile(file):
                yield os.path.relpath(file, folder).replace(os.sep, "/"), os.path.getsize(file)


def _parts(file: str) -> bytes:
    """Size and first bytes of a file, and evenly spaced parts of a large one."""
    size = os.path.getsize(file)
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        for part in range(BLOCKS):
            whole = size <= BLOCK * BLOCKS
            stream.seek(part * BLOCK if whole else (size - BLOCK) * part // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
    return digest.digest()


def make_absolute(cfg: DictConfig) -> None:
    """Replace the paths that are there by absolute ones, in place; keys that copy them follow."""
    for key in (*PLACES, "paths.outputs"):
        node, _, leaf = key.rpartition(".")
        parent = OmegaConf.select(cfg, node)
        if not isinstance(parent, DictConfig) or leaf not in parent:
            continue
        outputs = key == "paths.outputs"  # from the environment, and made by the run
        copied = OmegaConf.is_interpolation(parent, leaf) and not outputs
        if copied or not isinstance(parent[leaf], str):
            continue
        place = Path(parent[leaf]).expanduser()
        if outputs or place.exists():
            parent[leaf] = os.path.abspath(place)
