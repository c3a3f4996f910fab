"""A trained run again: its own configuration, and the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from dynmoe.config.reading import modality
from dynmoe.errors import ConfigError
from dynmoe.report.records import RunFolder

if TYPE_CHECKING:
    from dynmoe.data.task_data import TaskData
    from dynmoe.tasks.base import MoETask

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
    if modality(cfg, "data") == "text":
        cfg.data.cache = None  # the folder may be of another machine
    return cfg


def checkpoint_of(folder: RunFolder, name: str) -> Path:
    """``selected``, ``last``, or a file."""
    if name in ("selected", "last"):
        return folder.path / "checkpoints" / f"{name}.ckpt"
    return Path(name)


def load(
    cfg: DictConfig, data: TaskData, fused_attention: bool, checkpoint: Path
) -> tuple[MoETask, int]:
    """The task as the checkpoint left it, on the CPU, and the step it is of."""
    import torch

    from runners import build

    task = build.build_task(cfg, data, fused_attention)
    state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    task.load_state_dict(state["state_dict"])
    return task, state["global_step"] - 1
