"""The configuration and the checkpoints of a trained run."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder


def configuration(folder: RunFolder) -> DictConfig:
    """Return the run's configuration, for one device, without loggers and token cache.

    Raises:
        ConfigError: the folder is no run.
    """
    saved = folder.path / "config.yaml"
    if not saved.exists():
        raise ConfigError(f"{folder.path}: expected a folder with a config.yaml, found none")
    cfg = OmegaConf.load(saved)
    assert isinstance(cfg, DictConfig)
    if cfg.moe.init == "cluster":  # equal shapes, without the k-means
        cfg.moe.init = "random"
    cfg.trainer.update(devices=1, strategy="auto")
    cfg.logger = None
    cfg.backbone.pretrained = False  # the weights come from a checkpoint
    if "vision" in cfg.backbone:
        cfg.backbone.vision.pretrained = False
    if cfg.get("stage") is not None:
        cfg.stage.start = None
    if "cache" in cfg.get("data", {}):
        cfg.data.cache = None  # the folder may be on another machine
    return cfg


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """Return the file of a checkpoint named ``selected`` or ``last``, or given as a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name)
