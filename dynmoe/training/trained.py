"""A trained run again: its own configuration, and the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder

# What runs of early versions did not save.
EARLIER = {
    "runtime": {"matmul_precision": "highest", "malloc": "auto", "fused_attention": True},
    "moe": {"recompute": False},
}


def configuration(folder: RunFolder) -> DictConfig:
    """What the run was trained with, for one device, without loggers, and without kept tokens.

    Raises:
        ConfigError: the folder is no run.
    """
    saved = folder.path / "config.yaml"
    if not saved.exists():
        raise ConfigError(f"{folder.path}: expected a folder with a config.yaml, found none")
    cfg = OmegaConf.merge(EARLIER, OmegaConf.load(saved))
    assert isinstance(cfg, DictConfig)
    if cfg.moe.init == "upcycle":  # its name in early versions
        cfg.moe.init = "copy"
    elif cfg.moe.init == "cluster":  # equal shapes, without the k-means
        cfg.moe.init = "random"
    cfg.trainer.update(devices=1, strategy="auto")
    cfg.logger = None
    cfg.backbone.pretrained = False  # the weights come from a checkpoint
    if "vision" in cfg.backbone:
        cfg.backbone.vision.pretrained = False
    if cfg.get("stage") is not None:
        cfg.stage.start = None
    if "cache" in cfg.get("data", {}):
        cfg.data.cache = None  # the folder may be of another machine
    return cfg


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """``selected``, ``last``, or a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name)
