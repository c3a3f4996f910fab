"""The code that a run's own configuration may call: it can come from someone else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from dynmoe.config.targets import TargetError, Unreadable, locate
from dynmoe.errors import ConfigError

KEY = "targets"

TRUSTED = (
    *("dynmoe.adaptation", "dynmoe.backbones", "dynmoe.data", "dynmoe.layers", "dynmoe.tasks"),
    *("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.plugins"),
    *("lightning.pytorch.profilers", "lightning.pytorch.strategies", "lightning.pytorch.trainer"),
    *("torch.optim", "transformers.optimization"),
)
"""Packages of what a run is made of."""


def packages(text: str) -> list[str]:
    """The packages that are given as `targets=a,b`."""
    return [each for each in text.split(",") if each]


def check_targets(cfg: DictConfig, allowed: Sequence[str], where: str) -> None:
    """Look that every `_target_` is defined in a trusted package, or in one of `allowed`.

    A name alone tells nothing: `dynmoe.version.subprocess.run` is not ours. Names are followed
    through sources; nothing is imported.

    Raises:
        ConfigError: one is defined elsewhere; `where` names the configuration.
    """
    for key, target in _targets(OmegaConf.to_container(cfg, resolve=True), ""):
        if not _is_within(str(target), allowed) and not _is_within(_home(target), TRUSTED):
            package = str(target).partition(".")[0]
            raise ConfigError(
                f"{where}: {key}={target} is code outside of what a run is made of. If you trust "
                f"it: {KEY}={package}"
            )


def _is_within(name: str, packages: Sequence[str]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in packages)


def _home(target: object) -> str:
    """The module that defines a target, or the name that names nothing; empty where only Python can
    tell."""
    name = str(target)
    if "__" in name:  # a module's loader, an object's globals
        return ""
    try:
        return locate(name).module
    except TargetError:
        return _made_at_import(name)
    except Unreadable:
        return ""


def _made_at_import(name: str) -> str:
    """The module of what sources do not show; nothing but trusted packages is imported for it."""
    if not _is_within(name, TRUSTED):
        return ""
    try:
        return str(getattr(get_object(name), "__module__", ""))
    except (ImportError, AttributeError, ValueError):  # of another version: it cannot be called
        return name


def _targets(node: Any, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "_target_":
                yield f"{key}._target_".lstrip("."), value
            else:
                yield from _targets(value, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _targets(value, f"{key}[{number}]")
