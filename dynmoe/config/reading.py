"""How rules read a configuration that may be wrong in many places."""

from __future__ import annotations

from typing import TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dynmoe.config.signature import TargetError, class_attribute

T = TypeVar("T")


def read(cfg: DictConfig, key: str, kind: type[T]) -> T | None:
    """The resolved value at `key` as plain Python, None where it is not there or not a `kind`."""
    try:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException:
        return None
    if isinstance(value, bool) and kind not in (bool, object):
        return None
    if isinstance(value, int) and kind is float:
        value = float(value)
    return value if isinstance(value, kind) else None


def modality(cfg: DictConfig, node: str = "") -> str | None:
    """What the target of a node works on, `image` or `text`; None where it does not say."""
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
    return int(text) if text.isdigit() else None
