"""The configuration and the checkpoints of a trained run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dynmoe.config.trust import check_targets
from dynmoe.errors import ConfigError
from dynmoe.records import RunFolder


def configuration(folder: RunFolder, targets: Sequence[str] = ()) -> DictConfig:
    """Return the run's configuration, for one device, without loggers and token cache.

    `targets`: packages that it may call beside those that every run is made of.

    Raises:
        ConfigError: the folder is no run, its config.yaml is damaged, or it calls other code.
    """
    saved = folder.path / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{folder.path}: expected a folder with a config.yaml, found none")
    folder.check_unchanged(saved.name)
    cfg = read(saved)
    if cfg.moe.init == "cluster":  # equal shapes, without the k-means
        cfg.moe.init = "random"
    cfg.trainer.update(devices=1, strategy="auto")
    cfg.logger = None
    check_targets(cfg, targets, str(saved))
    cfg.backbone.pretrained = False  # the weights come from a checkpoint
    if "vision" in cfg.backbone:
        cfg.backbone.vision.pretrained = False
    if cfg.get("stage") is not None:
        cfg.stage.start = None
    if "cache" in cfg.get("data", {}):
        cfg.data.cache = None  # the folder may be on another machine
    return cfg


NODES = ("backbone", "data", "moe", "trainer")


def read(file: Path) -> DictConfig:
    """Read a run's config.yaml.

    Raises:
        ConfigError: it is damaged, or something else.
    """
    try:
        cfg = OmegaConf.load(file)
        if isinstance(cfg, DictConfig):
            OmegaConf.resolve(cfg)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(
            f"{file}: not the configuration of a run: {' '.join(str(error).split())[:200]}. "
            "Give the folder outputs/<name>/<run> of a trained run"
        ) from error
    nodes = cfg if isinstance(cfg, DictConfig) else OmegaConf.create({})
    lacks = [key for key in NODES if not OmegaConf.is_dict(nodes.get(key))]
    if lacks:
        raise ConfigError(
            f"{file}: not the configuration of a run, it lacks {', '.join(lacks)}. "
            "Give the folder outputs/<name>/<run> of a trained run"
        )
    return nodes


CHECKPOINTS = "selected, last or FILE"


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """Return the file of a checkpoint named ``selected`` or ``last``, or given as a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name).expanduser()


def given_checkpoint(folder: RunFolder, name: str) -> Path:
    """Return the file of the checkpoint that ``checkpoint=`` names.

    Raises:
        ConfigError: there is none.
    """
    file = checkpoint_of(folder, name)
    if not file.exists():
        raise ConfigError(f"checkpoint={name}: there is no file {file}. Expected {CHECKPOINTS}")
    return file
