"""Files and folders that a run reads: what identifies them is not where they lie.

In a run's name data count by their folder's own name, weights by what they are, an earlier run by
its folder's: a relative path, a link, another machine or working directory is the same run.
``config.yaml`` has absolute paths. Other data in a folder of the same name are told by their hash
(``dynmoe.job``).
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

# Keys of paths, as far as the configuration has them.
DATA = ("data.root", "data.ood_root", "data.environments.root", "data.content.root")
CONTENT = (
    *("data.tokenizer_path", "data.environments.drop_list"),
    *("backbone.path", "backbone.pretrained", "backbone.vision.path", "backbone.vision.pretrained"),
)
RUNS = ("stage.start", "mixing.reference")
PLACES = (*DATA, *CONTENT, *RUNS)

BLOCK, BLOCKS = 1 << 16, 8
"""Bytes and number of the parts that stand for a large file: reading weights of 30 GB for a name
would take longer than many a run."""


def identity(key: str, value: object) -> object:
    """The value at ``key`` as it counts in the name of a run."""
    if key not in PLACES or not isinstance(value, str):
        return value
    place = Path(os.path.realpath(Path(value).expanduser()))
    if key in DATA:
        return place.name
    if key in RUNS:  # a run's folder is named by its configuration
        return "/".join(place.parts[-2:])
    try:
        return fingerprint(str(place))
    except OSError:
        return value  # none, or not to be read: refused elsewhere


@lru_cache
def fingerprint(place: str) -> str:
    """Hash of a file, or of the files in a folder by name, hidden ones and subfolders left out.

    Raises:
        OSError: one cannot be read.
    """
    digest = hashlib.sha256()
    if os.path.isdir(place):
        for name in sorted(os.listdir(place)):
            file = os.path.join(place, name)
            if not name.startswith(".") and os.path.isfile(file):
                digest.update(f"{name}\0".encode() + _parts(file))
    else:
        digest.update(_parts(place))
    return f"content {digest.hexdigest()[:16]}"


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


def moved(cfg: DictConfig, saved: DictConfig) -> bool:
    """Whether the data lie in another place than when the configuration was saved."""

    def real(config: DictConfig) -> list[str]:
        found = [OmegaConf.select(config, key) for key in DATA]
        return [os.path.realpath(Path(each).expanduser()) for each in found if each is not None]

    return real(cfg) != real(saved)


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
