"""The options of the configuration groups, as Hydra finds them on its search path."""

from __future__ import annotations

from collections.abc import Callable

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

CONFIG_NAME = "config"


def groups() -> dict[str, list[str]]:
    """Our groups with their options."""
    names = sorted(name for name in loader().list_groups("") if name != "hydra")
    return {name: found for name in names if (found := options(name))}


def options(group: str, search: list[str] | None = None) -> list[str]:
    """Options of a group, empty where there is no such group; _names are parts of other files.

    `search` are overrides of hydra.searchpath, the only ones that bear on the answer.
    """
    names = loader().get_group_options(
        group, ObjectType.CONFIG, config_name=CONFIG_NAME, overrides=search
    )
    return sorted(name for name in names if not name.startswith("_"))


def options_with(group: str, fits: Callable[[DictConfig], bool]) -> list[str]:
    """Options whose own file satisfies `fits`; none where Hydra is not running."""
    if not GlobalHydra.instance().is_initialized():
        return []
    return [option for option in options(group) if fits(_load(group, option))]


def _load(group: str, option: str) -> DictConfig:
    try:
        cfg = loader().load_configuration(None, [f"+{group}={option}"], run_mode=RunMode.RUN)
    except HydraException:
        return OmegaConf.create()
    node = cfg.get(group)
    return node if isinstance(node, DictConfig) else OmegaConf.create()


def loader() -> ConfigLoader:
    """Hydra's loader; only inside hydra.main or hydra.initialize."""
    return GlobalHydra.instance().config_loader()
