"""Test environments by index or name, from the configuration and folders' names alone."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from dynmoe.config.options import read
from dynmoe.errors import DataError

# The built-in sets (dynmoe/data/images/digits.py, which needs PyTorch).
ANGLES = ("0", "15", "30", "45", "60", "75")
COLOURS = ("+90%", "+80%", "-90%")
DIGITS = {
    **dict.fromkeys(("rotated_digits", "rotated_mnist"), ANGLES),
    **dict.fromkeys(("colored_digits", "colored_mnist"), COLOURS),
}


def environment_names(cfg: DictConfig) -> Sequence[str] | None:
    """The names of the environments in the order of their indices; None where only the data tell.

    Where the configuration does not list them, they are the folders below `data.root`.
    """
    target = (read(cfg, "data.environments._target_", str) or "").rpartition(".")[2]
    if target in DIGITS:
        return DIGITS[target]
    if target != "image_folders":
        return None
    listed = read(cfg, "data.environments.environments", list)
    if listed:
        return sorted(map(str, listed))
    from dynmoe.data.images.tree import subfolders, tree_folder  # which loads NumPy

    root = read(cfg, "data.root", str)
    try:
        folder = read(cfg, "data.environments.folder", str)
        return None if root is None else [*subfolders(tree_folder(root, folder))]
    except DataError:
        return None  # reported when the data are read


def test_indices(cfg: DictConfig) -> list[int | str]:
    """`data.test_envs` with indices for names, as far as the names are known."""
    envs = read(cfg, "data.test_envs", list) or []
    names = environment_names(cfg) if any(isinstance(env, str) for env in envs) else None
    return [names.index(env) if names and env in names else env for env in envs]
