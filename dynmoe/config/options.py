"""The options of the configuration groups, as Hydra finds them on its search path."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ConfigDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.targets import TargetError, class_attribute

CONFIG_NAME = "config"


def groups() -> dict[str, list[str]]:
    """Our groups with their options."""
    names = sorted(name for name in loader().list_groups("") if name != "hydra")
    return {name: found for name in names if (found := options(name))}


def options(group: str, search: list[str] | None = None) -> list[str]:
    """Options of a group, empty where there is no such group; _names are parts of other files.

    `search`: overrides of hydra.searchpath.
    """
    if search:
        names = loader().get_group_options(
            group, ObjectType.CONFIG, config_name=CONFIG_NAME, overrides=search
        )
    else:  # NOTE: the loader's own method deep-copies its sources first, for 15 ms.
        names = _repository().get_group_options(group, ObjectType.CONFIG)
    return sorted(name for name in names if not name.startswith("_"))


def options_with(group: str, fits: Callable[[DictConfig], bool]) -> list[str]:
    """Options whose file, with its parents, satisfies `fits`; none where Hydra is not running."""
    if not GlobalHydra.instance().is_initialized():
        return []
    return [option for option in options(group) if fits(own(group, option))]


def own(group: str, option: str) -> DictConfig:
    """Keys of an option's file and of the files of its group that it builds on.

    Composing takes a hundred times as long, and a refusal would wait for every option. Options of
    the package are read once.
    """
    if any(source.scheme() == "file" for source in _repository().get_sources()):
        return _own(group, option)
    return copy.deepcopy(_own_of_package(group, option))


def _own(group: str, option: str) -> DictConfig:
    found = _repository().load_config(f"{group}/{option}")
    if found is None:
        return OmegaConf.create()
    parents = [e.path for e in found.defaults_list or [] if isinstance(e, ConfigDefault)]
    nodes = [_own(group, str(name)) for name in parents if name != "_self_"]
    return OmegaConf.merge(*nodes, found.config)  # type: ignore[return-value]


_own_of_package = cache(_own)


def fills_its_node_alone(group: str, option: str) -> bool:
    """Whether an option, with the files that it builds on, does nothing but give its group keys."""
    found = _repository().load_config(f"{group}/{option}")
    if found is None or found.header["package"] is not None:
        return False
    *parents, last = found.defaults_list or [ConfigDefault(path="_self_")]
    return last.is_self() and all(
        type(each) is ConfigDefault
        and each.package is None
        and fills_its_node_alone(group, str(each.path))
        for each in parents
    )


def _repository() -> IConfigRepository:
    return loader().repository  # type: ignore[attr-defined]


def loader() -> ConfigLoader:
    """Hydra's loader; one of our files alone where a configuration is resolved after Hydra left."""
    running = GlobalHydra.instance()
    return running.config_loader() if running.is_initialized() else _own_loader()


@cache
def _own_loader() -> ConfigLoader:
    return ConfigLoaderImpl(create_config_search_path("pkg://dynmoe.conf"))


def read_files_once(loader: ConfigLoader) -> None:
    """Let Hydra's `loader` read each file of a package once: a sweep is composed job by job."""
    for source in loader.repository.get_sources():  # type: ignore[attr-defined]
        if source.scheme() == "pkg":
            source.load_config = _reader(source)


_files: dict[tuple[str, str, str], bytes] = {}


def _reader(source: ConfigSource) -> Callable[[str], ConfigResult]:
    read = source.load_config

    def load_config(config_path: str) -> ConfigResult:
        key = source.provider, source.full_path(), config_path
        if key not in _files:
            _files[key] = pickle.dumps(read(config_path))
        found: ConfigResult = pickle.loads(_files[key])  # composing changes what it is given
        return found

    return load_config


# Reading of a configuration that may be wrong in many places.

T = TypeVar("T")


def read(cfg: DictConfig, key: str, kind: type[T]) -> T | None:
    """The resolved value at `key` as plain Python, None if it is missing or of another type."""
    try:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return None
    if isinstance(value, bool) and kind not in (bool, object):
        return None
    if isinstance(value, int) and kind is float:
        value = float(value) if abs(value) < 2**63 else None  # float() raises on large ones
    return value if isinstance(value, kind) else None


def written(cfg: DictConfig, key: str) -> Any:
    """The value at `key` as it is written, interpolations as text; None if there is none."""
    above, _, name = key.rpartition(".")
    with suppress(OmegaConfBaseException):
        parent = OmegaConf.select(cfg, above) if above else cfg
        if isinstance(parent, DictConfig) and name in set(map(str, parent)):
            return parent._get_node(name)._value()  # type: ignore[union-attr]
    return None


def modality(cfg: DictConfig, node: str = "") -> str | None:
    """Modality of a node's target: image, text, vision-language; None if it declares none."""
    target = read(cfg, f"{node}._target_" if node else "_target_", str)
    if target is None:
        return None
    try:
        found = class_attribute(target, "modality")
    except TargetError:
        return None
    return found if isinstance(found, str) else None


def device_count(cfg: DictConfig) -> int | None:
    """Devices per node; None where only the machine can tell (auto, -1)."""
    devices = read(cfg, "trainer.devices", object)
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:  # "0,2": the devices themselves
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() else None
